"""The documentation: examples run, commands exist, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.S | re.M)
    return [body for name, body in fences if name == language]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "") + blocks(page, "sh") + blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("  #")[0].strip().removeprefix("$ ")
                if line.startswith("tunegate "):
                    found.append((page.name, line))
    return found


def test_there_are_commands_to_check():
    assert len(commands()) > 10


@pytest.mark.parametrize("words", sorted({tuple(shlex.split(c)[1:3]) for _, c in commands()}))
def test_every_documented_command_exists(words):
    from typer.main import get_command

    from tunegate.cli import chat, cluster, data, evaluate, gates, models, runs, spec, train  # noqa: F401
    from tunegate.cli.app import app

    command = get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            return
        if word.startswith("-"):
            return
        assert word in command.commands, f"tunegate {' '.join(words)}"
        command = command.commands[word]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_training_example_runs(tmp_path):
    code = "\n".join(blocks(ROOT / "docs" / "training.md", "python"))  # each block goes on where the last one ended
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in (
        "held-out loss",
        "held-out accuracy",
        "held-out reward",
        "GRPO: reward",
        "two processes: held-out loss",
    ):
        assert line in done.stdout


def test_help_answers_without_heavy_imports():
    code = (
        "import sys; sys.argv = ['tunegate', '--help']\n"
        "from tunegate.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'mlflow', 'kfp', 'transformers', 'polars', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
