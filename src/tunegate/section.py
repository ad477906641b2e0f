"""The base of every section of the run spec."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of `TuneSpec`: unknown keys are errors, values are checked on assignment, instances are frozen.

    Each stage owns its section: the class lives in the `config.py` of the room it configures, every field carries a
    `Field(description=...)` with its unit, and the defaults are what we would recommend.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


def refuse_credentials(key: str, uri: Any) -> None:
    """Refuse a URI that carries a user or a password; for validators that see a whole section.

    A validator of the field itself would repeat the value in its message.

    Raises:
        ValueError: It does; the message does not repeat it.
    """
    try:
        found = isinstance(uri, str) and "://" in uri and "@" in urlsplit(uri).netloc
    except ValueError:
        found = False  # no URI at all, which others say better
    if found:
        raise ValueError(
            f"{key} must not carry credentials: remove what stands before the @; they come from the usual AWS chain"
        )
