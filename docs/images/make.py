"""Makes the pictures of this folder that show invented figures: the report, the balance, a version's page in MLflow.

    .venv/bin/python docs/images/make.py

Needs Chromium and Pillow. The run is `tests/unit/report/report_fixture.py`; everything else is real: the gates decide,
the versions are registered and promoted in an MLflow store, and MLflow's own server shows them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "report"))

from PIL import Image  # noqa: E402
from report_fixture import balance, decision, evaluation, write_run  # noqa: E402

from tunegate.config import build_spec, profile_mapping  # noqa: E402
from tunegate.evaluation.results import Evaluation, write_evaluation  # noqa: E402
from tunegate.gates.results import write_decision  # noqa: E402
from tunegate.registry.config import RegistrySpec  # noqa: E402
from tunegate.registry.model_card import model_card  # noqa: E402
from tunegate.registry.registry import balance as read_balance  # noqa: E402
from tunegate.registry.registry import promote, register  # noqa: E402
from tunegate.report import render_report  # noqa: E402
from tunegate.stages.card import card_facts  # noqa: E402
from tunegate.stages.versions import draw_versions  # noqa: E402
from tunegate.storage.manifest import write_manifest  # noqa: E402
from tunegate.storage.runs import RunStore  # noqa: E402
from tunegate.tracking.client import connect, ensure_experiment  # noqa: E402

NAME = "starter-assistant"
# MLflow shows an HTML artifact in a sandboxed frame, which headless Chromium draws only without a process of its own.
CHROMIUM = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-site-isolation-trials"]


def shoot(url: str, target: Path, width: int, height: int, *, patience_ms: int = 4000) -> Image.Image:
    """A screenshot of a page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or "google-chrome"
    options = [*CHROMIUM, f"--virtual-time-budget={patience_ms}", f"--window-size={width},{height}"]
    subprocess.run([program, *options, f"--screenshot={target}", url], check=True, capture_output=True)
    with Image.open(target) as image:
        return image.convert("RGB")


def evaluated(version: int) -> Evaluation:
    """The evaluation of one of the three versions: the last one's, with the figures of the balance put in."""
    found = evaluation()
    point = balance().points[version]
    metrics = dict(found.models["candidate"].metrics)
    for name, share in (("unsafe_rate", point.safe.turned()), ("win_rate_anchor", point.useful)):
        update = {"estimate": share.estimate, "low": share.low, "high": share.high}
        metrics[name] = metrics[name].model_copy(update=update)
    metrics["over_refusal_rate"] = metrics["over_refusal_rate"].model_copy(update={"estimate": point.over_refusal})
    asked = {} if point.comparable else {"prompts_digest": "other prompts"}
    candidate = found.models["candidate"].model_copy(update={"metrics": metrics, **asked})
    return found.model_copy(update={"models": {**found.models, "candidate": candidate}})


def publish(folder: Path, uri: str, run: RunStore) -> None:
    """Register three versions, promote one after the other, and leave report, card and picture in the MLflow run."""
    client = connect(uri)
    experiment = ensure_experiment(client, "tunegate", str(folder / "artifacts"))
    mlflow_run = client.create_run(experiment, run_name="starter").info.run_id
    spec = build_spec(profile_mapping("demo"), {"registry": {"model_name": NAME, "promote": False}})
    context = SimpleNamespace(spec=spec, run=run, lineage=lambda: {"sft.model": "5" * 64})
    champion = ""
    for version in (1, 2, 3):
        made = {kind: folder / str(version) / kind for kind in ("model", "evaluation", "decision")}
        made["model"].mkdir(parents=True)
        (made["model"] / "config.json").write_text(f'{{"version": {version}}}\n')
        (made["model"] / "model.safetensors").write_bytes(bytes(1000 * version))
        sealed = {"parents": {}, "spec_digest": spec.digest(), "seeds": {"run": 17}}
        model = write_manifest(made["model"], kind="model", **sealed)
        write_evaluation(evaluated(version), made["evaluation"])
        measured = write_manifest(made["evaluation"], kind="evaluation", **sealed)
        found = decision("PROMOTE")
        digests = {**found.digests, "candidate": model.digest, "evaluation": measured.digest}
        found = found.model_copy(update={"digests": digests | ({"champion": champion} if champion else {})})
        write_decision(found, made["decision"])
        card = model_card(card_facts(context, found.model_dump(mode="json")))
        register(
            uri,
            RegistrySpec(model_name=NAME),
            **made,
            run_id=f"{run.run_id}-{version}",
            mlflow_run_id=mlflow_run,
            report_run_id=mlflow_run,
            lineage={"sft.model": "5" * 64},
            model_card=card,
        )
        promote(uri, NAME, version, who="mara", why="passed every gate")
        champion = model.digest
    client.log_text(mlflow_run, render_report(run), "report.html")
    client.log_text(mlflow_run, card, "model_card.md")
    client.log_text(mlflow_run, draw_versions(read_balance(uri, NAME)) or "", "balance.svg")
    client.set_terminated(mlflow_run)


def serve(uri: str) -> tuple[subprocess.Popen[bytes], str]:
    """MLflow's server on a store, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--backend-store-uri", uri, "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            break
    return server, address


def main() -> int:
    """Write every picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = write_run(folder / "store")
        page, shot = folder / "report.html", folder / "shot.png"
        page.write_text(render_report(run), encoding="utf-8")
        whole = shoot(page.as_uri(), shot, 1180, 5200)
        whole.crop((0, 0, 1180, 1320)).save(HERE / "report.png", optimize=True)
        whole.crop((0, 2440, 1180, 3540)).save(HERE / "report-effect.png", optimize=True)
        uri = f"sqlite:///{folder}/mlflow.db"
        publish(folder / "made", uri, run)
        picture = folder / "balance.svg"
        picture.write_text(draw_versions(read_balance(uri, NAME)) or "", encoding="utf-8")
        shoot(picture.as_uri(), shot, 660, 555).save(HERE / "balance.png", optimize=True)
        server, address = serve(uri)
        try:
            version = shoot(f"{address}/#/models/{NAME}/versions/3", shot, 1500, 1250, patience_ms=20_000)
            version.crop((0, 0, 1112, 1250)).save(HERE / "mlflow-version.png", optimize=True)
        finally:
            server.terminate()
            server.wait(timeout=30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
