"""The best weights of a training so far, to go back to at its end."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tunegate.training.optim import Optimizer


class BestWeights:
    """Trained parameters in a file: in memory they would be one more copy of the model.

    The file belongs to this process and goes when it ends; checkpoints hold the same weights, whole.
    """

    def __init__(self, optimizer: Optimizer, out: Path) -> None:
        """Hold nothing yet.

        Args:
            optimizer: Whose parameters are kept.
            out: The folder that training writes to; the file is put beside it, where there is room for a model.
        """
        self._optimizer = optimizer
        out.parent.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=".best-")
        self._file = Path(self._folder.name) / "weights.pt"

    def keep(self) -> None:
        """Take the parameters as they are now."""
        self._write(self._optimizer.weights())

    def put_back(self) -> None:
        """Set the parameters to what was kept; the optimizer's moments stay."""
        self._optimizer.set_weights(self._read())

    def gathered(self) -> dict[str, Tensor]:
        """What was kept, whole, from all ranks, for a checkpoint; every rank must call it. Empty if nothing was."""
        return self._optimizer.gathered(self._read()) if self._file.is_file() else {}

    def take(self, weights: dict[str, Tensor]) -> None:
        """Keep this rank's part of what `gathered` returned."""
        if weights:
            self._write(self._optimizer.scattered(weights))

    def _write(self, weights: dict[str, Tensor]) -> None:
        new = self._file.with_suffix(".new")
        torch.save(weights, new)
        new.replace(self._file)  # what was read before stays mapped to the old file

    def _read(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.load(self._file, weights_only=True, mmap=True)
        return found
