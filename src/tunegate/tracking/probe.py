"""A try of what a run will need of MLflow: tracking, and the model registry."""

from __future__ import annotations

import os

from tunegate.finding import Finding
from tunegate.tracking.client import connect, error_code
from tunegate.tracking.uri import TRACKING_VARIABLE, describe_uri

CHECK = "MLflow"


def probe_mlflow(uri: str | None) -> Finding:
    """Read from the tracking server and from its registry.

    Args:
        uri: The tracking URI; None takes MLFLOW_TRACKING_URI.
    """
    address = uri or os.environ.get(TRACKING_VARIABLE, "").strip()
    if not address:
        return Finding(
            CHECK, "warning", "no tracking server is named", "--tracking-uri http://mlflow.mlflow:5000, or tracking.uri"
        )
    if address.startswith("sqlite:"):
        return Finding(
            CHECK, "failure", f"{address} lies on this machine", "--tracking-uri http://… (the server's address)"
        )
    shown = describe_uri(address)
    try:
        client = connect(address)
        client.search_experiments(max_results=1)
    except Exception as error:
        return Finding(CHECK, "failure", f"{shown}: {_first_line(error)}", _mlflow_fix(error_code(error)))
    try:
        found = client.search_registered_models(max_results=1)
    except Exception as error:
        return Finding(
            CHECK,
            "failure",
            f"{shown}: tracking works, but the model registry does not: {_first_line(error)}",
            "run the server on a database: mlflow server --backend-store-uri postgresql://…",
        )
    models = "models are registered there" if found else "no model is registered yet"
    return Finding(CHECK, "ok", f"{shown}: tracking and model registry answer; {models}")


def _mlflow_fix(code: str) -> str:
    if code in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
        return "export MLFLOW_TRACKING_TOKEN=…, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return "check the address (curl URI/health must say OK), and REQUESTS_CA_BUNDLE for a CA of your own"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
