"""Decoding on a GPU: a cache of fixed size, and steps that are replayed instead of started anew.

A step of some rows through a small model has about a thousand kernels, which a GPU works off faster than Python starts
them. So the second step after every change of the batch's size is recorded as a CUDA graph, and those that follow are
replays of it. A recording knows tensors by their addresses: what a step reads and writes (token, position, mask, keys,
values) stays in place and is changed there.

Rows that leave make room at the end of these tensors; the empty places are computed along until half of them are empty,
which is when a recording of half the size pays off.

Shape suffixes: S places for rows, B rows still being decoded (the first of the places), T columns (prompt and
response), D width of the trunk, K key-value heads, W head width.
"""

# ruff: noqa: N815, RUF100 - names carry shape suffixes
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunegate.training.batching import Batch
from tunegate.training.decoding import Decoding


class Recording:
    """Work on the GPU that is captured once, without being done, and then done by replays."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        """Capture what `work` starts; it must not wait for the GPU, nor change a tensor but in place."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = work()

    def __call__(self) -> Tensor:
        """Do the work; the output is the same tensor each time."""
        self._graph.replay()
        return self._output


class GraphDecoding(Decoding):
    """One token a row at a time by the model's own forward pass, recorded."""

    def __init__(
        self,
        model: Any,
        prompt: Batch,
        steps: int,
        *,
        record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] = Recording,
    ) -> None:
        """Prepare.

        Args:
            model: A causal model whose attention is SDPA, which takes a mask of its own.
            prompt: From `pad_left`, on the model's device.
            steps: Tokens to decode at most.
            record: Turns a step into something that repeats it.
        """
        super().__init__(model, prompt, steps)
        self._record = record
        self._token_S1 = torch.zeros_like(self._position_B1)
        self._replay: Callable[[], Tensor] | None = None
        self._is_warm = False

    def prefill(self) -> Tensor:
        """Read the prompts with the model's own forward pass, and take over its cache; last hidden states, [B, D]."""
        from transformers.cache_utils import Cache, StaticLayer

        hidden_BD = super().prefill()
        self._visible_S11T = self._mask_BT.bool()[:, None, None]
        self._visible_S11T[..., self._width :] = False
        layers = []
        # One layer after the other, so that each part of the model's cache is given back as soon as it is copied.
        for grown in self._cache.layers:
            layer = StaticLayer(self._mask_BT.shape[1])
            layer.lazy_initialization(grown.keys, grown.values)
            layer.keys[:, :, : self._width], layer.values[:, :, : self._width] = grown.keys, grown.values
            layer.cumulative_length.fill_(self._width)
            grown.keys = grown.values = None
            layers.append(layer)
        self._cache = Cache(layers=layers)
        return hidden_BD

    def step(self, token_B: Tensor) -> Tensor:
        """Read one token a row: last hidden states after it, [B, D], which hold until the next step."""
        self._token_S1[: self.rows, 0] = token_B
        self._position_B1 += 1
        self._visible_S11T[..., self._width] = True
        self._width += 1
        if self._replay is None and self._is_warm:
            self._replay = self._record(self._forward)
        # The first step of a size runs as it is, so that libraries get ready outside the recording.
        self._is_warm = True
        hidden_SD = self._forward() if self._replay is None else self._replay()
        return hidden_SD[: self.rows]

    def keep(self, kept_B: Tensor) -> None:
        """Move the rows that stay to the front; give up half of the places when half of them are empty."""
        self.rows = len(kept_B)
        for moved in (self._position_B1, self._visible_S11T):
            moved[: self.rows] = moved[kept_B]
        for layer in self._cache.layers:
            for moved in (layer.keys, layer.values):
                moved[: self.rows, :, : self._width] = moved[kept_B, :, : self._width]
        if 2 * self.rows <= len(self._token_S1):
            self._replay, self._is_warm = None, False
            self._token_S1, self._position_B1 = self._token_S1[: self.rows], self._position_B1[: self.rows]
            self._visible_S11T = self._visible_S11T[: self.rows]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[: self.rows], layer.values[: self.rows]

    def _forward(self) -> Tensor:
        output = self._trunk(
            input_ids=self._token_S1,
            attention_mask=self._visible_S11T,
            position_ids=self._position_B1,
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden_SD: Tensor = output.last_hidden_state[:, -1]
        return hidden_SD


def fits(trunk: Any) -> bool:
    """Whether a trunk may be decoded by replays: on a GPU, with plain attention and nothing watching it.

    Args:
        trunk: The model without its head.
    """
    return (
        next(trunk.parameters()).device.type == "cuda"
        and trunk.config._attn_implementation == "sdpa"
        and not any(module._forward_hooks or module._forward_pre_hooks for module in trunk.modules())
    )
