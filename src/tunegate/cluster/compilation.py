"""Compile the pipelines for a cluster: resources, image and defaults put in, as IR YAML or Kubernetes resources."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import yaml

from tunegate import __version__
from tunegate.cluster.pods import apply_resources, resource_parameters
from tunegate.errors import SpecError
from tunegate.resources import ResourcesSpec
from tunegate.storage.manifest import digest_json

DEFAULT_PIPELINE = "instruction-tuning"
# libyaml reads a compiled pipeline ten times faster; it is not in every build of PyYAML.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PARAMETER_MEANING = {
    "cpu": "Cores that the stage requests.",
    "memory": "Memory that the stage requests and may use at most.",
    "accelerator": "Resource name of the accelerator that the stage requests.",
    "accelerators": "Number of accelerators that the stage requests.",
    "node_selector": "Labels that the stage's node must have.",
    "tolerations": "Taints that the stage's pod tolerates.",
}
# KFP stores parameter values in a pod's arguments; the driver refuses longer ones.
_MAX_PARAMETER_BYTES = 10_000


@dataclass(frozen=True)
class CompiledPipeline:
    """A pipeline ready for upload."""

    name: str
    """Name of the pipeline, e.g. `instruction-tuning`."""

    ir: str
    """IR YAML; a second document holds what is specific to Kubernetes."""

    digest: str
    """sha256 of the content: two pipelines with equal digests do the same on a cluster."""

    description: str

    @property
    def version(self) -> str:
        """Name of the version: pipeline, code version, digest; a valid name of a Kubernetes object as well."""
        code = re.sub(r"[^a-z0-9.]+", "-", __version__.lower()).strip("-.")
        return f"{self.name}-{code}-{self.digest[:12]}"

    @property
    def parameters(self) -> dict[str, str]:
        """Type of each parameter (`STRING`, `NUMBER_INTEGER`, …) by name."""
        return parameter_types(load_documents(self.ir)[0])


def pipeline_names() -> list[str]:
    """Names of all pipelines that come with Tunegate."""
    folders = resources.files("tunegate.pipelines").iterdir()
    return sorted(f.name.replace("_", "-") for f in folders if (f / "pipeline.yaml").is_file())


def compile_pipeline(
    name: str = DEFAULT_PIPELINE,
    *,
    spec: ResourcesSpec | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> CompiledPipeline:
    """Compile a pipeline for a cluster.

    Args:
        name: Name of the pipeline.
        spec: The `resources` section.
        defaults: Defaults of parameters in place of the pipeline's own, e.g. `{"storage_root": "s3://…"}`, as strings
            or as values of the parameter's type.

    Returns:
        The pipeline, checked against KFP's own protobuf definition.

    Raises:
        SpecError: There is no such pipeline or parameter, or a value is not of the parameter's type.
    """
    from kfp import compiler

    known = pipeline_names()
    if name not in known:
        raise SpecError("there is no such pipeline", key="PIPELINE", value=name, fix=f"one of {', '.join(known)}")
    folder = name.replace("-", "_")
    original = getattr(import_module(f"tunegate.pipelines.{folder}.pipeline"), folder)
    pipeline = _with_resources(original, spec or ResourcesSpec())
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        if defaults:
            types = parameter_types(load_documents(path.read_text())[0])
            values = coerce_parameters(types, defaults)
            compiler.Compiler().compile(pipeline, str(path), pipeline_parameters=values)
        ir = path.read_text()
    documents = load_documents(ir)
    check_ir(documents)
    return CompiledPipeline(name=name, ir=ir, digest=digest_json(documents), description=pipeline.description or "")


def _with_resources(original: Any, spec: ResourcesSpec) -> Any:
    """The same pipeline whose tasks get `spec`, with the parameters of `resource_parameters` added."""
    from kfp import dsl
    from kfp.dsl.pipeline_context import Pipeline

    body: Callable[..., None] = original.pipeline_func
    added = resource_parameters(spec)
    signature = inspect.signature(body)
    clash = added.keys() & signature.parameters.keys()
    if clash:
        raise SpecError(
            f"the pipeline has a parameter {sorted(clash)[0]} of its own",
            key="resources.parameters",
            value=True,
            fix="set resources.parameters to false",
        )

    @functools.wraps(body)
    def with_resources(*channels: Any) -> None:
        given = dict(zip([*signature.parameters, *added], channels, strict=True))
        body(**{name: given[name] for name in signature.parameters})
        apply_resources(Pipeline.get_default_pipeline().tasks, spec, {name: given[name] for name in added})

    # kfp reads parameters, types and descriptions off the function, so they are added where it looks.
    extra = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=type(value))
        for name, value in added.items()
    ]
    with_resources.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *extra]
    )
    with_resources.__annotations__ = {**body.__annotations__, **{n: type(v) for n, v in added.items()}}
    with_resources.__doc__ = _document(body.__doc__ or "", added)
    info = original.pipeline_spec.pipeline_info
    return dsl.pipeline(
        with_resources, name=info.name, display_name=info.display_name or None, description=info.description or None
    )


def _document(docstring: str, added: Iterable[str]) -> str:
    """The docstring with a line for each added parameter in its Args section."""
    lines = inspect.cleandoc(docstring).splitlines()
    for name in added:
        stage, _, kind = name.partition("_")
        lines.append(f"    {name}: {_PARAMETER_MEANING[kind]} ({stage})")
    return "\n".join(lines)


def load_documents(ir: str) -> list[dict[str, Any]]:
    """The documents of an IR YAML: the pipeline spec and, if there is one, the platform spec."""
    return [document for document in yaml.load_all(ir, Loader=_LOADER) if document]


def check_ir(documents: list[dict[str, Any]]) -> None:
    """Check a compiled pipeline against KFP's protobuf definitions, as the API server does on upload.

    Raises:
        SpecError: A field is unknown or has the wrong type.
    """
    from google.protobuf import json_format  # type: ignore[import-untyped]
    from kfp.kubernetes import kubernetes_executor_config_pb2
    from kfp.pipeline_spec import pipeline_spec_pb2

    try:
        json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        for platform in documents[1:]:
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
            executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
            for executor in executors.values():
                json_format.ParseDict(executor, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    except (json_format.ParseError, KeyError) as error:
        raise SpecError(
            f"the compiled pipeline is not what Kubeflow Pipelines takes: {error}",
            key="pipeline",
            fix="use the kfp version that Tunegate asks for (pip install --upgrade tunegate)",
        ) from error


def kubernetes_manifests(compiled: CompiledPipeline, *, namespace: str | None = None) -> str:
    """The pipeline as `Pipeline` and `PipelineVersion` resources, for KFP with Kubernetes as its pipeline store.

    Args:
        compiled: The pipeline.
        namespace: Namespace of the resources; None leaves it to `kubectl apply --namespace`.
    """
    documents = load_documents(compiled.ir)
    info = documents[0]["pipelineInfo"]
    place = {"namespace": namespace} if namespace else {}
    title = info.get("displayName") or compiled.name
    kind = {"apiVersion": "pipelines.kubeflow.org/v2beta1"}
    pipeline = {
        **kind,
        "kind": "Pipeline",
        "metadata": {"name": compiled.name, **place},
        "spec": {"displayName": title, "description": compiled.description},
    }
    version = {
        **kind,
        "kind": "PipelineVersion",
        "metadata": {"name": compiled.version, **place},
        "spec": {
            "pipelineName": compiled.name,
            "displayName": compiled.version,
            "description": compiled.description,
            "pipelineSpec": documents[0],
            **({"platformSpec": documents[1]} if len(documents) > 1 else {}),
        },
    }
    return yaml.safe_dump_all([pipeline, version], sort_keys=False)


def parameter_types(pipeline_spec: Mapping[str, Any]) -> dict[str, str]:
    """Type of each parameter of a pipeline spec (IR as a mapping), by name."""
    definitions = pipeline_spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    return {name: definition["parameterType"] for name, definition in definitions.items()}


def coerce_parameters(types: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check parameter values against a pipeline and turn strings into values of the parameter's type.

    Args:
        types: Type of each parameter, see `parameter_types`.
        given: Values by name; strings are read as what the parameter's type asks for.

    Raises:
        SpecError: A parameter is unknown, a value has the wrong type or is too long.
    """
    values = {}
    for name, value in given.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(sorted(types))}"
            raise SpecError("the pipeline has no such parameter", key=f"-p {name}", fix=hint)
        values[name] = _coerce(name, value, types[name])
        if len(json.dumps(values[name]).encode()) > _MAX_PARAMETER_BYTES:
            raise SpecError(
                f"the value is longer than the {_MAX_PARAMETER_BYTES} bytes that Kubeflow takes",
                key=f"-p {name}",
                fix="put it into a spec file and pass that: tunegate cluster run SPEC.yaml",
            )
    return values


def _coerce(name: str, value: Any, kind: str) -> Any:
    readers: dict[str, tuple[Callable[[Any], Any], str]] = {
        "STRING": (str, "text"),
        "NUMBER_INTEGER": (_integer, "a whole number"),
        "NUMBER_DOUBLE": (float, "a number"),
        "BOOLEAN": (_boolean, "true or false"),
        "STRUCT": (_mapping, "a mapping, e.g. '{ppo: {updates: 40}}'"),
        "LIST": (_list, "a list, e.g. '[a, b]'"),
    }
    read, wanted = readers[kind]
    try:
        return read(value)
    except (TypeError, ValueError, yaml.YAMLError):
        raise SpecError(f"the parameter wants {wanted}", key=f"-p {name}", value=value) from None


def _integer(value: Any) -> int:
    number = float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _boolean(value: Any) -> bool:
    content = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(content, bool):
        raise ValueError
    return content


def _mapping(value: Any) -> dict[str, Any]:
    content = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(content, dict):
        raise ValueError
    return content


def _list(value: Any) -> list[Any]:
    content = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(content, list):
        raise ValueError
    return content


def parse_parameters(assignments: Iterable[str]) -> dict[str, str]:
    """Turn `["ppo_steps=40"]` into a mapping.

    Raises:
        SpecError: An assignment has no `=`, or a name is given twice.
    """
    values: dict[str, str] = {}
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise SpecError("a parameter is written key=value", key="-p", value=text, fix="-p ppo_steps=40")
        if name.strip() in values:
            raise SpecError("the parameter is given twice", key=f"-p {name.strip()}", value=value)
        values[name.strip()] = value
    return values
