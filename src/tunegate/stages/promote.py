"""Promote: move the alias `champion` to a version whose evidence allows it."""

from __future__ import annotations

import getpass
from pathlib import Path

from tunegate.stages.context import Outcome, StageContext, run_stage
from tunegate.stages.versions import record_balance


def run(*, spec: Path, version: str) -> str:
    """Promote a registered version.

    Args:
        spec: The spec artifact.
        version: The version's number.

    Returns:
        The alias that the version now carries.
    """

    def body(context: StageContext) -> Outcome:
        from tunegate.registry.registry import promote

        promotion = promote(
            context.tracking_uri,
            context.spec.registry.model_name,
            version,
            who=f"pipeline run {context.run.run_id} ({getpass.getuser()})",
            why="the gates said PROMOTE and the spec asks for promotion",
        )
        was = f" (was version {promotion.previous})" if promotion.previous else ""
        return Outcome(
            summary=f"{promotion.name} version {promotion.version} is champion{was}",
            values={"name": promotion.name, "version": promotion.version, "alias": "champion"},
            files=record_balance(context),
        )

    record = run_stage(
        "promote",
        spec,
        inputs={},
        outputs={},
        sections=("registry",),
        body=body,
        cacheable=False,
        arguments={"version": version},
    )
    return record.values["alias"]
