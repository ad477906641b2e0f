"""Where runs, artifacts and checkpoints are kept."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from tunegate.section import Section, refuse_credentials


class StorageSpec(Section):
    """Where a run keeps its records and artifacts. Credentials come from the usual AWS chain, never from here."""

    root: str = ".tunegate"
    """A folder, or `s3://bucket/prefix`. With S3 every stage's artifacts are published there."""

    reuse: Literal["run", "any", "never"] = "run"
    """Which finished stages with the same inputs, spec and code are taken over instead of run again: those of this
    run only (`run`: what `tunegate resume` needs), those of any run in this storage (`any`), or none (`never`)."""

    mirror_checkpoints: bool = True
    """With a root on S3, copy every training checkpoint there as well, so that a pod that is tried again on another
    node goes on from it. Costs the upload of about 12 bytes a trained parameter for each checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        if isinstance(value, dict):
            refuse_credentials("root", value.get("root"))
        return value
