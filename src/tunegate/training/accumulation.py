"""Adding gradients of a narrow number format to an fp32 sum."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements; an fp32 block of this size and its source stay in a core's cache


def accumulate(total: Tensor, part: Tensor) -> None:
    """Add `part` to `total`, in place.

    On CPUs torch adds tensors of different formats at a third of the speed of a conversion and an addition, so these
    are done here block by block.

    Args:
        total: fp32.
        part: Of the same shape, in any format.
    """
    if total.dtype == part.dtype or total.device.type != "cpu" or not total.is_contiguous():
        total.add_(part)
        return
    for into, source in zip(torch.split(total.view(-1), _BLOCK), torch.split(part.reshape(-1), _BLOCK), strict=True):
        into.add_(source.to(torch.float32))
