"""Supervised fine-tuning: cross-entropy of the assistant's tokens.

An optimizer step is a set of conversations; microbatches, packing and ranks only say how it is computed, and the
gradient is that of the mean over all its answer tokens whichever way.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tunegate.data.records import Conversation
from tunegate.errors import DataError, TrainingError, TrainingStoppedError
from tunegate.observer import NullObserver, Observer
from tunegate.storage.manifest import digest_json
from tunegate.training.answers import (
    EncodedRows,
    answer_loss,
    answer_nll,
    encode_conversations,
    microbatches,
)
from tunegate.training.batching import shuffled, steps_of_rows, steps_of_tokens
from tunegate.training.best import BestWeights
from tunegate.training.chat import Chat
from tunegate.training.checkpoint import (
    CheckpointFolder,
    model_digest,
    rng_state,
    seed_everything,
    set_rng_state,
)
from tunegate.training.config import Precision, SFTSpec, Sharding
from tunegate.training.lora import add_lora, merge_lora
from tunegate.training.measure import peak_memory_bytes, release_memory
from tunegate.training.mirror import Mirror
from tunegate.training.models import (
    checkpoint_activations,
    effective_max_length,
    load_causal_lm,
    microbatch_budget,
    precision_of,
    resolve_precision,
    save_model,
)
from tunegate.training.optim import Optimizer
from tunegate.training.ranks import agreed, seed_step, share, sum_over_ranks, world
from tunegate.training.results import NLL, HeldoutPoint, SFTResult
from tunegate.training.sharding import ShardedModel, in_step

RESULT_FILE = "training.json"
_HOPELESS = 20  # so many bad steps in a row are no accident


def mean_answer_nll(
    model: Path,
    conversations: Sequence[Conversation],
    *,
    precision: Precision = "auto",
    max_length: int | None = None,
    observer: Observer | None = None,
) -> NLL:
    """How well a model predicts the assistant's turns of conversations.

    Args:
        model: Model folder.
        conversations: To measure on.
        precision: Of the computation.
        max_length: Longer conversations are shortened to this many tokens; unset means the model's own limit.
        observer: Told the progress.

    Returns:
        Sums and token counts by conversation, and their mean in nats per token.
    """
    chat = Chat.load(model)
    limit = effective_max_length(model, max_length or 1 << 30)
    encoded = encode_conversations(chat, conversations, limit)
    return answer_nll(load_causal_lm(model, precision), chat, encoded, observer or NullObserver())


def train_sft(
    model: Path,
    train: Sequence[Conversation],
    heldout: Sequence[Conversation],
    out: Path,
    *,
    spec: SFTSpec,
    seed: int,
    observer: Observer | None = None,
    checkpoints: Path | None = None,
    mirror: Mirror | None = None,
    stop_requested: Callable[[], bool] | None = None,
    sharding: Sharding = "none",
) -> SFTResult:
    """Fine-tune a model on conversations and write the result as a plain model folder with `training.json`.

    Args:
        model: Folder of the model to start from.
        train: Conversations to learn.
        heldout: Conversations to measure on, before, during and after; may be empty.
        out: Folder to write.
        spec: The `sft` section.
        seed: Of shuffles, adapters and noise.
        observer: Told losses, learning rate, throughput and progress.
        checkpoints: Folder to resume from and to write checkpoints to; unset means neither.
        mirror: Where copies of the checkpoints go, so that another machine can resume.
        stop_requested: Asked before each step; when true, a checkpoint is written and training stops.
        sharding: What the processes of a `torchrun` share, see `DistributedSpec`.

    Raises:
        DataError: If no training conversation fits.
        TrainingStoppedError: If `stop_requested` said so.
        TrainingError: If the gradient is not finite for many steps in a row.
    """
    observer = observer or NullObserver()
    seed_everything(seed)
    chat = Chat.load(model)
    max_length = effective_max_length(model, spec.max_length)
    encoded = encode_conversations(chat, train, max_length)
    measured = encode_conversations(chat, heldout, max_length)
    if not encoded.rows:
        raise DataError(
            "no training conversation has an answer that fits",
            key="sft.max_length",
            value=max_length,
            fix="raise sft.max_length, or check the training data",
        )
    language_model = load_causal_lm(model)
    if not spec.enabled:
        return _passed_through(model, out, language_model, chat, encoded, measured, observer)
    folder = None
    if checkpoints is not None:
        settings = ["sft", spec.model_dump(mode="json"), seed, model_digest(model), [row.ids for row in encoded.rows]]
        folder = CheckpointFolder(
            checkpoints, fingerprint=digest_json(settings), keep=spec.keep_checkpoints, observer=observer, mirror=mirror
        )
    run = _Run(spec, language_model, chat, encoded, measured, seed, observer, folder, out, sharding)
    run.fit(stop_requested or (lambda: False))
    run.keep_best()
    after = answer_nll(language_model, chat, measured, observer) if measured.rows else None
    result = run.result(after)
    release_memory()
    if world()[0] == 0:
        save_model(language_model, chat.tokenizer, out, like=model)
        (out / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n")
    return result


@dataclass
class _Progress:
    """What a checkpoint holds beside weights and random state."""

    step: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[list[float]] = field(default_factory=list)  # [step, nll]
    best_step: int = 0
    best_nll: float = float("inf")
    without_gain: int = 0
    bad_in_a_row: int = 0
    before_sums: list[float] = field(default_factory=list)
    before_tokens: list[int] = field(default_factory=list)


class _Run:
    """One training run: the plan, the loop, and its state."""

    def __init__(
        self,
        spec: SFTSpec,
        model: Any,
        chat: Chat,
        encoded: EncodedRows,
        measured: EncodedRows,
        seed: int,
        observer: Observer,
        folder: CheckpointFolder | None,
        out: Path,
        sharding: Sharding,
    ) -> None:
        self.spec = spec
        self.seed = seed
        self.chat = chat
        self.encoded = encoded
        self.measured = measured
        self.observer = observer
        self.folder = folder
        self.adapted: Any = None
        if spec.method == "lora":
            self.adapted = add_lora(model, spec.lora, key="sft.lora")
            for parameter in model.get_output_embeddings().parameters():
                parameter.requires_grad_(False)
        if spec.gradient_checkpointing:
            checkpoint_activations(model)
        self.sharded = ShardedModel(model, sharding)
        self.model = self.sharded.model
        self.plan, epoch_ends = plan_steps(spec, encoded.lengths, seed)
        total = len(self.plan)
        every = spec.evaluate_every
        self.measure_at = {total, *(range(every, total, every) if every else epoch_ends)} if measured.rows else set()
        each = spec.checkpoint_every
        self.checkpoint_at = set(range(each, total, each)) if each else self.measure_at | epoch_ends
        self.optimizer = Optimizer(
            self.model.named_parameters(), spec, learning_rate=spec.peak_learning_rate, total_steps=total
        )
        self.best_weights = BestWeights(self.optimizer, out)
        self.progress = _Progress()
        self.resumed_from: int | None = None
        self.stopped: Literal["completed", "patience"] = "completed"

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self, stop_requested: Callable[[], bool]) -> None:
        """Take all steps, from the newest checkpoint if there is one."""
        self._resume()
        state = self.progress
        if self.resumed_from is None and self.measured.rows:
            before = answer_nll(self.model, self.chat, self.measured, self.observer)
            state.before_sums, state.before_tokens = before.sums, before.tokens
            self.observer.metrics({"sft/heldout_nll": before.mean}, 0)
        while state.step < len(self.plan) and not self._out_of_patience():
            if agreed(stop_requested()):
                self._save()
                raise TrainingStoppedError(
                    f"supervised fine-tuning was stopped at step {state.step} of {len(self.plan)}",
                    fix="start it again with the same checkpoint folder" if self.folder else "give a checkpoint folder",
                )
            self._step(self.plan[state.step])
            if state.step in self.measure_at:
                self._measure()
            if state.step in self.checkpoint_at:
                self._save()
        if self._out_of_patience():
            self.stopped = "patience"

    def _step(self, rows: list[int]) -> None:
        started = time.perf_counter()
        spec, state = self.spec, self.progress
        step_rows = [self.encoded.rows[index] for index in rows]
        answer_tokens = sum(row.answer_tokens for row in step_rows)
        device = next(self.model.parameters()).device
        budget = microbatch_budget(spec.microbatch_tokens, device)
        pack_to = pack_width(spec.max_length, budget) if spec.packing else None
        loss_sum = torch.zeros((), device=device)
        seed_step(self.seed, state.step)
        own = share(step_rows)
        batches = microbatches(own or step_rows[:1], self.chat.pad_id, budget=budget, pack_to=pack_to)
        for answers, weight in in_step(batches if own else [], batches[0], needed=self.sharded.sharded):
            loss = weight * answer_loss(self.model, answers.to(device), neftune_alpha=spec.neftune_alpha)
            (loss / answer_tokens).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        report = self.optimizer.step()
        mean_loss = float(sum_over_ranks(loss_sum)) / answer_tokens
        seconds = time.perf_counter() - started
        tokens = sum(len(row.ids) for row in step_rows)
        state.step += 1
        state.tokens += tokens
        state.answer_tokens += answer_tokens
        state.seconds += seconds
        state.losses.append(mean_loss)
        state.bad_in_a_row = state.bad_in_a_row + 1 if report.skipped else 0
        if state.bad_in_a_row >= _HOPELESS:
            raise TrainingError(
                f"the gradient was not finite {_HOPELESS} steps in a row",
                key="sft.learning_rate",
                value=spec.peak_learning_rate,
                fix="lower the learning rate, or check the data for broken rows",
            )
        self.observer.metrics(
            {
                "sft/loss": mean_loss,
                "sft/learning_rate": report.learning_rate,
                "sft/gradient_norm": report.gradient_norm,
                "sft/skipped_steps": self.optimizer.skipped_steps,
                "sft/tokens_per_second": tokens / seconds,
            },
            state.step,
        )
        self.observer.progress(state.step, len(self.plan), "step", "supervised fine-tuning")

    def _measure(self) -> None:
        """Held-out loss on a fixed subset; remembers the best weights."""
        state = self.progress
        nll = answer_nll(self.model, self.chat, self._subset(), self.observer).mean
        state.history.append([state.step, nll])
        self.observer.metrics({"sft/heldout_nll": nll}, state.step)
        if nll < state.best_nll:
            state.best_nll, state.best_step, state.without_gain = nll, state.step, 0
            self.best_weights.keep()
        else:
            state.without_gain += 1

    def _subset(self) -> EncodedRows:
        rows = self.spec.evaluate_rows
        return EncodedRows(self.measured.rows[:rows], self.measured.ids[:rows], [], 0, 0)

    def _out_of_patience(self) -> bool:
        return self.spec.patience is not None and self.progress.without_gain >= self.spec.patience

    def keep_best(self) -> None:
        """Go back to the weights with the best held-out loss, and merge adapters."""
        if self.progress.best_step not in (0, self.progress.step):
            self.best_weights.put_back()
        self.model = self.sharded.whole()
        if self.adapted is not None:
            merge_lora(self.adapted)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None:
            return
        state = self.progress
        content = {
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
            "progress": dict(vars(state)),
            "best_weights": self.best_weights.gathered() if state.best_step != state.step else {},
        }
        if world()[0] == 0:
            self.folder.save(state.step, content)

    def _resume(self) -> None:
        found = self.folder.latest() if self.folder is not None else None
        if found is None:
            return
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.progress = _Progress(**found.state["progress"])
        if self.progress.best_step == self.progress.step:
            self.best_weights.keep()
        self.best_weights.take(found.state["best_weights"])
        set_rng_state(found.state["rng"])
        self.resumed_from = found.step
        self.observer.note(f"supervised fine-tuning goes on from the checkpoint at step {found.step}")

    # -- the result -----------------------------------------------------------------------------------------------

    def result(self, after: NLL | None) -> SFTResult:
        """The figures of the run."""
        state, encoded = self.progress, self.encoded
        tail = state.losses[-max(1, len(state.losses) // 10) :]
        before = NLL(
            ids=[*self.measured.ids, *self.measured.dropped], sums=state.before_sums, tokens=state.before_tokens
        )
        return SFTResult(
            method=self.spec.method,
            precision=precision_of(self.model),
            learning_rate=self.spec.peak_learning_rate,
            trained_parameters=self.optimizer.trained_parameters,
            steps=state.step,
            best_step=state.best_step or state.step,
            stopped=self.stopped,
            skipped_steps=self.optimizer.skipped_steps,
            resumed_from=self.resumed_from,
            rows=len(encoded.rows),
            rows_dropped=len(encoded.dropped),
            rows_cut=encoded.cut,
            rows_shortened=encoded.shortened,
            tokens=state.tokens,
            answer_tokens=state.answer_tokens,
            seconds=state.seconds,
            tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
            final_loss=sum(tail) / len(tail) if tail else None,
            heldout_before=before if self.measured.rows else None,
            heldout_after=after,
            history=[HeldoutPoint(step=int(step), nll=nll) for step, nll in state.history],
        )


def plan_steps(spec: SFTSpec, lengths: Sequence[int], seed: int) -> tuple[list[list[int]], set[int]]:
    """Which conversations each optimizer step takes, over all epochs.

    Args:
        spec: Epochs, batch size or batch tokens, most steps.
        lengths: Tokens of each conversation.
        seed: Of the shuffles; each epoch has its own.

    Returns:
        Steps as lists of indices into `lengths`, and the numbers of steps after which an epoch ends.
    """
    plan: list[list[int]] = []
    ends: set[int] = set()
    for epoch in range(spec.epochs):
        order = shuffled(len(lengths), seed=seed, epoch=epoch)
        if spec.batch_tokens is not None:
            plan += steps_of_tokens(order, lengths, spec.batch_tokens)
        else:
            plan += steps_of_rows(order, spec.batch_size)
        ends.add(len(plan))
    plan = plan[: spec.max_steps]
    return plan, {end for end in ends if end <= len(plan)} | {len(plan)}


def pack_width(max_length: int, budget: int) -> int:
    """Width of packed rows (tokens): two of the longest conversations, if a microbatch holds as many."""
    return max(max_length, min(2 * max_length, budget))


def _passed_through(
    source: Path,
    out: Path,
    model: Any,
    chat: Chat,
    encoded: EncodedRows,
    measured: EncodedRows,
    observer: Observer,
) -> SFTResult:
    """The stage is switched off: the model is copied as it is."""
    nll = answer_nll(model, chat, measured, observer) if measured.rows else None
    result = SFTResult(
        method="disabled",
        precision=resolve_precision("auto", path=source),
        learning_rate=0.0,
        trained_parameters=0,
        steps=0,
        best_step=0,
        stopped="disabled",
        skipped_steps=0,
        resumed_from=None,
        rows=len(encoded.rows),
        rows_dropped=len(encoded.dropped),
        rows_cut=encoded.cut,
        rows_shortened=encoded.shortened,
        tokens=0,
        answer_tokens=0,
        seconds=0.0,
        tokens_per_second=0.0,
        peak_memory_bytes=peak_memory_bytes(),
        final_loss=None,
        heldout_before=nll,
        heldout_after=nll,
        history=[],
    )
    if world()[0] == 0:
        shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (out / RESULT_FILE).unlink(missing_ok=True)
        (out / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n")
    return result
