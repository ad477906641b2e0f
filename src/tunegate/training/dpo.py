"""Direct preference optimisation: the policy straight from the preferences (Rafailov et al. 2023, arXiv 2305.18290).

Policy, reference, head, optimizer, checkpoints and held-out measurement are PPO's; what is new is the loss. The
reference's log-probabilities are computed once.

Shape suffixes: B pairs, R responses (chosen and rejected in turn).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunegate.data.records import Preference, Prompt
from tunegate.errors import DataError, TrainingError, TrainingStoppedError
from tunegate.observer import NullObserver, Observer
from tunegate.storage.manifest import digest_json
from tunegate.training.batching import shuffled, steps_of_rows, token_budget_batches
from tunegate.training.best import BestWeights
from tunegate.training.checkpoint import CheckpointFolder, model_digest, rng_state, seed_everything, set_rng_state
from tunegate.training.config import Sharding
from tunegate.training.dpo_config import DPOSpec
from tunegate.training.dpo_results import DPOResult, PreferencePoint
from tunegate.training.heldout import Measurement, by_source, examples, measure, paired_difference
from tunegate.training.losses import preference_loss, token_logprobs
from tunegate.training.measure import peak_memory_bytes
from tunegate.training.mirror import Mirror
from tunegate.training.models import effective_max_length, microbatch_budget, precision_of
from tunegate.training.optim import Optimizer
from tunegate.training.policy import Policy, ResponseBatch
from tunegate.training.ppo_setup import fitting_prompts, make_scorers
from tunegate.training.ranks import agreed, gather, share, sum_over_ranks, world
from tunegate.training.results import Share
from tunegate.training.reward_data import Item, encode_pairs
from tunegate.training.scoring import Scorer
from tunegate.training.sharding import in_step

RESULT_FILE = "training.json"
_HOPELESS = 20  # so many bad steps in a row are no accident
_HELDOUT = 2


def train_dpo(
    policy: Path,
    pairs: Sequence[Preference],
    heldout_pairs: Sequence[Preference],
    heldout_prompts: Sequence[Prompt],
    out: Path,
    *,
    spec: DPOSpec,
    seed: int,
    reward: Path | None = None,
    judge: Path | None = None,
    observer: Observer | None = None,
    checkpoints: Path | None = None,
    mirror: Mirror | None = None,
    stop_requested: Callable[[], bool] | None = None,
    sharding: Sharding = "none",
) -> DPOResult:
    """Train a policy on preferences and write the result as a plain model folder with `training.json`.

    Args:
        policy: Folder of the model to start from; it is the reference as well.
        pairs: Preferences to learn.
        heldout_pairs: Preferences to measure on.
        heldout_prompts: Prompts that reference and result answer, with the same noise; read with a reward model.
        out: Folder to write.
        spec: The `dpo` section.
        seed: Of adapters, orders and answers.
        reward: Folder of a reward model that scores those answers.
        judge: Folder of a second one.
        observer: Told losses, accuracy and progress.
        checkpoints: Folder to resume from and to write checkpoints to; unset means neither.
        mirror: Where copies of the checkpoints go, so that another machine can resume.
        stop_requested: Asked before each step; when true, a checkpoint is written and training stops.
        sharding: What the processes of a `torchrun` share, see `DistributedSpec`.

    Raises:
        DataError: If no training pair fits.
        TrainingStoppedError: If `stop_requested` said so.
        TrainingError: If the gradient is not finite for many steps in a row.
    """
    observer = observer or NullObserver()
    seed_everything(seed)
    run = _Run(Policy(policy, spec.policy, sharding), spec, pairs, heldout_pairs, out, seed, observer)
    scorers = make_scorers(reward, judge, spec.policy) if reward is not None else {}
    run.listen(heldout_prompts, scorers)
    if checkpoints is not None:
        parts = ["dpo", spec.model_dump(mode="json"), seed, model_digest(policy), [asdict(item) for item in run.items]]
        run.folder = CheckpointFolder(
            checkpoints, fingerprint=digest_json(parts), keep=spec.keep_checkpoints, observer=observer, mirror=mirror
        )
    run.fit(stop_requested or (lambda: False))
    result = run.result()
    if world()[0] == 0:
        run.policy.save(out)
        (out / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n")
    return result


def response_logprobs(policy: Policy, items: Sequence[Item], *, reference: bool = False) -> Tensor:
    """Find log pi of whole responses, summed over their tokens, [R] fp32, item by item; with gradients to the policy.

    Args:
        policy: Policy and reference.
        items: Prompts with their responses.
        reference: Ask the reference instead, without gradients.
    """
    rows = [(item.prompt, response) for item in items for response in item.responses]
    batch = ResponseBatch.of([p for p, _ in rows], [r for _, r in rows], policy.chat.pad_id, policy.device)
    if reference:
        hidden_BTD, head = policy.reference_hidden(batch.batch)[0], policy.reference_head()
    else:
        hidden_BTD, head = policy.hidden(batch.batch, None), policy.head()
    logprobs_N = token_logprobs(batch.predictors(hidden_BTD), head, batch.tokens_N, 1.0)
    zeros_R = torch.zeros(len(rows), dtype=logprobs_N.dtype, device=logprobs_N.device)
    return zeros_R.index_add(0, batch.rows_N, logprobs_N)


@dataclass
class _Progress:
    """What a checkpoint holds beside weights and random state."""

    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    bad_in_a_row: int = 0


class _Run:
    """One training run: the plan, the loop, and its state."""

    def __init__(
        self,
        policy: Policy,
        spec: DPOSpec,
        pairs: Sequence[Preference],
        heldout: Sequence[Preference],
        out: Path,
        seed: int,
        observer: Observer,
    ) -> None:
        self.policy = policy
        self.spec = spec
        self.seed = seed
        self.observer = observer
        limit = effective_max_length(policy.path, spec.max_length)
        encoded = encode_pairs(policy.chat, pairs, limit, use_margin=False)
        if not encoded.items:
            raise DataError(
                "no training preference fits",
                key="dpo.max_length",
                value=limit,
                fix="add a preferences source, or raise dpo.max_length",
            )
        self.items, self.dropped = encoded.items, encoded.dropped
        self.heldout = encode_pairs(policy.chat, heldout, limit, use_margin=False).items[: spec.evaluate_pairs]
        self.budget = microbatch_budget(spec.microbatch_tokens, policy.device)
        plan: list[list[int]] = []
        ends: set[int] = set()
        for epoch in range(spec.epochs if spec.enabled else 0):
            plan += steps_of_rows(shuffled(len(self.items), seed=seed, epoch=epoch), spec.batch_pairs)
            ends.add(len(plan))
        self.plan = plan[: spec.max_steps]
        total, every = len(self.plan), spec.evaluate_every
        self.measure_at = {total, *(range(every, total, every) if every else ends)}
        each = spec.checkpoint_every
        self.checkpoint_at = {total, *range(each, total, each)} if each else self.measure_at
        self.optimizer = Optimizer(
            policy.model.named_parameters(), spec, learning_rate=spec.peak_learning_rate, total_steps=max(1, total)
        )
        self.progress = _Progress()
        self.best_weights = BestWeights(self.optimizer, out)
        self.before: Measurement | None = None
        self.folder: CheckpointFolder | None = None
        self.resumed_from: int | None = None
        self.prompts: list[Prompt] = []
        self.scorers: Mapping[str, Scorer] = {}

    def listen(self, prompts: Sequence[Prompt], scorers: Mapping[str, Scorer]) -> None:
        """Have held-out answers scored before and after."""
        if scorers:
            self.prompts = fitting_prompts(prompts, self.policy, scorers)[: self.spec.evaluate_prompts]
            self.scorers = scorers if len(self.prompts) >= max(2, world()[1]) else {}

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self, stop_requested: Callable[[], bool]) -> None:
        """Take all steps, from the newest checkpoint if there is one; end with the policy that is kept."""
        self._resume()
        state = self.progress
        self.reference = self._log_probabilities(self.items, reference=True)
        self.heldout_reference = self._log_probabilities(self.heldout, reference=True)
        if self.resumed_from is None:
            self.before = self._answers()
            self._measure()
        while state.step < len(self.plan):
            if agreed(stop_requested()):
                self._save()
                raise TrainingStoppedError(
                    f"DPO was stopped at step {state.step} of {len(self.plan)}",
                    fix="start it again with the same checkpoint folder" if self.folder else "give a checkpoint folder",
                )
            self._step(self.plan[state.step])
            if state.step in self.measure_at:
                self._measure()
            if state.step in self.checkpoint_at:
                self._save()
            self.observer.progress(state.step, len(self.plan), "step", "DPO")
        if self.spec.keep == "best" and self.heldout and state.best_step != state.step:
            self.best_weights.put_back()
        self.policy.refresh()

    def _step(self, indices: list[int]) -> None:
        started = time.perf_counter()
        state, spec = self.progress, self.spec
        own = share(indices)
        totals = torch.zeros(2, dtype=torch.float64)  # loss and pairs ranked right, summed over ranks
        parts = [[own[i] for i in group] for group in self._groups([self.items[index] for index in own])]
        for part, weight in in_step(parts, indices[:1], needed=self.policy.sharded):
            loss, right = self._loss([self.items[i] for i in part], self.reference[part], len(indices))
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            totals += weight * torch.tensor([float(loss.detach()), right], dtype=torch.float64)
        report = self.optimizer.step()
        loss_sum, right_sum = sum_over_ranks(totals).tolist()
        state.step += 1
        state.pairs += len(indices)
        state.seconds += time.perf_counter() - started
        state.losses.append(loss_sum)
        state.bad_in_a_row = state.bad_in_a_row + 1 if report.skipped else 0
        if state.bad_in_a_row >= _HOPELESS:
            raise TrainingError(
                f"the gradient was not finite {_HOPELESS} steps in a row",
                key="dpo.learning_rate",
                value=spec.peak_learning_rate,
                fix="lower the learning rate, or check the data for broken rows",
            )
        figures = {
            "dpo/loss": loss_sum,
            "dpo/accuracy": right_sum / len(indices),
            "dpo/learning_rate": report.learning_rate,
            "dpo/gradient_norm": report.gradient_norm,
            "dpo/skipped_steps": self.optimizer.skipped_steps,
        }
        self.observer.metrics(figures, state.step)

    def _loss(self, items: Sequence[Item], reference_B2: Tensor, step_size: int) -> tuple[Tensor, float]:
        """The step's mean loss as far as these pairs go, and how many of them are ranked right (ties half)."""
        spec = self.spec
        logprobs_B2 = response_logprobs(self.policy, items).view(-1, 2)
        ratios_B2 = logprobs_B2 - reference_B2.to(logprobs_B2)
        losses_B = preference_loss(
            ratios_B2[:, 0], ratios_B2[:, 1], beta=spec.beta, kind=spec.loss, label_smoothing=spec.label_smoothing
        )
        if spec.sft_weight:
            tokens_B = torch.tensor([len(item.responses[0]) for item in items], device=losses_B.device)
            losses_B = losses_B - spec.sft_weight * logprobs_B2[:, 0] / tokens_B
        right = float(((ratios_B2[:, 0] - ratios_B2[:, 1]).detach().sign() + 1).sum() / 2)
        return losses_B.sum() / step_size, right

    # -- measuring ------------------------------------------------------------------------------------------------

    def _groups(self, items: Sequence[Item]) -> list[list[int]]:
        """Microbatches of pairs: both rows are as wide as the longer one."""
        return token_budget_batches([2 * (len(i.prompt) + max(map(len, i.responses))) for i in items], self.budget)

    @torch.no_grad()
    def _log_probabilities(self, items: Sequence[Item], *, reference: bool) -> Tensor:
        """Find log pi of chosen and rejected responses, without gradients, over all ranks, [B, 2] on the CPU."""
        own = share(items)
        found: list[list[float]] = [[] for _ in own]
        for group in self._groups(own):
            values_B2 = response_logprobs(self.policy, [own[i] for i in group], reference=reference).view(-1, 2)
            for index, row in zip(group, values_B2.tolist(), strict=True):
                found[index] = row
        return torch.tensor(gather(found, len(items))).view(-1, 2)

    def _measure(self) -> None:
        """Held-out preferences; remembers the best weights."""
        if not self.heldout:
            return
        state, spec = self.progress, self.spec
        self.policy.refresh()
        ratios_B2 = self._log_probabilities(self.heldout, reference=False) - self.heldout_reference
        losses_B = preference_loss(
            ratios_B2[:, 0], ratios_B2[:, 1], beta=spec.beta, kind=spec.loss, label_smoothing=spec.label_smoothing
        )
        difference_B = ratios_B2[:, 0] - ratios_B2[:, 1]
        # Before the first step all differences are rounding errors of 0: ties.
        right = 0.5 * len(self.heldout) if state.step == 0 else float((difference_B.sign() + 1).sum() / 2)
        point = PreferencePoint(
            step=state.step,
            loss=float(losses_B.mean()),
            accuracy=Share.of(right, len(self.heldout)),
            margin=spec.beta * float(difference_B.mean()),
        )
        if not state.points or point.loss < min(p["loss"] for p in state.points):
            state.best_step = state.step
            self.best_weights.keep()
        state.points.append(point.model_dump())
        self.observer.metrics(
            {
                "dpo/heldout_loss": point.loss,
                "dpo/heldout_accuracy": point.accuracy.value,
                "dpo/heldout_margin": point.margin,
            },
            state.step,
        )

    def _answers(self) -> Measurement | None:
        """What the policy says to the held-out prompts, scored; None without a reward model."""
        if not self.scorers:
            return None
        return measure(
            self.policy,
            self.prompts,
            self.scorers,
            self.spec.policy,
            update=self.progress.best_step if self.spec.keep == "best" else self.progress.step,
            seed=[self.seed, _HELDOUT],
            observer=self.observer,
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None:
            return
        content = {
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
            "progress": dict(vars(self.progress)),
            "best_weights": self.best_weights.gathered(),
            "before": self.before.state_dict() if self.before is not None else None,
        }
        if world()[0] == 0:
            self.folder.save(self.progress.step, content)

    def _resume(self) -> None:
        found = self.folder.latest() if self.folder is not None else None
        if found is None:
            return
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.progress = _Progress(**found.state["progress"])
        self.best_weights.take(found.state["best_weights"])
        self.before = Measurement(**found.state["before"]) if found.state["before"] is not None else None
        set_rng_state(found.state["rng"])
        self.resumed_from = found.step
        self.observer.note(f"DPO goes on from the checkpoint at step {found.step}")

    # -- the result -----------------------------------------------------------------------------------------------

    def result(self) -> DPOResult:
        """Measure the policy that is kept; the figures of the run."""
        spec, state, before = self.spec, self.progress, self.before
        after = self._answers()
        gains = {}
        if before is not None and after is not None:
            for name in ("reward", *(["judge"] if "judge" in before.values else [])):
                gains[name] = paired_difference(before.array(name), after.array(name), seed=self.seed)
        tail = state.losses[-max(1, len(state.losses) // 10) :]
        return DPOResult(
            method=spec.method if spec.enabled else "disabled",
            precision=precision_of(self.policy.sampler.model),
            seed=self.seed,
            learning_rate=spec.peak_learning_rate,
            trained_parameters=self.optimizer.trained_parameters,
            pairs=len(self.items),
            dropped=self.dropped,
            steps=state.step,
            skipped_steps=self.optimizer.skipped_steps,
            resumed_from=self.resumed_from,
            kept=spec.keep,
            kept_update=state.best_step if spec.keep == "best" and self.heldout else state.step,
            final_loss=sum(tail) / len(tail) if tail else None,
            preferences=[PreferencePoint(**point) for point in state.points],
            before=before.figures() if before is not None else None,
            after=after.figures() if after is not None else None,
            reward_gain=gains.get("reward"),
            judge_gain=gains.get("judge"),
            by_source=by_source(self.prompts, before, after) if before is not None and after is not None else {},
            examples=examples(self.prompts, before, after) if before is not None and after is not None else [],
            seconds=state.seconds,
            pairs_per_second=state.pairs / state.seconds if state.seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
        )
