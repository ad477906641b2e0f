"""Stable hashes of text: the side of a split, ids, keys of duplicates.

Everything here depends on the text alone: not on Python's hash seed, the run's seed, or the order of rows.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

from tunegate.data.records import Message, Split

_SPLIT_SALT = b"tunegate-split1"


def normalise(text: str) -> str:
    """Fold what does not make a text a different one: Unicode compatibility forms, case, white space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def hash64(*parts: str, salt: bytes = b"") -> int:
    """A 64-bit hash of strings, in their order; no two different lists of parts are joined to the same bytes."""
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    whole = b"".join(piece for data in encoded for piece in (len(data).to_bytes(8, "little"), data))
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8, person=salt).digest(), "little")


def content_id(source: str, value: Any) -> str:
    """An id for a row that has none, from its content: the same row has the same id in every file."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return f"{source}-{hash64(text):016x}"


def prompt_key(messages: Sequence[Message]) -> int:
    """A key that is equal for prompts that differ only in case, width and white space."""
    return hash64(*(part for turn in messages for part in (turn["role"], normalise(turn["content"]))))


def prompt_group(messages: Sequence[Message]) -> int:
    """The group that a prompt is split by: its first user turn.

    Later turns do not count: a conversation and its continuation share their beginning, and must share their side.
    """
    first = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
    return hash64(normalise(first), salt=_SPLIT_SALT)


def split_of(messages: Sequence[Message], heldout_fraction: float) -> Split:
    """Which side of the split a prompt is on: the same in every run, whatever the seed."""
    return "heldout" if prompt_group(messages) < heldout_fraction * 2.0**64 else "train"
