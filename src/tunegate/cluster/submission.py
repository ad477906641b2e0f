"""From a run spec on this machine to the parameters of a run on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunegate.config import TuneSpec, dump_spec
from tunegate.errors import SpecError
from tunegate.storage.stores import open_store

_DATA_KINDS = ("sft", "preferences", "ratings", "prompts", "evaluation")


def storage_root(given: str | None, spec: TuneSpec | None, parameters: Mapping[str, str]) -> str:
    """The S3 prefix that a run on a cluster keeps its records and artifacts under.

    Args:
        given: The command's option, if any.
        spec: The run spec, if any.
        parameters: Parameters given by hand; `storage_root` among them wins.

    Raises:
        SpecError: None of them names a place on S3. KFP's own pipeline root cannot stand in for it: the backend passes
            the placeholder `{{$.pipeline_root}}` on as it is (`backend/src/v2/driver/resolve.go`).
    """
    root = parameters.get("storage_root") or given or (spec.storage.root if spec else "")
    if not root.startswith("s3://"):
        raise SpecError(
            "a run on a cluster needs a place on S3 for its records",
            key="--storage-root",
            value=root or None,
            fix="give --storage-root s3://bucket/prefix, or set TUNEGATE_ROOT, or storage.root in the spec",
        )
    return root.rstrip("/")


def check_reachable(spec: TuneSpec) -> None:
    """Check that nothing in the spec lies on this machine, where pods cannot see it.

    Raises:
        SpecError: Sources or the model are local; all of them are named.
    """
    findings = []
    for kind in _DATA_KINDS:
        for number, source in enumerate(getattr(spec.data, kind)):
            if source.uri.startswith("/"):
                findings.append(f"data.{kind}[{number}].uri: {source.uri}")
    bias, capability = spec.evaluation.bias, spec.evaluation.capability
    files = {
        "evaluation.bias.questions": bias.questions,
        "evaluation.bias.template_files": bias.template_files,
        "evaluation.capability.task_files": capability.task_files,
    }
    findings += [f"{key}: {uri}" for key, uris in files.items() for uri in uris if uri.startswith("/")]
    if spec.model.source.startswith("/"):
        findings.append(f"model.source: {spec.model.source}")
    if spec.tracking.uri and spec.tracking.uri.startswith("sqlite:"):
        findings.append(f"tracking.uri: {spec.tracking.uri}")
    if findings:
        raise SpecError(
            "these lie on this machine, where the cluster cannot see them:\n  - " + "\n  - ".join(findings),
            key="SPEC",
            fix="copy the data to S3 (aws s3 cp) and name it s3://…; for MLflow give the server's address",
        )


def publish_spec(spec: TuneSpec, root: str) -> str:
    """Put a spec on S3 under its own digest, so that it never changes, and return its URI.

    Raises:
        StorageError: S3 cannot be written.
    """
    key = f"specs/{spec.digest()[:16]}.yaml"
    open_store(root).put(key, dump_spec(spec).encode())
    return f"{root}/{key}"


def run_parameters(
    *,
    spec: TuneSpec | None,
    spec_given: bool,
    profile: str | None,
    root: str,
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """The pipeline parameters of a run; what was given by hand wins.

    Args:
        spec: The resolved spec, if a file, a profile or overrides were given.
        spec_given: Whether the spec says more than a profile does, and so has to be published.
        profile: Name of the profile that stands for the spec otherwise.
        root: Storage root.
        parameters: Parameters given by hand.

    Raises:
        SpecError: The spec names things that pods cannot see.
        StorageError: The spec cannot be put on S3.
    """
    values: dict[str, Any] = {"storage_root": root}
    if spec is not None and spec_given:
        check_reachable(spec)
        values["spec_uri"] = publish_spec(spec, root)
        values["run_name"] = spec.name
    elif profile:
        values["profile"] = profile
    return {**values, **parameters}


def read_resources(path: Path) -> Any:
    """Read a `resources` section from a file of its own.

    Raises:
        SpecError: The file is missing or wrong; every mistake is named.
    """
    from pydantic import ValidationError

    from tunegate.config import read_spec_mapping
    from tunegate.resources import ResourcesSpec

    try:
        content = read_spec_mapping(path.read_text(), str(path))
    except OSError as error:
        raise SpecError(
            f"the file cannot be read: {error.strerror or error}", key="--resources", value=str(path)
        ) from None
    try:
        return ResourcesSpec.model_validate(content.get("resources", content))
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(p) for p in item['loc']) or 'resources'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise SpecError("the resources have mistakes:\n  - " + "\n  - ".join(lines), key=str(path)) from None
