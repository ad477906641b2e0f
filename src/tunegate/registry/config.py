"""The `registry` section of the run spec."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from tunegate.section import Section


class RegistrySpec(Section):
    """Under which name candidates are registered, and whether a good one becomes champion by itself."""

    model_name: str = Field(default="tunegate-model", min_length=1, max_length=200, pattern=r"^[^/:@%\s][^/:@%]*$")
    """Name of the registered model in MLflow; no slash, colon, @ or percent sign, since it is part of
    `models:/NAME@alias`."""

    promote: bool = False
    """Move the alias `champion` to the new version when the gates say PROMOTE. False registers only; a person then
    runs `tunegate promote`."""

    license: str | None = Field(default=None, min_length=1, max_length=200)
    """Licence under which the model may be used (an SPDX identifier such as `apache-2.0`, or a name), for the model
    card; unset: that of the base model where it is known."""

    approvals: int = Field(default=0, ge=0, le=10)
    """How many different persons must approve a version before it can be promoted (`tunegate registry approve`).
    With 1 or more, a version whose verdict is HOLD can be promoted too: the approvals are the decision."""

    @model_validator(mode="after")
    def _persons_decide_or_the_pipeline(self) -> Self:
        if self.promote and self.approvals:
            raise ValueError(
                f"promote: true moves the alias before anybody could give one of the {self.approvals} approvals; set "
                "promote to false and run `tunegate promote` when they are given, or set approvals to 0"
            )
        return self
