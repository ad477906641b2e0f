"""The policy, its reference and the model that rollouts are drawn from, sharing whatever they can.

With adapters (`method: lora`) there is one frozen trunk. The reference is the trunk with the adapters off. Only the
upper layers carry adapters, so the hidden states below them (the *stem*) are the same for policy and reference and in
every epoch: they are computed once a rollout, and an update runs the upper layers alone. Rollouts are drawn from a copy
that has the adapters merged in and shares every other weight.

With `method: full` the trained model samples as well, and the reference is a frozen copy.

Shape suffixes: B rows, T tokens, D width of the trunk, N response tokens of a batch (row by row).
"""

# ruff: noqa: N815 - fields carry shape suffixes
from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunegate.errors import SpecError
from tunegate.training.batching import Batch, pad_right
from tunegate.training.chat import Chat
from tunegate.training.config import LoraSpec, Sharding
from tunegate.training.lora import add_lora
from tunegate.training.losses import Head
from tunegate.training.models import (
    checkpoint_activations,
    effective_max_length,
    head_of,
    hidden_states,
    load_causal_lm,
    save_model,
    trunk_of,
)
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.rollout import Generator
from tunegate.training.sharding import ShardedModel

if TYPE_CHECKING:
    from tunegate.training.vllm_rollout import VLLMGenerator

_UNLIMITED = 2**31


@dataclass(frozen=True, slots=True)
class ResponseBatch:
    """Prompts and responses in right-padded rows, and where in them the responses stand.

    Attributes:
        batch: Prompt and response ids in a row.
        rows_N: Row of each response token; tokens are counted row by row.
        columns_N: Column that *predicts* each response token: the one before it.
        tokens_N: The response tokens.
    """

    batch: Batch
    rows_N: Tensor
    columns_N: Tensor
    tokens_N: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pad_id: int,
        device: torch.device | str = "cpu",
    ) -> ResponseBatch:
        """Put prompts and responses (ids, at least one token each) into one batch."""
        batch = pad_right([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], pad_id)
        rows = [row for row, response in enumerate(responses) for _ in response]
        columns = [
            len(prompt) - 1 + place
            for prompt, response in zip(prompts, responses, strict=True)
            for place in range(len(response))
        ]
        tokens = [token for response in responses for token in response]
        return cls(
            batch.to(device),
            torch.tensor(rows, device=device),
            torch.tensor(columns, device=device),
            torch.tensor(tokens, device=device),
        )

    def predictors(self, hidden_BTD: Tensor) -> Tensor:
        """The hidden states that predict the response tokens, [N, D]."""
        return hidden_BTD[self.rows_N, self.columns_N]


class Policy:
    """A causal language model in training, with its reference.

    Attributes:
        chat: Tokenizer and template.
        model: The model whose parameters are trained.
        sampler: The policy as of the last `refresh`, with adapters merged.
        engine: What draws responses from it: the sampler itself, or vLLM.
        has_stem: True if the layers below the adapters are computed separately.
    """

    def __init__(self, path: Path, spec: PPOSpec, sharding: Sharding = "none") -> None:
        """Load the model of a folder and prepare it for training as the spec says.

        Adapters are drawn from torch's global generator.

        Args:
            path: Model folder.
            spec: The `ppo` section.
            sharding: With `full` and `method: full` the trained weights are cut over the ranks; adapters stay whole.

        Raises:
            ModelError: If the folder is not a causal language model.
            SpecError: If the adapters fit nowhere.
        """
        self.path = path
        self.spec = spec
        self.chat = Chat.load(path)
        self.model = load_causal_lm(path, spec.precision)
        self.context = effective_max_length(path, _UNLIMITED)
        self._adapted: Any = None
        self._reference: Any = None
        self._upper: Any = None
        self._split = 0
        self._merged: list[tuple[nn.Parameter, Any]] = []
        sampled = self.model
        if spec.method == "lora":
            sampled = _sharing_copy(self.model)
            self._add_adapters(sampled)
        else:
            self._reference = copy.deepcopy(self.model).requires_grad_(False)
            self._frozen_head = Head.of(self._reference)
        if spec.gradient_checkpointing:
            checkpoint_activations(self.model)
        whole = ShardedModel(self.model, sharding if spec.method == "full" else "none", keep_on_device=True)
        self._sharded, self.model = whole, whole.model
        self.sampler = Generator(sampled, self.chat, context=self.context)
        self.engine: Generator | VLLMGenerator = self.sampler
        if spec.generator == "vllm":
            from tunegate.training.vllm_rollout import VLLMGenerator

            self.engine = VLLMGenerator(self.sampler, str(path), memory=spec.vllm_memory)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def sharded(self) -> bool:
        """True if the trained weights are cut over the ranks."""
        return self._sharded.sharded

    @property
    def has_stem(self) -> bool:
        """True if the hidden states below the adapters are computed once a rollout."""
        return self._upper is not None

    def head(self) -> Head:
        """The output layer, as trained so far; made anew where it is trained itself."""
        if self.spec.method == "full":
            return Head.of(self.model)
        return self._frozen_head

    def reference_head(self) -> Head:
        """The output layer of the reference."""
        return self._frozen_head

    # -- forward passes -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reference_hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Last hidden states of the reference and the stem, both [B, T, D]; the stem is None without adapters."""
        if self._reference is not None:
            return hidden_states(self._reference, batch), None
        caught: list[Tensor] = []
        hook = nullcontext() if self._upper is None else _InputCatcher(trunk_of(self.model).layers[self._split], caught)
        with self._adapted.disable_adapter(), hook:
            hidden_BTD = hidden_states(self.model, batch)
        return hidden_BTD, caught[0] if caught else None

    def hidden(self, batch: Batch, stem_BTD: Tensor | None) -> Tensor:
        """Last hidden states of the policy, [B, T, D], with gradients to what is trained.

        Args:
            batch: Right-padded rows.
            stem_BTD: What `reference_hidden` gave for these rows; None runs the whole trunk.
        """
        if stem_BTD is None:
            # Without gradients the sampler, which has the same weights, need not wait for other ranks.
            whole = self.model if torch.is_grad_enabled() else self._sharded.plain
            return hidden_states(whole, batch)
        output: Tensor = self._upper(inputs_embeds=stem_BTD, use_cache=False).last_hidden_state
        return output

    # -- the sampler ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the sampler up to date with the trained parameters."""
        if self._adapted is None:
            self._sharded.refresh()
        else:
            for target, layer in self._merged:
                weight = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
                target.copy_(weight)
        if self.engine is not self.sampler:
            changed = {id(target) for target, _ in self._merged}
            names = [name for name, own in self.sampler.model.named_parameters() if id(own) in changed]
            self.engine.refresh(names or None)  # type: ignore[union-attr]  # the only other kind

    def save(self, out: Path) -> None:
        """Write the policy as of the last `refresh`, adapters merged, as a plain Hugging Face folder."""
        save_model(self.sampler.model, self.chat.tokenizer, out, like=self.path)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _add_adapters(self, sampled: Any) -> None:
        trunk, spec = trunk_of(self.model), self.spec
        layers = getattr(trunk, "layers", None)
        lora = spec.lora
        if isinstance(layers, nn.ModuleList):
            self._split = len(layers) - max(1, round(spec.adapted_layers * len(layers)))
            names = [
                f"layers.{index}.{name}"
                for index in range(self._split, len(layers))
                for name, module in layers[index].named_modules()
                if isinstance(module, nn.Linear) and _is_target(name, lora)
            ]
            if not names:
                raise SpecError(
                    "the adapters fit nowhere",
                    key="ppo.lora.targets",
                    value=lora.targets,
                    fix="use 'all-linear', or names of linear layers of this model, e.g. 'q_proj,v_proj'",
                )
            lora = lora.model_copy(update={"targets": ",".join(names)})
        self._adapted = add_lora(self.model, lora, key="ppo.lora")
        for parameter in head_of(self.model):
            if parameter is not None:
                parameter.requires_grad_(False)
        self._frozen_head = Head.of(self.model)
        others = dict(trunk_of(sampled).named_modules())
        for name, module in trunk.named_modules():
            if hasattr(module, "get_delta_weight"):
                other = others[name]
                other.weight = nn.Parameter(other.weight.detach().clone(), requires_grad=False)
                self._merged.append((other.weight, module))
        if isinstance(layers, nn.ModuleList) and self._split > 0:
            self._upper = _from_layer(trunk, self._split)
            if not self._upper_agrees():
                self._upper = None

    @torch.no_grad()
    def _upper_agrees(self) -> bool:
        """Whether the upper layers alone, started from the stem, give what the whole trunk gives.

        They do in models whose layers are alike. Where a layer's work depends on its number (a mixture of sliding and
        full attention, scaled embeddings) they may not, and the whole trunk is run instead.
        """
        ids_BT = torch.arange(2 * 24, device=self.device).view(2, 24) % int(self.model.config.vocab_size)
        batch = pad_right(ids_BT.tolist(), 0).to(self.device)
        try:
            whole_BTD, stem_BTD = self.reference_hidden(batch)
            with self._adapted.disable_adapter():
                upper_BTD = self.hidden(batch, stem_BTD)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False
        return torch.allclose(whole_BTD, upper_BTD, rtol=1e-3, atol=1e-3 * float(whole_BTD.abs().max()))


def _sharing_copy(model: Any) -> Any:
    """A second model on the same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _is_target(name: str, lora: LoraSpec) -> bool:
    if lora.targets == "all-linear":
        return True
    return any(name == target or name.endswith(f".{target}") for target in map(str.strip, lora.targets.split(",")))


def _from_layer(trunk: Any, first: int) -> Any:
    """The same trunk without its first layers; takes their output as its input embeddings."""
    upper = copy.copy(trunk)
    upper._modules = dict(trunk._modules)
    upper._modules["layers"] = nn.ModuleList(list(trunk.layers)[first:])
    return upper


class _InputCatcher:
    """Keeps the hidden states that enter a layer, while the context is open."""

    def __init__(self, layer: nn.Module, caught: list[Tensor]) -> None:
        self._layer = layer
        self._caught = caught

    def __enter__(self) -> None:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._caught.append(args[0] if args else kwargs["hidden_states"])

        self._handle = self._layer.register_forward_pre_hook(keep, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
