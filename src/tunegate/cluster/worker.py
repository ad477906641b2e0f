"""The process that runs the compiled pipeline under `kfp.local`; its output is the run's pipeline log.

A process of its own, so that kfp's logging and printing never reach the user's terminal, an interrupt can stop the
whole tree at once, and the progress view stays responsive.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PARENT_POLL_SECONDS = 1.0


def main() -> int:
    """Run the pipeline described by the JSON file named in the first argument; 0 when its body succeeded."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    _die_with_parent(os.getppid())

    # Made here, since Docker would make it for its mount, and as root.
    Path(job["pipeline_root"]).mkdir(parents=True, exist_ok=True)
    from kfp import components, local

    local.init(_runner(job), pipeline_root=job["pipeline_root"], raise_on_error=True)
    pipeline = components.load_component_from_file(job["pipeline"])
    try:
        pipeline(**job["arguments"])
    except RuntimeError as error:  # kfp.local's way to say that a task failed; the stage's record has the reason
        print(error, file=sys.stderr)
        return 1
    return 0


def _runner(job: dict[str, Any]) -> Any:
    from kfp import local

    if job["runner"] == "docker":
        root = job["storage_root"]
        # kfp keeps `volumes` for itself, so what the tasks see besides its own folders goes in as `mounts`.
        wanted = {root: {"bind": root, "mode": "rw"}, **job.get("mounts", {})}
        return local.DockerRunner(
            mounts=[
                {"Type": "bind", "Source": path, "Target": v["bind"], "ReadOnly": v["mode"] == "ro"}
                for path, v in wanted.items()
            ],
            # Settings and credentials of S3 and MLflow go from process to container, never into a file.
            environment={**_passed_on(job.get("passed_on", [])), **job.get("environment", {})},
            user=f"{os.getuid()}:{os.getgid()}",
            read_only=True,
            tmpfs={"/tmp": "exec,mode=1777"},
            **job.get("docker", {}),
        )
    return local.SubprocessRunner(use_venv=False)


def _passed_on(named: Sequence[str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_")) or name in named}


def _die_with_parent(parent: int) -> None:
    """End this process group when the process that started it is gone, so that no task outlives its run."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os.killpg(os.getpgid(0), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
