"""What the tests of the chart and of the manifests share: rendering, the Kubernetes API's schemas, house rules."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate.utils
import pytest
import referencing
import yaml
from jsonschema import Draft202012Validator

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "helm" / "tunegate"
MANIFESTS = REPOSITORY / "manifests"
GOLDEN = Path(__file__).parent / "golden"
KUBERNETES_VERSIONS = ("1.30", "1.37")
"""Oldest and newest supported release; Chart.yaml's kubeVersion names the oldest as well."""
UPDATE = "TUNEGATE_UPDATE_GOLDEN"
"""Set to 1 the committed renders are written anew instead of compared."""

CUSTOM = {"TrainingRuntime", "InferenceService", "ServiceMonitor"}
"""Kinds that the Kubernetes API itself does not know; they have checks of their own."""

Object = dict[str, Any]


def read_documents(text: str) -> list[Object]:
    """The objects of a YAML stream; a key given twice is an error, as it is for kubectl in strict mode."""

    class Loader(yaml.CSafeLoader):
        pass

    def mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"given twice: {twice} at {node.start_mark}"
        return dict(loader.construct_pairs(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return [document for document in yaml.load_all(text, Loader) if document]


def case_values(name: str) -> dict[str, Any]:
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())


CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))


def case_namespace(values: dict[str, Any]) -> str:
    return "team-a" if values.get("kfp", {}).get("multiUser") else "kubeflow"


@functools.cache
def _chart() -> Any:
    import helm_python

    return helm_python.Chart.load(CHART)


def render_chart(values: dict[str, Any], name: str = "tunegate", namespace: str = "kubeflow") -> dict[str, str]:
    """Template path to text, by the real Helm engine."""
    rendered = _chart().render(values, name=name, namespace=namespace)
    return {path.removeprefix("tunegate/"): text for path, text in rendered.items() if text.strip()}


@functools.cache
def case_text(name: str) -> str:
    """A case's objects as one YAML stream, in the order of their templates; the way it is committed."""
    values = case_values(name)
    rendered = render_chart(values, namespace=case_namespace(values))
    parts = []
    for path in sorted(rendered):
        if path.endswith(".yaml"):
            body = "\n".join(line.rstrip() for line in rendered[path].strip().splitlines())
            parts.append(f"---\n# Source: {path}\n{body.removeprefix('---').lstrip()}\n")
    return "".join(parts)


@functools.cache
def build_kustomization(folder: Path) -> str:
    """What `kubectl apply -k` would send."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, so kustomize overlays cannot be built")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return done.stdout


def assert_golden(path: Path, text: str) -> None:
    """Compare with the committed file, or write it when `TUNEGATE_UPDATE_GOLDEN=1`."""
    if os.environ.get(UPDATE) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path} is missing; write it with {UPDATE}=1 make cluster-check"
    assert text == path.read_text(), (
        f"the render differs from {path.relative_to(REPOSITORY)}; if that is meant, write it anew with "
        f"{UPDATE}=1 make cluster-check and commit the difference"
    )


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> Draft202012Validator:
    """The API's own schema of a kind, in its strict form (unknown keys are errors)."""
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    try:
        schema = kubernetes_validate.utils.schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    except FileNotFoundError:
        pytest.fail(f"Kubernetes {version} has no {kind} in {api_version}")
    registry = _definitions(version).with_resource("", referencing.Resource.from_contents(schema))
    return Draft202012Validator(schema, registry=registry)


@functools.cache
def _definitions(version: str) -> Any:
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    content = kubernetes_validate.utils.schema_contents(f"{folder}/_definitions.json", version)
    resource = referencing.Resource.from_contents(content)
    return resource @ referencing.Registry()


_VALID: set[str] = set()


def assert_valid(item: Object, version: str) -> None:
    """The object is what this release of the Kubernetes API accepts."""
    key = version + json.dumps(item, sort_keys=True)
    if key in _VALID:
        return
    errors = [
        f"{item['kind']}/{item['metadata'].get('name')} {'.'.join(map(str, e.absolute_path))}: {e.message[:300]}"
        for e in _validator(version, item["kind"], item["apiVersion"]).iter_errors(item)
    ]
    assert not errors, f"Kubernetes {version}:\n" + "\n".join(errors)
    _VALID.add(key)


def assert_training_runtime(item: Object) -> None:
    """Trainer's published models know every key, and its pods are valid pods."""
    from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

    assert item["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    read = TrainerV1alpha1TrainingRuntime.from_dict(item)
    known = json.loads(json.dumps(read.to_dict(), default=str))
    assert _without_empty(known) == _without_empty(item), "Trainer drops a key that it does not know"
    jobs = item["spec"]["template"]["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["node"]
    template = jobs[0]["template"]
    assert template["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    containers = template["spec"]["template"]["spec"]["containers"]
    assert [c["name"] for c in containers] == ["node"], "Trainer injects torchrun's variables into `node`"
    assert "command" not in containers[0], "the TrainJob brings the command"


def _without_empty(value: Any) -> Any:
    """Quantities and ports lose their Python type on the way through the models, an empty mapping its presence."""
    if isinstance(value, dict):
        return {k: _without_empty(v) for k, v in value.items() if v not in (None, {}, [])}
    if isinstance(value, list):
        return [_without_empty(v) for v in value]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def assert_custom(item: Object) -> None:
    """Kinds of other projects."""
    if item["kind"] == "TrainingRuntime":
        assert_training_runtime(item)
    elif item["kind"] == "ServiceMonitor":
        assert item["apiVersion"] == "monitoring.coreos.com/v1"
        assert set(item["spec"]) <= {"selector", "namespaceSelector", "endpoints"}
        assert set(item["spec"]["endpoints"][0]) <= {"port", "path", "interval"}
    else:
        assert item["apiVersion"] == "serving.kserve.io/v1beta1"
        # KServe adds these to a PodSpec (kserve 0.21, V1beta1PredictorSpec); the rest is checked as a pod.
        assert set(item["spec"]) == {"predictor"}


def pod_templates(items: Iterable[Object]) -> Iterator[tuple[str, Object, Object]]:
    """(where, metadata, pod spec) of everything that runs, those of TrainingRuntimes and InferenceServices included."""
    for item in items:
        where = f"{item['kind']}/{item['metadata']['name']}"
        match item["kind"]:
            case "Pod":
                yield where, item["metadata"], item["spec"]
            case "Deployment" | "Job":
                template = item["spec"]["template"]
                yield where, template.get("metadata", {}), template["spec"]
            case "CronJob":
                template = item["spec"]["jobTemplate"]["spec"]["template"]
                yield where, template.get("metadata", {}), template["spec"]
            case "TrainingRuntime":
                for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
                    template = job["template"]["spec"]["template"]
                    yield where, template.get("metadata", {}), template["spec"]
            case "InferenceService":
                predictor = item["spec"]["predictor"]
                spec = {k: v for k, v in predictor.items() if k not in {"minReplicas", "maxReplicas"}}
                yield where, {}, spec


def containers_of(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def assert_restricted(where: str, spec: Object, *, chosen_user: bool = True) -> None:
    """The Pod Security Standard `restricted`, and of our own: read-only root, numeric user, bounded memory.

    Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        assert not spec.get(key), f"{where}: {key}"
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    for volume in spec.get("volumes", []):
        assert set(volume) - {"name"} <= allowed, f"{where}: volume {volume['name']}"
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] is True, where
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, where
    assert isinstance(pod.get("runAsUser"), int) is chosen_user, where
    assert pod.get("runAsUser", 1) > 0, where
    for container in containers_of(spec):
        name = f"{where}/{container['name']}"
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False, name
        assert own["readOnlyRootFilesystem"] is True, name
        assert own["capabilities"] == {"drop": ["ALL"]}, name
        assert not any("hostPort" in port for port in container.get("ports", [])), name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert "memory" in container["resources"]["limits"], name
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert "/tmp" in mounts, f"{name}: nothing to write to"
        assert {"name": "HOME", "value": "/tmp"} in container.get("env", []) or "seaweedfs" in name, name
        assert set(mounts.values()) <= {v["name"] for v in spec["volumes"]}, name


def assert_consistent(items: list[Object], *, outside: Iterable[str] = ()) -> None:
    """Every reference from one object to another finds it, or is named in `outside` (`Kind/name`)."""
    there = {f"{i['kind']}/{i['metadata']['name']}" for i in items} | set(outside)
    pods = [(where, meta.get("labels", {})) for where, meta, _ in pod_templates(items)]

    def need(where: str, kind: str, name: str) -> None:
        assert f"{kind}/{name}" in there, f"{where} refers to {kind}/{name}, which is not there"

    for where, _, spec in pod_templates(items):
        need(where, "ServiceAccount", spec.get("serviceAccountName", "default"))
        for secret in spec.get("imagePullSecrets", []):
            need(where, "Secret", secret["name"])
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                need(where, "ConfigMap", volume["configMap"]["name"])
            if "secret" in volume:
                need(where, "Secret", volume["secret"]["secretName"])
            if "persistentVolumeClaim" in volume:
                need(where, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        for container in containers_of(spec):
            for source in container.get("envFrom", []):
                for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                    if key in source and not source[key].get("optional"):
                        need(where, kind, source[key]["name"])
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    need(where, "Secret", reference["name"])
    for item in items:
        where = f"{item['kind']}/{item['metadata']['name']}"
        match item["kind"]:
            case "Deployment":
                labels = item["spec"]["template"]["metadata"]["labels"]
                assert item["spec"]["selector"]["matchLabels"].items() <= labels.items(), f"{where} misses its own pods"
            case "Service":
                selector = item["spec"]["selector"]
                assert any(selector.items() <= labels.items() for _, labels in pods), f"{where} selects no pod"
            case "PodDisruptionBudget":
                selector = item["spec"]["selector"]["matchLabels"]
                assert any(selector.items() <= labels.items() for _, labels in pods), f"{where} selects no pod"
            case "Ingress":
                for rule in item["spec"]["rules"]:
                    for path in rule["http"]["paths"]:
                        need(where, "Service", path["backend"]["service"]["name"])
            case "RoleBinding":
                need(where, item["roleRef"]["kind"], item["roleRef"]["name"])
                for subject in item["subjects"]:
                    if subject["kind"] == "ServiceAccount":
                        need(where, "ServiceAccount", subject["name"])
            case "ServiceMonitor":
                selector = item["spec"]["selector"]["matchLabels"]
                services = [s["metadata"]["labels"] for s in items if s["kind"] == "Service"]
                assert any(selector.items() <= labels.items() for labels in services), f"{where} selects no service"


def rules_of(items: Iterable[Object], suffix: str) -> list[Object]:
    """The rules of all Roles whose names end with `suffix`."""
    return [
        rule
        for item in items
        if item["kind"] == "Role" and item["metadata"]["name"].endswith(suffix)
        for rule in item["rules"]
    ]


def assert_least_privilege(items: list[Object]) -> None:
    """No stars, nothing cluster-wide, no secrets by the dozen, nothing by which a pod could give itself more."""
    cluster_wide = {"ClusterRole", "ClusterRoleBinding", "Namespace", "CustomResourceDefinition", "PriorityClass"}
    for item in items:
        assert item["kind"] not in cluster_wide, "two releases would get into each other's way"
        if item["kind"] != "Role":
            continue
        for rule in item["rules"]:
            values = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in values, rule
            if {"secrets", "configmaps"} & set(rule["resources"]):
                assert rule["verbs"] == ["get"], rule
                assert rule["resourceNames"], rule
            if rule["verbs"] == ["use"]:  # Kubeflow asks about it; Kubernetes itself gives nothing for it
                assert rule["resources"] == ["serviceaccounts"] and len(rule["resourceNames"]) == 1, rule
                continue
            writes = set(rule["verbs"]) - {"get", "list", "watch"}
            if writes and rule["apiGroups"] == [""]:
                assert rule["resources"] == ["persistentvolumeclaims"], rule
            forbidden = {"roles", "rolebindings", "serviceaccounts", "pods/exec", "deployments"}
            assert not forbidden & set(rule["resources"]), rule


PROVIDER_KEYS = {"endpoint", "credentials", "region", "disableSSL", "forcePathStyle", "maxRetries"}
"""Keys of S3ProviderDefault in Kubeflow's backend/src/v2/config/s3.go."""


def assert_launcher(item: Object) -> None:
    """What Kubeflow's launcher reads: it ignores keys that it does not know, so a slip would go unnoticed."""
    assert item["metadata"]["name"] == "kfp-launcher"
    data = item["data"]
    assert set(data) == {"defaultPipelineRoot", "providers"}
    assert re.match(r"^s3://[^/?]+/[^?]+$", data["defaultPipelineRoot"])
    providers = yaml.safe_load(data["providers"])
    assert set(providers) == {"s3"}
    assert set(providers["s3"]) == {"default"}
    default = providers["s3"]["default"]
    assert set(default) <= PROVIDER_KEYS
    assert isinstance(default["disableSSL"], bool)
    assert isinstance(default["forcePathStyle"], bool)
    assert "://" not in default["endpoint"]
    credentials = default["credentials"]
    assert isinstance(credentials["fromEnv"], bool)
    if credentials["fromEnv"]:
        assert set(credentials) == {"fromEnv"}
    else:
        assert set(credentials["secretRef"]) == {"secretName", "accessKeyKey", "secretKeyKey"}
