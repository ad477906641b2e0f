"""PPO: from a policy, a reward model and prompts to a better policy (arXiv 1707.06347, 1909.08593, 2403.17031).

`train_ppo` is the stage; `_Run` is one run of it: load, measure the reference, loop over updates, keep the best. The
mathematics is in `advantages`, `losses`, `kl` and `update`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tunegate.data.records import Prompt
from tunegate.errors import TrainingError, TrainingStoppedError
from tunegate.observer import NullObserver, Observer
from tunegate.storage.manifest import digest_json
from tunegate.training.advantages import explained_variance, masked_mean, regression_line
from tunegate.training.batching import shuffled
from tunegate.training.best import BestWeights
from tunegate.training.checkpoint import CheckpointFolder, model_digest, seed_everything
from tunegate.training.config import Sharding
from tunegate.training.heldout import Measurement, by_source, examples, measure, paired_difference
from tunegate.training.kl import KLController, LagrangeMultiplier
from tunegate.training.measure import peak_memory_bytes
from tunegate.training.mirror import Mirror
from tunegate.training.optim import Optimizer
from tunegate.training.policy import Policy
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.ppo_results import PPOResult, RewardScale, UpdateSummary, WatchdogEvent
from tunegate.training.ppo_setup import check_prompts, fitting_prompts, make_critic, make_scorers, optimizer_spec
from tunegate.training.ppo_state import PPOState
from tunegate.training.ranks import agreed, gather, share, world
from tunegate.training.scoring import (
    Rollout,
    Signal,
    gathered,
    score_policy,
    set_values,
)
from tunegate.training.update import (
    Learner,
    UpdateFigures,
    final_rewards,
    ppo_update,
    set_advantages,
    set_group_advantages,
    warm_up_critic,
)
from tunegate.training.watchdogs import Alarm, RolloutSigns, Watchdogs, distinct_2, identical_share

RESULT_FILE = "training.json"

# What a draw is for; with the run's seed the first part of the seed of its noise.
_ROLLOUT, _HELDOUT, _REFERENCE = 1, 2, 3


def train_ppo(
    policy: Path,
    reward: Path | None,
    prompts: Sequence[Prompt],
    heldout_prompts: Sequence[Prompt],
    out: Path,
    *,
    spec: PPOSpec,
    seed: int,
    observer: Observer | None = None,
    checkpoints: Path | None = None,
    mirror: Mirror | None = None,
    judge: Path | None = None,
    stop_requested: Callable[[], bool] | None = None,
    sharding: Sharding = "none",
) -> PPOResult:
    """Train a policy against a reward model and write the result as a plain model folder with `training.json`.

    Args:
        policy: Folder of the model to start from; it is the reference as well.
        reward: Folder of the reward model; may be None with `reward_function`.
        prompts: To train on.
        heldout_prompts: To measure on, with the same noise before, during and after.
        out: Folder to write.
        spec: The `ppo` section.
        seed: Of adapters, prompts, responses and orders.
        observer: Told figures by update, progress and remarks.
        checkpoints: Folder to resume from and to write checkpoints to; unset means neither.
        mirror: Where copies of the checkpoints go, so that another machine can resume.
        judge: Folder of a second reward model, which PPO does not train on: it tells learning from reward hacking.
        stop_requested: Asked before each update; when true, a checkpoint is written and training stops.
        sharding: What the processes of a `torchrun` share, see `DistributedSpec`.

    Raises:
        DataError: If no prompt, or fewer than two held-out prompts, fit.
        SpecError: If a reward function does not exist, or reward models are missing.
        TrainingStoppedError: If `stop_requested` said so.
        TrainingError: If the reward tells no two responses apart or gradients stay not finite.
    """
    seed_everything(seed)
    run = _Run(policy, reward, judge, prompts, heldout_prompts, out, spec, seed, observer or NullObserver(), sharding)
    if checkpoints is not None:
        parts = ["ppo", spec.model_dump(mode="json"), seed, *(model_digest(p) for p in (policy, reward, judge) if p)]
        ids = [[prompt.id for prompt in group] for group in (run.prompts, run.heldout)]
        run.folder = CheckpointFolder(
            checkpoints,
            fingerprint=digest_json([*parts, *ids]),
            keep=spec.keep_checkpoints,
            observer=run.observer,
            mirror=mirror,
        )
    run.start()
    run.loop(stop_requested or (lambda: False))
    after = run.keep()
    result = run.result(after)
    if world()[0] == 0:
        run.policy.save(out)
        (out / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n")
    return result


class _Run:
    """One training run."""

    def __init__(
        self,
        policy: Path,
        reward: Path | None,
        judge: Path | None,
        prompts: Sequence[Prompt],
        heldout: Sequence[Prompt],
        out: Path,
        spec: PPOSpec,
        seed: int,
        observer: Observer,
        sharding: Sharding,
    ) -> None:
        self.spec = spec
        self.sharding = sharding
        self.seed = seed
        self.observer = observer
        self.updates = spec.steps if spec.enabled else 0
        self.folder: CheckpointFolder | None = None
        self.resumed_from: int | None = None
        self.stopped: str | None = None
        self.started = time.perf_counter()

        self.policy = Policy(policy, spec, sharding)
        self.scorers = make_scorers(reward, judge, spec)
        self.prompts = fitting_prompts(prompts, self.policy, self.scorers)
        self.heldout = fitting_prompts(heldout, self.policy, self.scorers)[: spec.evaluate_prompts]
        self.dropped = len(prompts) - len(self.prompts)
        check_prompts(
            {"prompts": self.prompts, "heldout_prompts": self.heldout},
            {"prompts": len(prompts), "heldout_prompts": len(heldout)},
            spec,
        )
        self.signals = tuple(name for name in ("reward", "cost") if name in self.scorers)
        self.state = self._first_state(reward, out)

    def _first_state(self, reward: Path | None, out: Path) -> PPOState:
        """The state before anything was done."""
        spec, cost = self.spec, self.spec.cost
        steps = max(1, self.updates * spec.epochs * spec.minibatches)
        sources = {"reward": reward, "cost": Path(cost.model) if cost and cost.model else None}
        learners: dict[str, Learner] = {}
        for name, source in sources.items():
            if name in self.scorers and not spec.grouped:
                critic = make_critic(self.scorers[name], source, self.policy, self.observer, self.sharding)
                optimizer = Optimizer(
                    critic.module.named_parameters(),
                    optimizer_spec(spec),
                    learning_rate=spec.value_learning_rate,
                    total_steps=steps,
                )
                learners[name] = Learner(critic, optimizer)
        optimizer = Optimizer(
            self.policy.model.named_parameters(),
            optimizer_spec(spec),
            learning_rate=spec.policy_learning_rate,
            total_steps=steps,
        )
        return PPOState(
            policy_optimizer=optimizer,
            best_weights=BestWeights(optimizer, out),
            learners=learners,
            kl=KLController.from_spec(spec.kl),
            watchdogs=Watchdogs(spec.watchdogs),
            multiplier=(
                LagrangeMultiplier(cost.multiplier, cost.limit, cost.multiplier_rate, cost.multiplier_cap)
                if cost is not None
                else None
            ),
        )

    # -- before the first update ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Resume from a checkpoint, or look at the reference: scale of the scores, critic, held-out prompts."""
        state = self.state
        found = self.folder.latest() if self.folder is not None else None
        if found is not None:
            state.load_state_dict(found.state)
            self.resumed_from = found.step
            self.observer.note(f"PPO goes on from the checkpoint at update {found.step}")
            self._apply_standardisation()
            self.policy.refresh()
            return
        sample = self._collect(
            [self.prompts[index] for index in shuffled(len(self.prompts), seed=self.seed, epoch=-1 % 2**32)][
                : self.spec.shaping.standardise_prompts
            ],
            [self.seed, _REFERENCE],
        )
        self._warm_up(sample)
        with self._clock("evaluate"):
            state.reference = self._measure()
        state.best = state.reference
        state.best_weights.keep()
        state.candidates = 1

    def _warm_up(self, sample: Rollout) -> None:
        """Fit the critics to what the reference's own responses are worth, before the policy moves.

        A reward model reads unfinished responses on another scale than finished ones, so first its reading is put on
        the scale of the returns by a straight line; then the critic is trained on them.
        """
        spec, state, pad_id = self.spec, self.state, self.policy.chat.pad_id
        if not self.updates or not state.learners:
            return
        # With lambda = 1 the returns are what was earned, whatever the critic says.
        earned = spec.model_copy(update={"gae_lambda": 1.0})
        self._set_values(sample)
        set_advantages(sample, earned, beta=0.0, multiplier=state.multiplier.value if state.multiplier else None)
        for name, learner in state.learners.items():
            signal, critic = sample.signals[name], learner.critic
            slope, intercept = regression_line(signal.values_BT, signal.returns_BT, sample.mask_BT)
            critic.gain, critic.bias = slope * critic.gain, slope * critic.bias + intercept
            state.critic_scales[name] = [critic.gain, critic.bias]
            if spec.critic_warmup_epochs:
                warm_up_critic(
                    learner, sample, name, spec, pad_id=pad_id, epochs=spec.critic_warmup_epochs, seed=self.seed
                )
            set_values(sample, signal, critic, pad_id=pad_id, budget=spec.microbatch_tokens)
            fit = explained_variance(signal.values_BT, signal.returns_BT, sample.mask_BT)
            self.observer.note(
                f"{name} critic: explains {fit:.2f} of what the reference's {len(sample)} responses earned, after "
                f"{spec.critic_warmup_epochs} warm-up epochs on them"
            )

    # -- the loop -------------------------------------------------------------------------------------------------

    def loop(self, stop_requested: Callable[[], bool]) -> None:
        """Make all updates, or stop where a watchdog says so."""
        spec, state = self.spec, self.state
        while state.update < self.updates and self.stopped is None:
            self._stop_if_asked(stop_requested)
            self._update(stop_requested)
            last = state.update == self.updates
            if self.stopped is None and (last or state.update % spec.evaluate_every == 0):
                self._evaluate()
            every = spec.checkpoint_every or spec.evaluate_every
            if self.stopped is None and (last or state.update % every == 0):
                self._save()
            self.observer.progress(state.update, self.updates, "update", "PPO")

    def _stop_if_asked(self, stop_requested: Callable[[], bool]) -> None:
        """Write a checkpoint and end, if somebody wants it; only where the state is that of whole updates."""
        if agreed(stop_requested()):
            self._save()
            raise TrainingStoppedError(
                f"PPO was stopped at update {self.state.update} of {self.updates}",
                fix="start it again with the same checkpoint folder" if self.folder else "give a checkpoint folder",
            )

    def _update(self, stop_requested: Callable[[], bool]) -> None:
        """Draw a rollout, look at it, learn from it."""
        spec, state = self.spec, self.state
        before = dict(state.seconds)
        rollout = self._collect(self._next_prompts(), [self.seed, _ROLLOUT, state.update])
        self._stop_if_asked(stop_requested)  # nothing has changed yet; the same rollout is drawn again
        cost = None
        if state.multiplier is not None:
            cost = _mean(rollout.signals["cost"].scores_B)
            state.multiplier.update(cost)
        multiplier = state.multiplier.value if state.multiplier is not None else None
        beta = state.kl.coefficient
        self._set_values(rollout, keep_first_pass=self._first_pass_serves)
        find_advantages = set_group_advantages if spec.grouped else set_advantages
        advantages_BT = find_advantages(
            rollout, spec, beta=beta if spec.kl.placement == "reward" else 0.0, multiplier=multiplier
        )
        signs = self._signs(rollout)
        alarms = state.watchdogs.after_rollout(signs)
        state.update += 1
        figures, rate = UpdateFigures(), 0.0
        if not self._react(alarms):
            with self._clock("update"):
                for optimizer in state.optimizers.values():
                    # The rates follow the updates, whether or not an earlier one ended before its last step.
                    optimizer.step_count = (state.update - 1) * spec.epochs * spec.minibatches
                figures = ppo_update(
                    self.policy,
                    state.policy_optimizer,
                    state.learners,
                    rollout,
                    advantages_BT,
                    spec,
                    beta=beta,
                    seed=self.seed,
                    update=state.update - 1,
                )
                self.policy.refresh()
            rate = state.policy_optimizer.learning_rate * _remaining(spec, state.update - 1, self.updates)
            state.kl.update(signs.kl, spec.responses_per_update)
            self._count_bad_steps(figures)
        state.response_tokens += round(signs.length * spec.responses_per_update)
        summary = UpdateSummary(
            update=state.update,
            reward=_mean(final_rewards(rollout, spec)),
            score=_mean(rollout.signals["reward"].scores_B),
            cost=cost,
            kl=signs.kl,
            entropy=signs.entropy,
            length=signs.length,
            finished=_mean(rollout.finished_B),
            policy_loss=figures.policy_loss,
            value_loss=figures.value_loss.get("reward", 0.0),
            clip_fraction=figures.clip_fraction,
            divergence=figures.divergence,
            explained_variance=signs.explained_variance,
            gradient_norm=figures.policy_norm,
            learning_rate=rate,
            kl_coefficient=beta,
            multiplier=multiplier,
            steps=figures.steps,
            skipped_steps=figures.skipped,
            stopped_early=figures.stopped_early,
            sampling_gap=_sampling_gap(rollout),
            seconds_generate=state.seconds["generate"] - before["generate"],
            seconds_score=state.seconds["score"] - before["score"],
            seconds_update=state.seconds["update"] - before["update"],
        )
        state.history.append(summary)
        self.observer.metrics(_numbers("ppo", summary.model_dump()), state.update)
        self.observer.metrics(self._scores_by_source(rollout), state.update)

    def _signs(self, rollout: Rollout) -> RolloutSigns:
        """What the watchdogs look at."""
        texts = gather([completion.text for completion in rollout.completions], self.spec.responses_per_update)
        signal = rollout.signals["reward"]
        return RolloutSigns(
            kl=_mean((rollout.old_logprobs_BT - rollout.reference_logprobs_BT).sum(dim=1)),
            entropy=float(masked_mean(rollout.entropy_BT, rollout.mask_BT)),
            length=_mean(rollout.lengths_B),
            distinct_2=distinct_2(texts),
            identical=identical_share(texts),
            explained_variance=explained_variance(signal.values_BT, signal.returns_BT, rollout.mask_BT),
        )

    def _set_values(self, rollout: Rollout, *, keep_first_pass: bool = False) -> None:
        """Let every critic say its V_old."""
        with self._clock("score"):
            for name, learner in self.state.learners.items():
                set_values(
                    rollout,
                    rollout.signals[name],
                    learner.critic,
                    pad_id=self.policy.chat.pad_id,
                    budget=self.spec.microbatch_tokens,
                    keep_first_pass=keep_first_pass,
                )

    def _evaluate(self) -> None:
        """Measure the policy on the held-out prompts and remember it if it is the best within the KL limit."""
        state = self.state
        reference, best = state.reference, state.best
        assert reference is not None and best is not None  # set by `start`
        with self._clock("evaluate"):
            found = self._measure()
        if found.mean("kl") <= self.spec.kl.limit:
            state.candidates += 1
            if found.mean("reward") > best.mean("reward"):
                state.best = found
                state.best_weights.keep()
        state.latest = found
        judge_change = found.array("judge") - reference.array("judge") if "judge" in found.values else None
        self._react(state.watchdogs.after_evaluation(found.array("score") - reference.array("score"), judge_change))

    def _react(self, alarms: Sequence[Alarm]) -> bool:
        """Do what the spec says about trouble.

        Returns:
            True if this update's rollout must not be learned from.
        """
        spec, state = self.spec, self.state
        for alarm in alarms:
            action: Literal["stop", "back_off", "warn"] = spec.watchdogs.action
            if action == "back_off" and state.watchdogs.alarms[alarm.name] > 1:
                action = "stop"
            state.events.append(
                WatchdogEvent(update=state.update, name=alarm.name, message=alarm.message, action=action)
            )
            self.observer.note(f"watchdog {alarm.name} at update {state.update} ({action}): {alarm.message}")
            if action == "stop":
                self.stopped = alarm.name
                return True
            if action == "back_off":
                state.best_weights.put_back()
                state.policy_optimizer.learning_rate *= 0.5
                state.kl.coefficient *= 2.0
                self.policy.refresh()
                return True
        return False

    def _count_bad_steps(self, figures: UpdateFigures) -> None:
        state = self.state
        state.bad_in_a_row = state.bad_in_a_row + figures.skipped if figures.skipped == figures.steps else 0
        if state.bad_in_a_row >= self.spec.max_bad_steps:
            raise TrainingError(
                f"the gradient was not finite {state.bad_in_a_row} steps in a row",
                key="ppo.learning_rate",
                value=self.spec.policy_learning_rate,
                fix="lower the learning rate, or set precision: fp32",
            )

    # -- rollouts -------------------------------------------------------------------------------------------------

    def _next_prompts(self) -> list[Prompt]:
        """The prompts of the next rollout: one epoch's permutation after another."""
        count, size = len(self.prompts), self.spec.prompts_per_update
        first = self.state.update * size
        epochs: dict[int, list[int]] = {}
        chosen = []
        for number in range(first, first + size):
            epoch = number // count
            if epoch not in epochs:
                epochs[epoch] = shuffled(count, seed=self.seed, epoch=epoch)
            # The responses to one prompt stand together.
            chosen += [self.prompts[epochs[epoch][number % count]]] * (self.spec.responses_per_update // size)
        return chosen

    def _collect(self, prompts: Sequence[Prompt], seed: list[int]) -> Rollout:
        """Draw a response to each prompt (this rank's share) and score it."""
        spec, policy = self.spec, self.policy
        numbers = share(range(len(prompts)))
        mine = [prompts[number].messages for number in numbers]
        rows = [policy.engine.encode(messages, spec.rollout_sampling) for messages in mine]
        with self._clock("generate"):
            completions = policy.engine.generate_ids(rows, spec.rollout_sampling, seed=seed, numbers=numbers)
        with self._clock("score"):
            shared = spec.critic == "shared_trunk" and not spec.grouped
            reads = {name: shared and self.scorers[name].can_read(policy.chat) for name in self.signals}
            rollout = score_policy(
                policy,
                rows,
                completions,
                temperature=spec.temperature,
                keep_reference_features=shared and not all(reads.values()),
                keep_first_pass=seed[1] == _ROLLOUT and self._first_pass_serves,
            )
            rollout.sources = [prompts[number].source for number in numbers]
            for name in self.signals:
                scorer = self.scorers[name]
                if reads[name]:
                    raw_KB, features = scorer.raw_with_features(mine, rows, completions)
                else:
                    raw_KB, features = scorer.raw(mine, completions), rollout.reference_features if shared else []
                if seed[1] == _REFERENCE and name == "reward":
                    self._standardise(gathered(raw_KB, len(prompts)))
                scores_B = torch.as_tensor(scorer.combined(raw_KB), dtype=torch.float32, device=policy.device)
                rollout.signals[name] = Signal(scores_B, features)
        return rollout

    @property
    def _first_pass_serves(self) -> bool:
        """True if the update's first step takes the whole rollout, with no more than log-probabilities asked of it."""
        spec = self.spec
        in_lockstep = self.policy.sharded or any(learner.critic.sharded for learner in self.state.learners.values())
        return spec.minibatches == 1 and spec.entropy_coefficient == 0.0 and not in_lockstep

    def _standardise(self, raw_KB: np.ndarray) -> None:
        """Set the scale of the scores from the reference's responses."""
        if self.spec.shaping.standardise:
            self.state.standardisation = standardisation = self.scorers["reward"].standardise_on(raw_KB)
            self.state.scale = [
                RewardScale(gain=gain, bias=bias, mean=float(row.mean()), deviation=float(row.std()), n=len(row))
                for gain, bias, row in zip(standardisation.gain, standardisation.bias, raw_KB, strict=True)
            ]
        self._apply_standardisation()

    def _apply_standardisation(self) -> None:
        """Give the scorer and the critics the scales in the state."""
        standardisation = self.state.standardisation
        if standardisation is not None:
            self.scorers["reward"].standardisation = standardisation
            if (learner := self.state.learners.get("reward")) is not None:
                learner.critic.gain, learner.critic.bias = standardisation.gain[0], standardisation.bias[0]
        for name, (gain, bias) in self.state.critic_scales.items():
            self.state.learners[name].critic.gain = gain
            self.state.learners[name].critic.bias = bias

    def _measure(self) -> Measurement:
        """Measure the policy on the held-out prompts."""
        found = measure(
            self.policy,
            self.heldout,
            self.scorers,
            self.spec,
            update=self.state.update,
            seed=[self.seed, _HELDOUT],
            observer=self.observer,
        )
        figures = found.figures()
        self.state.evaluations.append(figures)
        self.observer.metrics(_numbers("ppo/heldout", figures.model_dump()), self.state.update)
        return found

    def _scores_by_source(self, rollout: Rollout) -> dict[str, float]:
        """Mean standardised score of a rollout by source of the prompt."""
        total = self.spec.responses_per_update
        sources = gather(rollout.sources, total)
        scores = gather(rollout.signals["reward"].scores_B.tolist(), total)
        return {
            f"ppo/score/{source or 'unnamed'}": float(
                np.mean([score for score, other in zip(scores, sources, strict=True) if other == source])
            )
            for source in sorted(set(sources))
        }

    # -- state and result -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is not None:
            content = self.state.state_dict()  # every rank has its part in it
            if world()[0] == 0:
                self.folder.save(self.state.update, content)

    def keep(self) -> Measurement:
        """Go back to the best policy where the spec, or a watchdog, says so; its held-out measurement."""
        state = self.state
        assert state.best is not None  # set by `start`
        if self.spec.keep == "last" and self.stopped is None and state.latest is not None:
            return state.latest
        state.best_weights.put_back()
        self.policy.refresh()
        return state.best

    def result(self, after: Measurement) -> PPOResult:
        """The figures of the run."""
        spec, state, before = self.spec, self.state, self.state.reference
        assert before is not None  # set by `start`
        judged = "judge" in before.values
        gains = {
            name: paired_difference(before.array(name), after.array(name), seed=self.seed)
            for name in ("reward", "score", *(["judge"] if judged else []))
        }
        return PPOResult(
            method=spec.method if spec.enabled else "disabled",
            algorithm=spec.algorithm,
            critic="none" if spec.grouped else spec.critic,
            precision="bf16" if self.policy.head().weight_VD.dtype == torch.bfloat16 else "fp32",
            seed=self.seed,
            learning_rate=spec.policy_learning_rate,
            trained_parameters=state.policy_optimizer.trained_parameters,
            prompts=len(self.prompts),
            prompts_dropped=self.dropped,
            updates_planned=self.updates,
            updates=state.update,
            stopped=self.stopped,
            resumed_from=self.resumed_from,
            kept="best" if self.stopped is not None else spec.keep,
            kept_update=after.update,
            candidates=state.candidates,
            scale=state.scale,
            before=before.figures(),
            after=after.figures(),
            reward_gain=gains["reward"],
            score_gain=gains["score"],
            judge_gain=gains.get("judge"),
            by_source=by_source(self.heldout, before, after),
            evaluations=state.evaluations,
            history=state.history,
            events=state.events,
            examples=examples(self.heldout, before, after),
            skipped_steps=sum(summary.skipped_steps for summary in state.history),
            kl_coefficient=state.kl.coefficient,
            multiplier=state.multiplier.value if state.multiplier else None,
            response_tokens=state.response_tokens,
            seconds=time.perf_counter() - self.started,
            seconds_generate=state.seconds["generate"],
            seconds_score=state.seconds["score"],
            seconds_update=state.seconds["update"],
            seconds_evaluate=state.seconds["evaluate"],
            peak_memory_bytes=peak_memory_bytes(),
        )

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.state.seconds[phase] += time.perf_counter() - started


def _remaining(spec: PPOSpec, update: int, updates: int) -> float:
    """Share of the learning rate at the first step of an update."""
    return 1.0 - update / updates if spec.schedule == "linear" else 1.0


def _mean(values_B: Tensor) -> float:
    """Mean over the responses of all ranks."""
    return float(masked_mean(values_B.double(), torch.ones_like(values_B, dtype=torch.bool)))


def _sampling_gap(rollout: Rollout) -> float:
    """Root mean square difference of drawn and recomputed log-probabilities, over this rank's tokens."""
    drawn = torch.tensor([value for completion in rollout.completions for value in completion.logprobs])
    recomputed = rollout.old_logprobs_BT[rollout.mask_BT].cpu()
    return float((drawn - recomputed).square().mean().sqrt())


def _numbers(prefix: str, values: dict[str, object]) -> dict[str, float]:
    """The finite numbers among some values, under a prefix."""
    return {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
