"""AdamW on fp32 master weights, whatever the precision of the model, with one place for clipping and bad steps.

A bf16 weight of size 1 cannot take an update smaller than 2^-9, so updates of a bf16 model go to an fp32 copy and are
rounded back (mixed precision training, Micikevicius et al. 2017, arXiv 1710.03740). The model itself computes in pure
bf16, which on CPUs and GPUs is faster than autocast over fp32 weights. Gradients of bf16 weights are moved to an fp32
accumulator as soon as they are complete, so that the sum over many microbatches loses nothing.

Of a parameter that is cut over the ranks (`sharding`) each rank steps its own part; what is saved is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunegate.training.accumulation import accumulate, take_directly
from tunegate.training.config import OptimizerSpec, Schedule
from tunegate.training.ranks import sum_gradients, sum_over_ranks
from tunegate.training.sharding import Layout, local_tensor


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        gradient_norm: Norm of the whole gradient before clipping.
        learning_rate: That was used.
        skipped: True if the gradient was not finite and the weights stayed as they were.
    """

    gradient_norm: float
    learning_rate: float
    skipped: bool


def schedule_factor(schedule: Schedule, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at an optimizer step.

    Rises linearly over the warm-up, then falls so that it would be 0 one step after the last.

    Args:
        schedule: Shape of the fall.
        step: Optimizer steps done so far (0 at the first).
        warmup_steps: Steps of the rise.
        total_steps: Steps of the whole training.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class Optimizer:
    """AdamW over the trainable parameters of one or more modules.

    Attributes:
        names: Of the trained parameters.
        step_count: Steps taken, the skipped ones included.
        skipped_steps: Steps whose gradient was not finite.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        spec: OptimizerSpec,
        *,
        learning_rate: float,
        total_steps: int,
    ) -> None:
        """Take over the parameters that require a gradient.

        Args:
            named_parameters: E.g. `model.named_parameters()`.
            spec: Schedule, decay, clipping, moments.
            learning_rate: At the peak.
            total_steps: Optimizer steps of the whole training, for the schedule.
        """
        trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self.spec = spec
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.warmup_steps = round(spec.warmup * total_steps)
        self.step_count = 0
        self.skipped_steps = 0
        self._sources = [parameter for _, parameter in trained]
        self._layouts = [Layout.of(parameter) for parameter in self._sources]
        self._parameters = [local_tensor(parameter) for parameter in self._sources]
        self._masters = [_master(*both) for both in zip(self._sources, self._parameters, strict=True)]
        matrices = [master for master in self._masters if master.ndim >= 2]
        others = [master for master in self._masters if master.ndim < 2]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, spec.weight_decay), (others, 0.0))
            if params
        ]
        places = {id(master): place for place, master in enumerate(self._masters)}
        self._order = [places[id(master)] for master in (*matrices, *others)]  # as AdamW numbers them
        self._adamw = torch.optim.AdamW(
            groups, lr=learning_rate, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, fused=True
        )

    @torch.no_grad()
    def step(self) -> StepReport:
        """Add up gradients over ranks, clip, update, and drop the gradients.

        A gradient that is not finite changes nothing but the counters; the schedule moves on.
        """
        sum_gradients(m for m, layout in zip(self._masters, self._layouts, strict=True) if layout is None)
        factor = schedule_factor(
            self.spec.schedule, self.step_count, warmup_steps=self.warmup_steps, total_steps=self.total_steps
        )
        rate = self.learning_rate * factor
        gradients = [master.grad for master in self._masters if master.grad is not None]
        norm = self._norm()
        finite = math.isfinite(norm)
        if finite:
            clip = self.spec.gradient_clip
            if clip and norm > clip:
                torch._foreach_mul_(gradients, clip / norm)
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
            self._round()
        else:
            self.skipped_steps += 1
        self.zero_grad()
        self.step_count += 1
        return StepReport(gradient_norm=norm, learning_rate=rate, skipped=not finite)

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self._sources)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for master, parameter in zip(self._masters, self._sources, strict=True):
            master.grad = None
            parameter.grad = None

    def weights(self) -> dict[str, Tensor]:
        """A copy of this rank's part of the trained parameters in the model's own precision."""
        return {name: p.detach().clone() for name, p in zip(self.names, self._parameters, strict=True)}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put back what `weights` returned; the optimizer's moments stay."""
        for name, parameter, master in zip(self.names, self._parameters, self._masters, strict=True):
            parameter.copy_(weights[name])
            if master is not parameter:
                master.copy_(weights[name])

    @torch.no_grad()
    def gathered(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `weights` returned, whole, from all ranks; every rank must call it."""
        return {
            name: weights[name] if layout is None else layout.whole(weights[name]).cpu()
            for name, layout in zip(self.names, self._layouts, strict=True)
            if name in weights
        }

    def scattered(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of what `gathered` returned."""
        return {
            name: weights[name] if layout is None else layout.local(weights[name])
            for name, layout in zip(self.names, self._layouts, strict=True)
            if name in weights
        }

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Trained weights in fp32, moments and counters, whole: all that a resumed training needs.

        Every rank must call it. The number of ranks may differ when it is loaded.
        """
        masters = {name: master.detach() for name, master in zip(self.names, self._masters, strict=True)}
        return {
            "masters": self.gathered(masters),
            "adamw": self._moments(self._adamw.state_dict(), lambda layout, part: layout.whole(part).cpu()),
            "step_count": self.step_count,
            "skipped_steps": self.skipped_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, the model's weights included."""
        masters = self.scattered(state["masters"])
        for name, master in zip(self.names, self._masters, strict=True):
            master.copy_(masters[name])
        self._round()
        self._adamw.load_state_dict(self._moments(state["adamw"], lambda layout, whole: layout.local(whole)))
        self.step_count = int(state["step_count"])
        self.skipped_steps = int(state["skipped_steps"])

    def _moments(self, adamw: dict[str, Any], convert: Callable[[Layout, Tensor], Tensor]) -> dict[str, Any]:
        """AdamW's state with the moments of sharded parameters gathered or cut."""
        converted = {}
        for number, moments in adamw["state"].items():
            layout = self._layouts[self._order[number]]
            converted[number] = (
                moments
                if layout is None
                # The step count is a number, not a part of the parameter.
                else {key: convert(layout, value) if value.ndim else value for key, value in moments.items()}
            )
        return {**adamw, "state": converted}

    def _norm(self) -> float:
        """Norm of the whole gradient, over all ranks."""
        whole = [
            m.grad for m, lay in zip(self._masters, self._layouts, strict=True) if lay is None and m.grad is not None
        ]
        parts = [m.grad for m, lay in zip(self._masters, self._layouts, strict=True) if lay is not None]
        norm = float(nn.utils.get_total_norm(whole)) if whole else 0.0
        if parts:
            own = nn.utils.get_total_norm([part for part in parts if part is not None]).square()
            norm = math.sqrt(norm * norm + float(sum_over_ranks(own)))
        return norm

    def _round(self) -> None:
        """Copy the masters into the weights that the model computes with."""
        pairs = [(p, m) for p, m in zip(self._parameters, self._masters, strict=True) if p.data_ptr() != m.data_ptr()]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def _master(source: nn.Parameter, parameter: Tensor) -> nn.Parameter:
    """The fp32 twin of a parameter, fed by its gradients; the parameter itself if it is fp32 and whole.

    Args:
        source: As the model holds it.
        parameter: This rank's part of it.
    """
    if parameter is source and source.dtype == torch.float32:
        take_directly(source)
        return source
    # `float` of an fp32 tensor is the tensor itself: then the master is the part that the model computes with.
    master = nn.Parameter(parameter.detach().float())

    def move(held: Tensor) -> None:
        if held.grad is None:
            return
        gradient = local_tensor(held.grad)  # type: ignore[arg-type]
        if master.grad is None:
            master.grad = gradient.float()
        else:
            accumulate(master.grad, gradient)
        held.grad = None

    source.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
    return master
