"""Training a reward model on preferences, ratings, or both.

An optimizer step is a set of items: pairs, whose responses may be rated as well, and single rated responses. Losses are
weighted by the expected number of pairs and ratings a step, so that over an epoch every pair weighs the same and every
rating weighs the same, whatever the mixture of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from tunegate.training.config import HeadSpec, RewardSpec, Sharding
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
from tunegate.training.results import RewardEvaluation, RewardResult, Share
from tunegate.training.reward_data import (
    Item,
    RatingScale,
    as_labels,
    encode_pairs,
    encode_ratings,
    join_rankings,
    join_ratings,
    resample,
    with_heads,
)
from tunegate.training.reward_evaluation import evaluate_pairs, headline, rating_figures, tfidf_baseline
from tunegate.training.reward_frozen import fit_head
from tunegate.training.reward_heads import join, save_heads, widen
from tunegate.training.reward_losses import pairwise_loss, pointwise_loss, sign_loss
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
    data = _encode(chat, pairs, ratings, spec, max_length, seed)
    scorer = load_sequence_scorer(model)
    widen(scorer, len(spec.heads))
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
    raw_HN = run.fit(stop_requested or (lambda: False))
    scale = data.scale
    head = RewardHead(
        rating_mean=None if scale is None else scale.mean,
        rating_scale=None if scale is None else scale.scale,
        max_length=max_length,
    )
    measured = pairs, heldout_pairs, heldout_ratings
    if not spec.heads:
        head = head.normalised_on(raw_HN[0])
        reward = RewardModel(scorer, chat, head)
        heldout = evaluate_reward(reward, *measured, scale=scale, observer=observer)
    else:
        # Every pair is judged by the head that it belongs to, and only then are the heads joined.
        heldout = evaluate_reward(
            RewardModel(scorer, chat, head), *measured, scale=scale, heads=spec.heads, observer=observer
        )
        scales, weight_HD, raw_N = join(scorer, spec.heads, raw_HN)
        head = replace(head.normalised_on(raw_N), heads=tuple(scales))
        reward = RewardModel(scorer, chat, head)
    observer.metrics(headline(heldout), run.progress.step)
    result = run.result(head, heldout)
    release_memory()
    if world()[0] == 0:
        reward.save(out, like=model)
        if spec.heads:
            save_heads(weight_HD, out)
        (out / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n")
    return result


def evaluate_reward(
    reward: RewardModel,
    pairs: Sequence[Preference],
    heldout_pairs: Sequence[Preference],
    heldout_ratings: Sequence[Rating],
    *,
    scale: RatingScale | None = None,
    heads: Sequence[HeadSpec] = (),
    observer: Observer | None = None,
) -> RewardEvaluation:
    """Measure a reward model on held-out preferences and ratings.

    Args:
        reward: The model.
        pairs: Training preferences, which the TF-IDF baseline is fitted on.
        heldout_pairs: Preferences to measure on.
        heldout_ratings: Ratings to measure on.
        scale: The training ratings' scale, if the model was fitted to ratings.
        heads: Of a model whose heads are not joined yet: each pair is scored by its own.
        observer: Told the progress.
    """
    observer = observer or NullObserver()
    limit = reward.head.max_length
    measured = encode_pairs(reward.chat, heldout_pairs, limit, use_margin=False)
    kept = [heldout_pairs[item.index] for item in measured.items]
    items = with_heads(measured.items, [pair.source for pair in heldout_pairs], heads)
    raw = raw_item_scores(reward.model, items, reward.chat.pad_id, observer)
    signs = [-1.0 if heads and heads[item.head].kind == "cost" else 1.0 for item in items]  # the worse costs more
    raw = [sign * own for sign, own in zip(signs, raw, strict=True)]
    figures = None
    if heldout_ratings:
        common = scale or RatingScale(*heldout_ratings[0].scale, mean=0.0, scale=1.0)
        rated = encode_ratings(reward.chat, heldout_ratings, limit, common)
        kept_ratings = with_heads(rated.items, [rating.source for rating in heldout_ratings], heads)
        kept_ratings = [item for item in kept_ratings if not heads or heads[item.head].kind == "reward"]
        rated_raw = raw_item_scores(reward.model, kept_ratings, reward.chat.pad_id, observer)
        values_N = common.common([heldout_ratings[item.index] for item in kept_ratings])
        figures = rating_figures(np.array([own[0] for own in rated_raw]), values_N, reward.head)
    found = evaluate_pairs(
        kept,
        np.array(raw).reshape(-1, 2),
        np.array([[len(ids) for ids in item.responses] for item in measured.items]).reshape(-1, 2),
        head=reward.head,
        dropped=measured.dropped,
        tfidf=tfidf_baseline(pairs, kept),
        ratings=figures,
    )
    right = [0.5 * (float(np.sign(own[0] - own[1])) + 1.0) for own in raw]
    by_head = {}
    for number, head in enumerate(heads):
        own = [value for value, item in zip(right, items, strict=True) if item.head == number]
        by_head[head.name] = Share.of(sum(own), len(own))
    return found.model_copy(update={"by_head": by_head})


@dataclass(frozen=True, slots=True)
class _Data:
    """What is learned from; the counts are of items with comparisons, of comparisons, ratings and labels in them."""

    items: list[Item]
    compared: int
    pairs: int
    ratings: int
    labels: int
    dropped: int
    cut: int
    scale: RatingScale | None


def _encode(
    chat: Chat, pairs: Sequence[Preference], ratings: Sequence[Rating], spec: RewardSpec, max_length: int, seed: int
) -> _Data:
    """What the objective learns from, as items."""
    costs = {source for head in spec.heads if head.kind == "cost" for source in head.sources}
    predicted = [rating for rating in ratings if rating.source not in costs]
    scale = RatingScale.fit(predicted) if spec.objective != "pairwise" else None
    compared = encode_pairs(chat, pairs, max_length, use_margin=spec.use_margin)
    compared_items = with_heads(compared.items, [pair.source for pair in pairs], spec.heads)
    if spec.objective == "pointwise":
        compared_items = [item for item in compared_items if spec.heads and spec.heads[item.head].kind == "cost"]
    elif not compared.items:
        raise DataError(
            "the objective needs preferences and none in the training split fits",
            key="reward.objective",
            value=spec.objective,
            fix="add a preferences source, raise reward.max_length, or use objective 'pointwise'",
        )
    if spec.rankings:
        compared_items = join_rankings(compared_items)
    # Without a scale only the labels of costs are read, as they are.
    wanted = ratings if scale is not None else [rating for rating in ratings if rating.source in costs]
    rated = encode_ratings(chat, wanted, max_length, scale or RatingScale(0.0, 1.0, 0.0, 1.0))
    rated_items = as_labels(with_heads(rated.items, [r.source for r in wanted], spec.heads), wanted, spec.heads)
    if scale is not None and not rated.items:
        raise DataError("no rated response fits", key="reward.max_length", value=max_length, fix="raise it")
    items = join_ratings(compared_items, rated_items)
    items = resample(items, seed) if spec.bootstrap else items
    return _Data(
        items=items,
        compared=sum(bool(item.compared) for item in items),
        pairs=sum(len(item.compared) for item in items),
        ratings=sum(len(values) for item in items for values in item.ratings),
        labels=sum(len(values) for item in items for values in item.labels),
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
        # Expected pairs (or rankings), ratings and labels an item, see the module's docstring.
        self.pair_share = data.compared / len(data.items)
        self.rating_share = data.ratings / len(data.items)
        self.label_share = data.labels / len(data.items)

    def fit(self, stop_requested: Callable[[], bool]) -> np.ndarray:
        """Train, and return every head's raw scores of training responses, [H, N], for the normalisation."""
        if self.spec.trunk == "frozen":
            return self._fit_frozen()
        self._fit_trunk(stop_requested)
        # One more epoch's order: a sample that is the same whenever the run is.
        order = shuffled(len(self.data.items), seed=self.seed, epoch=self.spec.epochs)[:_NORMALISING_ITEMS]
        chosen = [self.data.items[index] for index in order]
        if not self.spec.heads:
            return np.concatenate(raw_item_scores(self.model, chosen, self.chat.pad_id, self.observer))[None]
        features = item_features(self.model, chosen, self.chat.pad_id, self.observer)
        return np.asarray(self._heads() @ np.concatenate(features).T)

    def _heads(self) -> np.ndarray:
        """Weights of the heads as they were rounded to the model's precision, [H, D]."""
        weight_HD: np.ndarray = self.model.score.weight.detach().double().cpu().numpy()
        return weight_HD

    def _fit_frozen(self) -> np.ndarray:
        started = time.perf_counter()
        items = self.data.items
        loss, features = self._probe()
        self.progress = _Progress(
            tokens=sum(item.tokens for item in items),
            items=len(items),
            seconds=time.perf_counter() - started,
            losses=[loss],
        )
        return np.asarray(self._heads() @ np.concatenate(features).T)

    def _probe(self) -> tuple[float, list[np.ndarray]]:
        """Fit the heads on the trunk as it is; returns their mean loss and the training items' features."""
        items = self.data.items
        features = item_features(self.model, items, self.chat.pad_id, self.observer)
        losses = []
        for head in range(max(1, len(self.spec.heads))):
            own = [index for index, item in enumerate(items) if item.head == head]
            if not own:
                raise DataError(
                    "no training preference or rating is from the sources of this head",
                    key="reward.heads",
                    value=self.spec.heads[head].name,
                    fix="check the names of the sources",
                )
            fitted = fit_head([items[i] for i in own], [features[i] for i in own], self.spec, seed=self.seed)
            with torch.no_grad():
                self.model.score.weight[head].copy_(torch.from_numpy(fitted.weight_D))
            losses.append(fitted.loss)
            self.ridge = fitted.ridge if not self.spec.heads else None
        return sum(losses) / len(losses), features

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
        pairs = [
            (own[better], own[worse], margin, 1.0 / len(item.compared))
            for own, item in zip(by_item, items, strict=True)
            for better, worse, margin in item.compared
        ]
        labelled = [
            (own[response], sign)
            for own, item in zip(by_item, items, strict=True)
            for response, signs in enumerate(item.labels)
            for sign in signs
        ]
        rated = [
            (own[response], value)
            for own, item in zip(by_item, items, strict=True)
            for response, values in enumerate(item.ratings)
            for value in values
        ]
        if pairs and spec.objective != "pointwise":
            chosen_B = torch.stack([better for better, _, _, _ in pairs])
            rejected_B = torch.stack([worse for _, worse, _, _ in pairs])
            margin_B = torch.tensor([margin for _, _, margin, _ in pairs], device=scores.device)
            share_B = torch.tensor([share for _, _, _, share in pairs], device=scores.device)
            losses_B = share_B * pairwise_loss(chosen_B, rejected_B, margin_B, centering=spec.centering)
            weight = spec.alpha if spec.objective == "joint" else 1.0
            loss = loss + weight * losses_B.sum() / (self.pair_share * step_size)
            right = float(((chosen_B - rejected_B).detach().sign() + 1).sum() / 2)
        if rated and spec.objective != "pairwise":
            raw_B = torch.stack([score for score, _ in rated])
            target_B = torch.tensor([value for _, value in rated], device=scores.device)
            losses_B = pointwise_loss(raw_B, target_B, huber_delta=spec.huber_delta)
            weight = 1.0 - spec.alpha if spec.objective == "joint" else 1.0
            loss = loss + weight * losses_B.sum() / (self.rating_share * step_size)
        if labelled:
            cost_B = torch.stack([score for score, _ in labelled])
            sign_B = torch.tensor([float(sign) for _, sign in labelled], device=scores.device)
            loss = loss + sign_loss(cost_B, sign_B).sum() / (self.label_share * step_size)
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
            labels=data.labels,
            heads=[head.name for head in spec.heads],
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
