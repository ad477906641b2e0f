"""Training a reward model on preferences, ratings, or both.

An optimizer step is a set of items: pairs, whose responses may be rated as well, and single rated responses. Losses are
weighted by the expected number of pairs and ratings a step, so that over an epoch every pair weighs the same and every
rating weighs the same, whatever the mixture of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunegate.data.records import Preference, Rating
from tunegate.errors import DataError, TrainingError, TrainingStoppedError
from tunegate.observer import NullObserver, Observer
from tunegate.storage.manifest import digest_json
from tunegate.training.batching import shuffled, steps_of_rows, token_budget_batches
from tunegate.training.chat import Chat
from tunegate.training.checkpoint import (
    CheckpointFolder,
    model_digest,
    rng_state,
    seed_everything,
    set_rng_state,
)
from tunegate.training.config import RewardSpec, Sharding
from tunegate.training.lora import add_lora, merge_lora
from tunegate.training.measure import peak_memory_bytes, release_memory
from tunegate.training.mirror import Mirror
from tunegate.training.models import (
    checkpoint_activations,
    effective_max_length,
    init_score_head,
    load_sequence_scorer,
    microbatch_budget,
    precision_of,
)
from tunegate.training.optim import Optimizer
from tunegate.training.ranks import agreed, seed_step, share, sum_over_ranks, world
from tunegate.training.results import RewardEvaluation, RewardResult
from tunegate.training.reward_data import (
    Item,
    Items,
    RatingScale,
    encode_pairs,
    encode_ratings,
    join_ratings,
)
from tunegate.training.reward_evaluation import evaluate_pairs, headline, rating_figures, tfidf_baseline
from tunegate.training.reward_frozen import FittedHead, fit_head
from tunegate.training.reward_losses import pairwise_loss, pointwise_loss
from tunegate.training.reward_model import RewardHead, RewardModel
from tunegate.training.reward_scores import item_features, raw_item_scores, score_items
from tunegate.training.sharding import ShardedModel, in_step

RESULT_FILE = "training.json"
_HOPELESS = 20  # so many bad steps in a row are no accident
_NORMALISING_ITEMS = 512
_CHECKPOINTS = 10  # over a training, unless the spec says otherwise


def train_reward(
    model: Path,
    pairs: Sequence[Preference],
    ratings: Sequence[Rating],
    heldout_pairs: Sequence[Preference],
    heldout_ratings: Sequence[Rating],
    out: Path,
    *,
    spec: RewardSpec,
    seed: int,
    observer: Observer | None = None,
    checkpoints: Path | None = None,
    mirror: Mirror | None = None,
    stop_requested: Callable[[], bool] | None = None,
    sharding: Sharding = "none",
) -> RewardResult:
    """Train a reward model and write it as a plain folder with `reward_head.json` and `training.json`.

    Args:
        model: Folder of the causal model to start from, usually the fine-tuned one.
        pairs: Preferences to learn.
        ratings: Ratings to learn; read when the objective is pointwise or joint.
        heldout_pairs: Preferences to measure on.
        heldout_ratings: Ratings to measure on.
        out: Folder to write.
        spec: The `reward` section.
        seed: Of the head, adapters, shuffles and folds.
        observer: Told losses, accuracy, throughput and progress.
        checkpoints: Folder to resume from and to write checkpoints to; unset means neither.
        mirror: Where copies of the checkpoints go, so that another machine can resume.
        stop_requested: Asked before each step; when true, a checkpoint is written and training stops.
        sharding: What the processes of a `torchrun` share, see `DistributedSpec`.

    Raises:
        DataError: If the objective finds nothing to learn from.
        TrainingStoppedError: If `stop_requested` said so.
        TrainingError: If the gradient is not finite for many steps in a row.
    """
    observer = observer or NullObserver()
    seed_everything(seed)
    chat = Chat.load(model)
    max_length = effective_max_length(model, spec.max_length)
    data = _encode(chat, pairs, ratings, spec, max_length)
    scorer = load_sequence_scorer(model)
    init_score_head(scorer, seed=seed)
    run = _Run(spec, scorer, chat, data, seed, observer, sharding)
    if checkpoints is not None and spec.trunk != "frozen":
        run.folder = CheckpointFolder(
            checkpoints,
            fingerprint=digest_json(
                ["reward", spec.model_dump(mode="json"), seed, model_digest(model), [asdict(i) for i in data.items]]
            ),
            keep=spec.keep_checkpoints,
            observer=observer,
            mirror=mirror,
        )
    raw_N = run.fit(stop_requested or (lambda: False))
    scale = data.scale
    head = RewardHead(
        rating_mean=None if scale is None else scale.mean,
        rating_scale=None if scale is None else scale.scale,
        max_length=max_length,
    ).normalised_on(raw_N)
    reward = RewardModel(scorer, chat, head)
    heldout = evaluate_reward(reward, pairs, heldout_pairs, heldout_ratings, scale=scale, observer=observer)
    observer.metrics(headline(heldout), run.progress.step)
    result = run.result(head, heldout)
    release_memory()
    if world()[0] == 0:
        reward.save(out, like=model)
        (out / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n")
    return result


def evaluate_reward(
    reward: RewardModel,
    pairs: Sequence[Preference],
    heldout_pairs: Sequence[Preference],
    heldout_ratings: Sequence[Rating],
    *,
    scale: RatingScale | None = None,
    observer: Observer | None = None,
) -> RewardEvaluation:
    """Measure a reward model on held-out preferences and ratings.

    Args:
        reward: The model.
        pairs: Training preferences, which the TF-IDF baseline is fitted on.
        heldout_pairs: Preferences to measure on.
        heldout_ratings: Ratings to measure on.
        scale: The training ratings' scale, if the model was fitted to ratings.
        observer: Told the progress.
    """
    observer = observer or NullObserver()
    limit = reward.head.max_length
    measured = encode_pairs(reward.chat, heldout_pairs, limit, use_margin=False)
    kept = [heldout_pairs[item.index] for item in measured.items]
    raw = raw_item_scores(reward.model, measured.items, reward.chat.pad_id, observer)
    figures = None
    if heldout_ratings:
        common = scale or RatingScale(*heldout_ratings[0].scale, mean=0.0, scale=1.0)
        rated = encode_ratings(reward.chat, heldout_ratings, limit, common)
        rated_raw = raw_item_scores(reward.model, rated.items, reward.chat.pad_id, observer)
        values_N = common.common([heldout_ratings[item.index] for item in rated.items])
        figures = rating_figures(np.array([own[0] for own in rated_raw]), values_N, reward.head)
    return evaluate_pairs(
        kept,
        np.array(raw).reshape(-1, 2),
        np.array([[len(ids) for ids in item.responses] for item in measured.items]).reshape(-1, 2),
        head=reward.head,
        dropped=measured.dropped,
        tfidf=tfidf_baseline(pairs, kept),
        ratings=figures,
    )


@dataclass(frozen=True, slots=True)
class _Data:
    items: list[Item]
    pairs: int
    ratings: int
    dropped: int
    cut: int
    scale: RatingScale | None


def _encode(
    chat: Chat, pairs: Sequence[Preference], ratings: Sequence[Rating], spec: RewardSpec, max_length: int
) -> _Data:
    """What the objective learns from, as items."""
    scale = RatingScale.fit(ratings) if spec.objective != "pairwise" else None
    compared = encode_pairs(chat, pairs, max_length, use_margin=spec.use_margin)
    if spec.objective == "pointwise":
        compared = Items([])
    elif not compared.items:
        raise DataError(
            "the objective needs preferences and none in the training split fits",
            key="reward.objective",
            value=spec.objective,
            fix="add a preferences source, raise reward.max_length, or use objective 'pointwise'",
        )
    rated = encode_ratings(chat, ratings, max_length, scale) if scale is not None else Items([])
    if scale is not None and not rated.items:
        raise DataError("no rated response fits", key="reward.max_length", value=max_length, fix="raise it")
    return _Data(
        items=join_ratings(compared.items, rated.items),
        pairs=len(compared.items),
        ratings=len(rated.items),
        dropped=compared.dropped + rated.dropped,
        cut=compared.cut + rated.cut,
        scale=scale,
    )


@dataclass
class _Progress:
    """What a checkpoint holds beside weights and random state."""

    step: int = 0
    tokens: int = 0
    items: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    bad_in_a_row: int = 0


class _Run:
    """One training run: the plan, the loop, and its state."""

    def __init__(
        self,
        spec: RewardSpec,
        model: Any,
        chat: Chat,
        data: _Data,
        seed: int,
        observer: Observer,
        sharding: Sharding,
    ) -> None:
        self.spec = spec
        self.sharding = sharding
        self.model = model
        self.chat = chat
        self.data = data
        self.seed = seed
        self.observer = observer
        self.folder: CheckpointFolder | None = None
        self.progress = _Progress()
        self.resumed_from: int | None = None
        self.ridge: float | None = None
        self.optimizer: Optimizer | None = None
        self.in_step = False
        # Expected pairs and ratings an item, see the module's docstring.
        self.pair_share = data.pairs / len(data.items)
        self.rating_share = data.ratings / len(data.items)

    def fit(self, stop_requested: Callable[[], bool]) -> np.ndarray:
        """Train, and return raw scores of training responses for the normalisation."""
        if self.spec.trunk == "frozen":
            return self._fit_frozen()
        self._fit_trunk(stop_requested)
        # One more epoch's order: a sample that is the same whenever the run is.
        order = shuffled(len(self.data.items), seed=self.seed, epoch=self.spec.epochs)[:_NORMALISING_ITEMS]
        chosen = [self.data.items[index] for index in order]
        return np.concatenate(raw_item_scores(self.model, chosen, self.chat.pad_id, self.observer))

    def _fit_frozen(self) -> np.ndarray:
        started = time.perf_counter()
        items = self.data.items
        fitted, features = self._probe()
        self.progress = _Progress(
            tokens=sum(item.tokens for item in items),
            items=len(items),
            seconds=time.perf_counter() - started,
            losses=[fitted.loss],
        )
        # With the head as it was rounded to the model's precision.
        weight_D: np.ndarray = self.model.score.weight[0].detach().double().cpu().numpy()
        return np.asarray(np.concatenate(features) @ weight_D)

    def _probe(self) -> tuple[FittedHead, list[np.ndarray]]:
        """Fit the head on the trunk as it is; also returns the training items' features."""
        items = self.data.items
        features = item_features(self.model, items, self.chat.pad_id, self.observer)
        fitted = fit_head(items, features, self.spec, seed=self.seed)
        with torch.no_grad():
            self.model.score.weight.copy_(torch.from_numpy(fitted.weight_D)[None])
        self.ridge = fitted.ridge
        return fitted, features

    def _fit_trunk(self, stop_requested: Callable[[], bool]) -> None:
        spec = self.spec
        if spec.probe_first:
            self._probe()
        adapted = add_lora(self.model, spec.lora, key="reward.lora") if spec.trunk == "lora" else None
        if spec.gradient_checkpointing:
            checkpoint_activations(self.model)
        sharded = ShardedModel(self.model, self.sharding)
        self.model, self.in_step = sharded.model, sharded.sharded
        plan: list[list[int]] = []
        for epoch in range(spec.epochs):
            order = shuffled(len(self.data.items), seed=self.seed, epoch=epoch)
            plan += steps_of_rows(order, spec.batch_pairs)
        plan = plan[: spec.max_steps]
        every = spec.checkpoint_every or max(1, len(plan) // _CHECKPOINTS)
        optimizer = Optimizer(
            self.model.named_parameters(), spec, learning_rate=spec.peak_learning_rate, total_steps=len(plan)
        )
        self.optimizer = optimizer
        self._resume()
        state = self.progress
        while state.step < len(plan):
            if agreed(stop_requested()):
                self._save()
                raise TrainingStoppedError(
                    f"reward model training was stopped at step {state.step} of {len(plan)}",
                    fix="start it again with the same checkpoint folder" if self.folder else "give a checkpoint folder",
                )
            self._step(optimizer, plan[state.step])
            self.observer.progress(state.step, len(plan), "step", "reward model")
            if state.step % every == 0 or state.step == len(plan):
                self._save()
        self.model = sharded.whole()
        if adapted is not None:
            merge_lora(adapted)

    def _step(self, optimizer: Optimizer, indices: list[int]) -> None:
        started = time.perf_counter()
        state = self.progress
        step_items = [self.data.items[index] for index in indices]
        own = share(step_items)
        # Loss, pairs ranked right (ties half), pairs: summed over ranks.
        totals = torch.zeros(3, dtype=torch.float64)
        budget = microbatch_budget(self.spec.microbatch_tokens, self.model.score.weight.device)
        seed_step(self.seed, state.step)
        parts = [[own[i] for i in group] for group in token_budget_batches([item.tokens for item in own], budget)]
        for part, weight in in_step(parts, step_items[:1], needed=self.in_step):
            loss, right, pairs = self._loss(part, len(step_items))
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            totals += weight * torch.tensor([float(loss.detach()), right, pairs], dtype=torch.float64)
        report = optimizer.step()
        loss_sum, right_sum, pair_count = sum_over_ranks(totals).tolist()
        seconds = time.perf_counter() - started
        state.step += 1
        state.items += len(step_items)
        state.tokens += sum(item.tokens for item in step_items)
        state.seconds += seconds
        state.losses.append(loss_sum)
        state.bad_in_a_row = state.bad_in_a_row + 1 if report.skipped else 0
        if state.bad_in_a_row >= _HOPELESS:
            raise TrainingError(
                f"the gradient was not finite {_HOPELESS} steps in a row",
                key="reward.learning_rate",
                value=self.spec.peak_learning_rate,
                fix="lower the learning rate, or check the data for broken rows",
            )
        figures = {
            "reward/loss": loss_sum,
            "reward/learning_rate": report.learning_rate,
            "reward/gradient_norm": report.gradient_norm,
            "reward/skipped_steps": optimizer.skipped_steps,
            "reward/items_per_second": len(step_items) / seconds,
        }
        if pair_count:
            figures["reward/accuracy"] = right_sum / pair_count
        self.observer.metrics(figures, state.step)

    def _loss(self, items: Sequence[Item], step_size: int) -> tuple[Tensor, float, int]:
        """The step's loss as far as these items go, and how many of its pairs are ranked right."""
        spec = self.spec
        scores = score_items(self.model, items, self.chat.pad_id)
        by_item = torch.split(scores, [len(item.responses) for item in items])
        loss = scores.sum() * 0.0
        right = 0.0
        pairs = [(own, item) for own, item in zip(by_item, items, strict=True) if item.margin is not None]
        rated = [
            (own[response], value)
            for own, item in zip(by_item, items, strict=True)
            for response, values in enumerate(item.ratings)
            for value in values
        ]
        if pairs and spec.objective != "pointwise":
            chosen_B = torch.stack([own[0] for own, _ in pairs])
            rejected_B = torch.stack([own[1] for own, _ in pairs])
            margin_B = torch.tensor([item.margin or 0.0 for _, item in pairs], device=scores.device)
            losses_B = pairwise_loss(chosen_B, rejected_B, margin_B, centering=spec.centering)
            weight = spec.alpha if spec.objective == "joint" else 1.0
            loss = loss + weight * losses_B.sum() / (self.pair_share * step_size)
            right = float(((chosen_B - rejected_B).detach().sign() + 1).sum() / 2)
        if rated and spec.objective != "pairwise":
            raw_B = torch.stack([score for score, _ in rated])
            target_B = torch.tensor([value for _, value in rated], device=scores.device)
            losses_B = pointwise_loss(raw_B, target_B, huber_delta=spec.huber_delta)
            weight = 1.0 - spec.alpha if spec.objective == "joint" else 1.0
            loss = loss + weight * losses_B.sum() / (self.rating_share * step_size)
        return loss, right, len(pairs)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None or self.optimizer is None:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
            "progress": dict(vars(self.progress)),
        }
        if world()[0] == 0:
            self.folder.save(self.progress.step, state)

    def _resume(self) -> None:
        found = self.folder.latest() if self.folder is not None else None
        if found is None or self.optimizer is None:
            return
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.progress = _Progress(**found.state["progress"])
        set_rng_state(found.state["rng"])
        self.resumed_from = found.step
        self.observer.note(f"reward model training goes on from the checkpoint at step {found.step}")

    # -- the result -----------------------------------------------------------------------------------------------

    def result(self, head: RewardHead, heldout: RewardEvaluation) -> RewardResult:
        """The figures of the run."""
        spec, state, data = self.spec, self.progress, self.data
        tail = state.losses[-max(1, len(state.losses) // 10) :]
        frozen = spec.trunk == "frozen"
        width = int(self.model.score.weight.numel())
        return RewardResult(
            objective=spec.objective,
            trunk=spec.trunk,
            precision=precision_of(self.model),
            learning_rate=0.0 if frozen else spec.peak_learning_rate,
            ridge=self.ridge,
            trained_parameters=width if self.optimizer is None else self.optimizer.trained_parameters,
            steps=state.step,
            skipped_steps=0 if self.optimizer is None else self.optimizer.skipped_steps,
            resumed_from=self.resumed_from,
            pairs=data.pairs,
            ratings=data.ratings,
            dropped=data.dropped,
            cut=data.cut,
            tokens=state.tokens,
            seconds=state.seconds,
            pairs_per_second=state.items / state.seconds if state.seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
            final_loss=sum(tail) / len(tail) if tail else None,
            gain=head.gain,
            bias=head.bias,
            rating_mean=head.rating_mean,
            rating_scale=head.rating_scale,
            heldout=heldout,
        )
