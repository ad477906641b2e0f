"""Run by `helm test` inside the cluster: Kubeflow, MLflow and S3 answer, and S3 can be written to."""

import os
import sys
import urllib.request

from tunegate.finding import Finding
from tunegate.storage.probe import probe_s3
from tunegate.tracking.probe import probe_mlflow


def probe_kubeflow() -> Finding:
    """The API's health, which needs no rights."""
    url = os.environ["KF_PIPELINES_ENDPOINT"].rstrip("/") + "/apis/v2beta1/healthz"
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return Finding("Kubeflow Pipelines", "ok", f"{url} answers {answer.status}")
    except OSError as error:
        return Finding(
            "Kubeflow Pipelines", "failure", f"{url}: {error}", "kfp.namespace or kfp.endpoint in the values"
        )


# The account of this pod may write below that prefix only.
root = os.environ["TUNEGATE_S3_ROOT"] + "/helm-test"
findings = [probe_kubeflow(), probe_mlflow(None), probe_s3(root)]
for finding in findings:
    print(f"{finding.level}  {finding.check}: {finding.message}" + (f"\n    fix: {finding.fix}" if finding.fix else ""))
sys.exit(any(finding.level == "failure" for finding in findings))
