"""The command line as a user runs it: as a process, in a folder of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TUNEGATE = Path(sys.executable).parent / "tunegate"


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@dataclass
class Workspace:
    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, timeout: float = 240, input: str | None = None) -> Result:
        done = subprocess.run(
            [str(TUNEGATE), *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            input=input,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(TUNEGATE), *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stage(self, run_id: str, stage: str) -> dict | None:
        path = self.folder / ".tunegate" / "runs" / run_id / "stages" / f"{stage}.json"
        return json.loads(path.read_text()) if path.exists() else None


def make_workspace(folder: Path) -> Workspace:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TUNEGATE_", "AWS_"))}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return Workspace(folder, environment)
