"""Where copies of training checkpoints go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunegate.storage.stores import Store, open_store


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where copies of checkpoints go.

    Attributes:
        store: E.g. that of `s3://bucket/prefix`.
        key: Below it, the place of one training run's checkpoints.
    """

    store: Store
    key: str

    def below(self, name: str) -> Mirror:
        """A place of its own for another training of the same run."""
        return Mirror(self.store, f"{self.key}/{name}")

    def clear(self) -> None:
        """Remove all copies: the finished model replaces them."""
        self.store.remove(self.key)

    def __reduce__(self) -> tuple[Callable[[str, str], Mirror], tuple[str, str]]:
        """A process of the same training opens the store anew: connections do not travel."""
        return _reopened, (self.store.uri, self.key)


def _reopened(uri: str, key: str) -> Mirror:
    return Mirror(open_store(uri), key)
