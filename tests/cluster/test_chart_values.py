"""The chart's values: documented, typed, and refused with a message that helps when they are wrong."""

import copy
import re

import pytest
import yaml
from kubernetes_support import (
    CASES,
    CHART,
    KUBERNETES_VERSIONS,
    REPOSITORY,
    assert_golden,
    case_values,
    read_documents,
    render_chart,
    rules_of,
)

VALUES = (CHART / "values.yaml").read_text()


def leaves(values, path=()):
    """Dotted keys whose value is no mapping of further settings."""
    for key, value in values.items():
        if isinstance(value, dict) and value and (*path, key) not in FREE:
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


FREE = {("publish", "resources"), ("audit", "resources"), ("mlflow", "resources"), ("trainer", "resources")} | {
    ("jobs", "podLabels"),
    ("mlflow", "podLabels"),
    ("trainer", "podLabels"),
}
"""Mappings with a default that are one setting."""


def documented():
    """Dotted key to the description in the comment above it."""
    stack: list[tuple[int, str]] = []
    found, comment = {}, []
    for line in VALUES.splitlines():
        text = line.strip()
        if text.startswith("# -- "):
            comment = [text[5:]]
        elif text.startswith("#"):
            if comment:
                comment.append(text.lstrip("# "))
        elif match := re.match(r"^( *)([A-Za-z0-9]+):", line):
            indent = len(match[1])
            stack = [entry for entry in stack if entry[0] < indent] + [(indent, match[2])]
            if comment:
                found[".".join(key for _, key in stack)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found


def table():
    """The README's table of values."""
    descriptions = documented()
    lines = ["| key | default | what it is |", "|---|---|---|"]
    for key, default in leaves(yaml.safe_load(VALUES)):
        shown = yaml.safe_dump(default, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
        lines.append(f"| `{key}` | `{shown}` | {descriptions[key].replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def test_every_value_is_described():
    keys = [key for key, _ in leaves(yaml.safe_load(VALUES))]
    assert sorted(documented()) == sorted(keys)


def test_the_readme_has_the_table_of_the_values():
    readme = CHART / "README.md"
    head, rest = readme.read_text().split("<!-- values -->\n")
    tail = rest.split("<!-- /values -->")[1]
    assert_golden(readme, f"{head}<!-- values -->\n{table()}\n<!-- /values -->{tail}")


def schema():
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        return chart.schema


def test_the_schema_has_exactly_the_values_and_refuses_others():
    def compare(values, node, path):
        assert node["additionalProperties"] is False, path
        known = set(node["properties"]) - {"global"}
        assert known == set(values), path
        for key, value in values.items():
            if isinstance(value, dict) and value and (*path, key) not in FREE:
                compare(value, node["properties"][key], (*path, key))

    compare(yaml.safe_load(VALUES), schema(), ())

    def closed(node, path):
        if isinstance(node, dict):
            if "properties" in node:
                assert node["additionalProperties"] is False, path
            for key, child in node.items():
                closed(child, f"{path}/{key}")

    closed(schema(), "")


def test_the_chart_is_of_this_version_and_of_these_images():
    from tunegate.components.image import DEFAULT_IMAGE

    import tunegate

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert str(chart["appVersion"]) == tunegate.__version__
    image = yaml.safe_load(VALUES)["image"]
    assert f"{image['repository']}:{chart['appVersion']}" == DEFAULT_IMAGE
    assert chart["kubeVersion"] == f">={KUBERNETES_VERSIONS[0]}.0-0"


def test_the_schema_of_runs_is_that_of_the_run_spec():
    from tunegate.resources import RetrySpec, StageResources, TolerationSpec

    stage = schema()["definitions"]["stage"]["properties"]
    assert set(stage) == set(StageResources.model_fields)
    assert set(stage["tolerations"]["items"]["properties"]) == set(TolerationSpec.model_fields)
    assert set(stage["retry"]["properties"]) == set(RetrySpec.model_fields)
    from typing import get_args

    from tunegate.resources import StageName

    assert set(schema()["properties"]["runs"]["properties"]["stages"]["properties"]) == set(get_args(StageName))


def test_the_audited_model_is_the_one_that_the_spec_registers():
    from tunegate.registry.config import RegistrySpec

    assert yaml.safe_load(VALUES)["audit"]["modelName"] == RegistrySpec().model_name


GOOD = {"s3": {"bucket": "tunegate"}, "mlflow": {"database": {"host": "pg", "existingSecret": "pg"}}}


def good(**changes):
    """Working values with some changed: `good(mlflow__database__type="x")`."""
    values = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return values


def test_the_good_values_are_good():
    assert render_chart(good())


WRONG_SHAPE = [
    (good(mlfow={}), "mlfow"),
    (good(s3__bukcet="x"), "bukcet"),
    (good(mlflow__database__password="hunter2"), "password"),
    (good(s3__accessKey="AKIA"), "accessKey"),
    (good(s3__bucket="Not_A_Bucket"), "/s3/bucket"),
    (good(s3__bucket="s3://tunegate"), "/s3/bucket"),
    (good(s3__endpoint="seaweedfs:9000"), "/s3/endpoint"),
    (good(s3__endpoint="https://user:pw@s3.example.com"), "/s3/endpoint"),
    (good(mlflow__replicas=0), "/mlflow/replicas"),
    (good(mlflow__replicas="2"), "/mlflow/replicas"),
    (good(mlflow__database__type="mysql"), "/mlflow/database/type"),
    (good(mlflow__database__sslMode="on"), "/mlflow/database/sslMode"),
    (good(mlflow__resources={"limit": {"memory": "1Gi"}}), "limit"),
    (good(mlflow__resources={"limits": {"memory": "one gigabyte"}}), "/mlflow/resources/limits/memory"),
    (good(image__digest="sha256:abc"), "/image/digest"),
    (good(image__pullPolicy="Sometimes"), "/image/pullPolicy"),
    (good(podSecurity__runAsUser=0), "/podSecurity/runAsUser"),
    (good(audit__schedule="every hour"), "/audit/schedule"),
    (good(trainer__accelerator="gpu"), "/trainer/accelerator"),
    (good(runs__training={"gpus": 4}), "gpus"),
    (good(runs__stages={"pp0": {}}), "pp0"),
    (good(configuration__extra={"OMP_NUM_THREADS": 1}), "/configuration/extra/OMP_NUM_THREADS"),
    (good(networkPolicy__s3To=[{"cidr": "10.0.0.0/8"}]), "cidr"),
    (good(jobs__tolerations=[{"key": "gpu", "effect": "NoExec"}]), "effect"),
]


@pytest.mark.parametrize(("values", "named"), WRONG_SHAPE, ids=[named for _, named in WRONG_SHAPE])
def test_values_of_the_wrong_shape_are_refused_by_name(values, named):
    import helm_python

    with pytest.raises(helm_python.HelmError) as refused:
        render_chart(values)
    assert named in str(refused.value)
    assert "tunegate:" in str(refused.value)


WRONG_TOGETHER = [
    (good(s3__bucket=""), "kubeflow", "s3.bucket: no bucket is given"),
    (good(s3__endpoint="http://minio:9000"), "kubeflow", "s3.existingSecret: http://minio:9000 is not AWS"),
    (good(), "team-a", "kfp.multiUser: single-user Kubeflow runs every pipeline in its own namespace"),
    (good(kfp__multiUser=True), "kubeflow", "kfp.multiUser: multi-user Kubeflow runs pipelines in profile namespaces"),
    (good(mlflow__database__host=""), "kubeflow", "mlflow.database.type=sqlite"),
    (good(mlflow__database__existingSecret=""), "kubeflow", "keys username and password"),
    (good(mlflow__database__sslMode="verify-full"), "kubeflow", "ca.existingConfigMap"),
    (good(mlflow__database={"type": "sqlite"}, mlflow__replicas=2), "kubeflow", "2 pods cannot share an SQLite file"),
    (good(mlflow__enabled=False), "kubeflow", "tracking.uri: without mlflow.enabled"),
    (good(tracking__uri="https://mlflow.example.com"), "kubeflow", "set mlflow.enabled=false"),
    (good(mlflow__ingress__enabled=True), "kubeflow", "mlflow.ingress.host"),
    (good(mlflow__metrics__serviceMonitor__enabled=True), "kubeflow", "mlflow.metrics.enabled=true"),
    (good(serviceAccounts__runner__create=False), "kubeflow", "serviceAccounts.runner.name"),
    (good(configuration__extra={"HF_TOKEN": "hf_x"}), "kubeflow", "configuration.extra.HF_TOKEN: looks like a"),
    (good(mlflow__extraEnv={"DB_PASSWORD": "x"}), "kubeflow", "mlflow.extraEnv.DB_PASSWORD: looks like a credential"),
    (good(runs__accelerator="cuda", image__digest=f"sha256:{1:064d}"), "kubeflow", "image.cudaDigest: image.digest"),
    (
        good(mlflow__enabled=False, tracking={"uri": "https://m", "existingSecret": "t"}),
        "kubeflow",
        "tracking.secretKeys",
    ),
    (good(runs__stages={"sft": {"nodes": 3}}), "kubeflow", "trainer.enabled: runs ask for training on 3 nodes"),
    (good(runs__training={"nodes": 2}), "kubeflow", "trainer.enabled: runs ask for training on 2 nodes"),
    (good(trainer__enabled=True, image__digest=f"sha256:{1:064d}"), "kubeflow", "image.cudaDigest"),
]


@pytest.mark.parametrize(
    ("values", "namespace", "message"), WRONG_TOGETHER, ids=[message[:40] for *_, message in WRONG_TOGETHER]
)
def test_values_that_cannot_work_together_are_refused_with_the_way_out(values, namespace, message):
    import helm_python

    with pytest.raises(helm_python.HelmRenderError) as refused:
        render_chart(values, namespace=namespace)
    assert message in str(refused.value)
    assert "The values cannot work:" in str(refused.value)


def test_all_mistakes_are_named_at_once():
    import helm_python

    with pytest.raises(helm_python.HelmRenderError) as refused:
        render_chart({}, namespace="elsewhere")
    assert str(refused.value).count("\n  - ") == 4


def permission_rows():
    """(role, api group, resource, verbs) of every row of the table in docs/cluster/permissions.md."""
    rows = set()
    for line in (REPOSITORY / "docs" / "cluster" / "permissions.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] in {"runner", "runner-user", "publisher"}:
            role, group, resource, verbs, _, why = cells
            assert why, line
            rows.add((role, "" if group == "core" else group, resource, verbs))
    return rows


def test_the_table_of_permissions_is_complete_and_has_nothing_else():
    rendered = set()
    for case in CASES:
        if case == "customized":  # has rules of its own
            continue
        values = case_values(case)
        namespace = "team-a" if values.get("kfp", {}).get("multiUser") else "kubeflow"
        text = "".join(f"---\n{b}\n" for p, b in render_chart(values, namespace=namespace).items() if "rbac" in p)
        items = read_documents(text)
        for role in ("runner", "runner-user", "publisher"):
            for rule in rules_of(items, f"-{role}"):
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        rendered.add((role, group, resource, ", ".join(rule["verbs"])))
    assert permission_rows() == rendered
