"""The balance over versions as the stages leave it: a record for the report, a picture in MLflow."""

from __future__ import annotations

from tunegate.errors import TunegateError
from tunegate.registry.balance import VersionBalance
from tunegate.stages.context import StageContext

BALANCE_FILE = "balance.json"
PICTURE_FILE = "balance.svg"


def record_balance(context: StageContext) -> dict[str, bytes]:
    """Read the registered model's balance and log its picture; a failure is a remark, since nothing depends on it.

    Args:
        context: Of a stage that has just changed the registry.

    Returns:
        Files for the run's records.
    """
    from tunegate.registry.registry import balance

    try:
        found = balance(context.tracking_uri, context.spec.registry.model_name)
    except TunegateError as error:
        context.observer.note(f"the balance over versions was not drawn: {error}")
        return {}
    parent, picture = parent_run(context), draw_versions(found)
    if picture is not None and parent is not None:
        context.tracker.log_text(parent, picture, PICTURE_FILE)
    return {BALANCE_FILE: found.model_dump_json(indent=2).encode()}


def parent_run(context: StageContext) -> str | None:
    """The MLflow run of the whole pipeline run, which gets its report when it ends."""
    record = context.run.read_run()
    return None if record is None else record.mlflow_run_id


def draw_versions(found: VersionBalance) -> str | None:
    """The balance as an SVG file; None when there is no version to show."""
    from tunegate.report.balance import versions_file
    from tunegate.report.reading_versions import read_versions
    from tunegate.report.wording import VERSION_AXES, version_notes

    versions = read_versions(found.model_dump(mode="json"))
    if versions is None:
        return None
    return versions_file(
        f"{found.name}: balance over versions", versions.points, *VERSION_AXES, version_notes(versions)
    )
