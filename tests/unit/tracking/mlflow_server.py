"""An MLflow server process on loopback that tests start, stop and restart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from mlflow.server import constants


class MlflowServer:
    """`mlflow server` without its command line's start-up time: the same application under the same uvicorn."""

    def __init__(
        self, folder: Path, store_uri: str, *, artifacts: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        self._environment = {
            **os.environ,
            constants.BACKEND_STORE_URI_ENV_VAR: store_uri,
            constants.REGISTRY_STORE_URI_ENV_VAR: store_uri,
            constants.ARTIFACTS_DESTINATION_ENV_VAR: artifacts or str(folder / "served-artifacts"),
            constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
            constants.SERVE_ARTIFACTS_ENV_VAR: "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(self.port)]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, "mlflow.server.fastapi_app:app"],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.05)
        self.stop()
        raise AssertionError(f"the server did not come up: {self._log.read_text()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process = None
