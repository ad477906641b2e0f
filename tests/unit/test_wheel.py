"""The wheel holds what the folders hold, under the import names, and nothing leaks to the top level."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "tunegate": ROOT / "src" / "tunegate",
    "tunegate/components": ROOT / "components",
    "tunegate/pipelines": ROOT / "pipelines",
    "tunegate/starter": ROOT / "examples" / "starter",
}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    # Built from a copy, since setuptools leaves build folders behind and two test processes may build at once.
    source = tmp_path_factory.mktemp("source")
    for name in ("src", "components", "pipelines", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), "."]
    subprocess.run(command, check=True, cwd=source)
    (wheel,) = out.glob("*.whl")
    return [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]


def test_every_python_file_is_in_the_wheel(wheel_names):
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            assert f"{package}/{path.relative_to(folder).as_posix()}" in wheel_names


@pytest.mark.parametrize(
    "name",
    [
        "tunegate/py.typed",
        "tunegate/profiles/smoke.yaml",
        "tunegate/profiles/demo.yaml",
        "tunegate/pipelines/instruction_tuning/pipeline.yaml",
        "tunegate/components/sft/metadata.yaml",
        "tunegate/data/checks/toxicity.npz",
        "tunegate/starter/sft.jsonl",
        "tunegate/starter/safety.jsonl",
        "tunegate/starter/lookalike.jsonl",
        "tunegate/starter/preferences.jsonl",
        "tunegate/starter/evaluation.jsonl",
        "tunegate/starter/bias_questions.jsonl",
    ],
)
def test_data_files_are_in_the_wheel(wheel_names, name):
    assert name in wheel_names


def test_assets_are_in_the_wheel(wheel_names):
    for room in ("evaluation", "report"):
        for path in (ROOT / "src" / "tunegate" / room / "assets").iterdir():
            assert f"tunegate/{room}/assets/{path.name}" in wheel_names


def test_nothing_leaks_to_the_top_level(wheel_names):
    assert {n.split("/")[0] for n in wheel_names} == {"tunegate"}


def test_the_package_list_is_complete():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(content["tool"]["setuptools"]["packages"])
    found = set()
    for package, folder in FOLDERS.items():
        for path in folder.rglob("__init__.py"):
            parts = (package, *path.parent.relative_to(folder).parts)
            found.add(".".join("/".join(parts).split("/")))
    assert listed == found
