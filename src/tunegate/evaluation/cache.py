"""What was computed before for the same model, prompts and decoding."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from tunegate.errors import StorageError
from tunegate.storage.manifest import digest_json
from tunegate.storage.stores import open_store


class Cache:
    """A store of JSON values by key: in memory for this evaluation, and in a folder or on S3 for the next ones.

    A key is a mapping of everything that the value depends on. It is stored beside the value and compared on reading,
    so a file that was swapped or cut short is a miss, never a wrong answer. A place that cannot be written to costs
    the saving, not the evaluation.

    Args:
        place: Where values survive this process, a folder or `s3://bucket/prefix`; None keeps them in memory only.
    """

    def __init__(self, place: Path | str | None = None) -> None:
        self._store = None if place is None else open_store(str(place))
        self._memory: dict[str, Any] = {}

    def get(self, key: dict[str, Any]) -> Any:
        """The value stored under the key, or None."""
        name = digest_json(key)
        if name in self._memory:
            return self._memory[name]
        if self._store is None:
            return None
        try:
            content = self._store.get(f"{name}.json")
            if content is None:
                return None
            stored = json.loads(content)
            value = (
                stored["value"] if stored["key"] == key and stored["digest"] == digest_json(stored["value"]) else None
            )
        except (StorageError, OSError, ValueError, KeyError, TypeError):
            return None
        if value is not None:
            self._memory[name] = value
        return value

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Store a value that JSON can carry."""
        name = digest_json(key)
        self._memory[name] = value
        if self._store is None:
            return
        content = {"key": key, "digest": digest_json(value), "value": value}
        with contextlib.suppress(StorageError):
            self._store.put(f"{name}.json", json.dumps(content, ensure_ascii=False).encode())
