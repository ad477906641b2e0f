"""Write docker/constraints.txt: the exact version of everything that the images install.

Walks from the project's dependencies through what is installed in the environment that runs this script, so the pins
are those that the tests ran with. Build labels such as `+cpu` are left out: the CPU and the CUDA image share the list.

    .venv/bin/python docker/lock.py           # writes
    .venv/bin/python docker/lock.py --check   # exits 1 when the file does not fit pyproject.toml
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker" / "constraints.txt"
HEADER = """\
# Exact versions of everything in the images; written by docker/lock.py from the environment that the tests ran in.
"""


def closure(requirements: list[str]) -> dict[str, str]:
    """Version of every distribution that the requirements lead to, by its canonical name."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"{name} is not installed here; run make install first")
        pins[name] = found.version.partition("+")[0]
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            queue += [(Requirement(text), wanted) for text in found.requires or []]
    return pins


def main() -> int:
    """Write or check the file; the exit status."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # The image is also the chart's MLflow server: `server` has the driver of its database.
    wanted = [*project["dependencies"], *extras["gguf"], *extras["server"]]
    if "--check" not in sys.argv[1:]:
        pins = closure(wanted)
        FILE.write_text(HEADER + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins)))
        return 0
    lines = [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")]
    pinned = {name: version for name, _, version in (line.partition("==") for line in lines)}
    wrong = [
        text
        for text in wanted
        if (requirement := Requirement(text))
        and not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), "0"))
    ]
    for text in wrong:
        print(f"docker/constraints.txt does not fit {text}; run: .venv/bin/python docker/lock.py", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
