"""Write docker/constraints.txt: the exact version of everything that the images install.

Walks from the project's dependencies through what is installed in the environment that runs this script, so the pins
are those that the tests ran with. Build labels such as `+cpu` are left out: the CPU and the CUDA image share the list.
What PyTorch's CUDA build needs besides stands in constraints-cuda.txt; pip's resolver is asked for it, since that build
need not be installed here.

    .venv/bin/python docker/lock.py           # writes both; asks the package index
    .venv/bin/python docker/lock.py --check   # exits 1 when the files do not fit pyproject.toml and each other
"""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker" / "constraints.txt"
CUDA_FILE = ROOT / "docker" / "constraints-cuda.txt"
CUDA_HEADER = """\
# What torch=={torch} in its CUDA build needs beside constraints.txt; written by docker/lock.py.
"""
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


def cuda_pins(pins: dict[str, str]) -> dict[str, str]:
    """What the index's own build of the pinned torch leads to and `pins` lacks: the CUDA libraries."""
    # Without pip's files and find-links, which may name a CPU build; an index given by PIP_INDEX_URL stays.
    hidden = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run(
        [*command, "--constraint", str(FILE), f"torch=={pins['torch']}"],
        env={**environment, "PIP_CONFIG_FILE": os.devnull},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    versions = {canonicalize_name(one["name"]): one["version"] for one in found}
    return {name: version for name, version in versions.items() if name not in pins}


def read(file: Path) -> dict[str, str]:
    """Versions by name."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def write(file: Path, header: str, pins: dict[str, str]) -> None:
    """The same, written."""
    file.write_text(header + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins)))


def main() -> int:
    """Write or check the file; the exit status."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # The image is also the chart's MLflow server: `server` has the driver of its database.
    wanted = [*project["dependencies"], *extras["gguf"], *extras["server"]]
    if "--check" not in sys.argv[1:]:
        pins = closure(wanted)
        write(FILE, HEADER, pins)
        write(CUDA_FILE, CUDA_HEADER.format(torch=pins["torch"]), cuda_pins(pins))
        return 0
    pinned = read(FILE)
    wrong = [
        text
        for text in wanted
        if (requirement := Requirement(text))
        and not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), "0"))
    ]
    for text in wrong:
        print(f"docker/constraints.txt does not fit {text}; run: .venv/bin/python docker/lock.py", file=sys.stderr)
    if not CUDA_FILE.read_text().startswith(CUDA_HEADER.format(torch=pinned.get("torch"))):
        wrong.append("torch")
        print("docker/constraints-cuda.txt is for another torch; run: .venv/bin/python docker/lock.py", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
