"""Drawing tokens from logits: noise that belongs to the row, the inverse distribution function, exact probabilities.

Shape suffixes: B rows, T steps, V vocabulary, C chunks of the vocabulary, W width of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_CHUNK = 256  # the vocabulary is searched in two steps, chunk first, so that only B x V / 256 sums are accumulated


def row_noise(seed: Sequence[int], rows: Sequence[int], steps: int) -> Tensor:
    """One uniform number for every row and step, a pure function of seed, row and step, [B, T] fp64 in [0, 1).

    Each row has its own counter-based stream (Philox, Salmon et al. 2011), so a row draws the same noise whichever
    rows share its batch, and there is no generator state that a checkpoint could miss.

    Args:
        seed: Non-negative numbers that say which draw this is, e.g. (run seed, update).
        rows: Number of each row in the whole list of prompts.
        steps: Tokens to draw.
    """
    noise = np.empty((len(rows), steps))
    for index, row in enumerate(rows):
        noise[index] = np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, row]))).random(steps)
    return torch.from_numpy(noise)


def draw(
    logits_BV: Tensor, noise_B: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function at the row's noise.

    Args:
        logits_BV: Logits, fp32.
        noise_B: Uniform in [0, 1), fp64.
        temperature: The logits are divided by this; 0 takes the most likely token.
        top_p: Nucleus; 1 is the whole distribution.
        top_k: Most likely tokens to draw from; 0 is all.

    Returns:
        Tokens and the log-probability each was drawn with, [B]: of the truncated distribution under `top_p` and
        `top_k`; of the distribution at temperature 1 for greedy decoding, which has none of its own.
    """
    if temperature == 0.0:
        tokens_B = logits_BV.argmax(dim=-1)
        return tokens_B, _selected(logits_BV, tokens_B) - logits_BV.logsumexp(dim=-1)
    scaled_BV = logits_BV if temperature == 1.0 else logits_BV / temperature
    if top_k > 0 or top_p < 1.0:
        scaled_BV = _truncate(scaled_BV, top_p, top_k)
    weights_BV = torch.softmax(scaled_BV, dim=-1)
    tokens_B = _invert(weights_BV, noise_B)
    return tokens_B, _selected(weights_BV, tokens_B).log()


def _selected(values_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return values_BV.gather(1, tokens_B[:, None])[:, 0]


def _truncate(scaled_BV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Logits with everything outside the top k and the nucleus at -inf (Holtzman et al. 2020, arXiv 1904.09751)."""
    if 0 < top_k < scaled_BV.shape[1]:
        lowest_B1 = scaled_BV.topk(top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < lowest_B1, float("-inf"))
    if top_p < 1.0:
        sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True)
        weights_BV = torch.softmax(sorted_BV, dim=-1)
        # A token stays if what comes before it has not yet reached top_p; the first one always stays.
        outside_BV = weights_BV.cumsum(dim=-1) - weights_BV >= top_p
        outside_BV[:, 0] = False
        scaled_BV = scaled_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(dim=-1)), float("-inf"))
    return scaled_BV


def _invert(weights_BV: Tensor, noise_B: Tensor) -> Tensor:
    """The token at which the cumulated weights pass noise x total.

    The sums of chunks are fp32 (their error is that of the weights themselves), what they add up to is fp64.
    """
    rows, vocabulary = weights_BV.shape
    missing = -vocabulary % _CHUNK
    if missing:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, missing))
    weights_BCW = weights_BV.view(rows, -1, _CHUNK)
    chunk_ends_BC = weights_BCW.sum(dim=-1).double().cumsum(dim=-1)
    total_B = chunk_ends_BC[:, -1]
    below_B = torch.nextafter(total_B, torch.zeros_like(total_B))  # noise x total may round up to the total itself
    threshold_B1 = torch.minimum(noise_B.to(total_B) * total_B, below_B)[:, None]
    chunk_B1 = torch.searchsorted(chunk_ends_BC, threshold_B1, right=True)
    start_B1 = torch.where(chunk_B1 > 0, chunk_ends_BC.gather(1, (chunk_B1 - 1).clamp_min(0)), 0.0)
    chosen_BW = weights_BCW[torch.arange(rows, device=weights_BV.device), chunk_B1[:, 0]].double()
    # Rounding may leave the threshold at or above the chunk's end: then its last possible token is meant.
    inside_B1 = torch.searchsorted(start_B1 + chosen_BW.cumsum(dim=-1), threshold_B1, right=True)
    positions_W = torch.arange(_CHUNK, device=weights_BV.device)
    last_B1 = torch.where(chosen_BW > 0, positions_W, 0).amax(dim=-1, keepdim=True)
    return (chunk_B1 * _CHUNK + torch.minimum(inside_B1, last_B1))[:, 0]
