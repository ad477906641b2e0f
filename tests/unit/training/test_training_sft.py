from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from training_samples import make_conversations

from tunegate.data.records import Conversation
from tunegate.errors import DataError, SpecError, TrainingStoppedError
from tunegate.observer import NullObserver, RecordingObserver
from tunegate.training import sft
from tunegate.training.answers import answer_loss, encode_conversations, microbatches, padded
from tunegate.training.config import LoraSpec, ModelSpec, SFTSpec
from tunegate.training.models import load_causal_lm, resolve_model
from tunegate.training.sft import mean_answer_nll, plan_steps, train_sft

FAST = {"learning_rate": 2e-3, "batch_size": 8, "epochs": 3, "max_length": 128}
TRAIN = make_conversations(40)
HELDOUT = make_conversations(10, seed=9, split="heldout")


def weights(path):
    return load_file(path / "model.safetensors")


def gradients(model, rows, chat, **options):
    """Gradient of the step's mean loss, computed as training does."""
    model.zero_grad()
    total = sum(row.answer_tokens for row in rows)
    for answers in microbatches(rows, chat.pad_id, **options):
        (answer_loss(model, answers) / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_training_lowers_heldout_loss(tiny_model, tmp_path):
    observer = RecordingObserver()
    result = train_sft(tiny_model, TRAIN, HELDOUT, tmp_path, spec=SFTSpec(**FAST), seed=3, observer=observer)
    assert result.steps == 15 and result.skipped_steps == 0 and result.stopped == "completed"
    assert result.heldout_before.mean == pytest.approx(math.log(350), abs=0.3)  # random weights know nothing
    assert result.heldout_after.mean < result.heldout_before.mean - 1.0
    assert [point.step for point in result.history] == [5, 10, 15]
    rates = [rate for _, rate in observer.series("sft/learning_rate")]
    assert max(rates) == pytest.approx(2e-3) and 0 < rates[-1] < 2e-4
    again = mean_answer_nll(tmp_path, HELDOUT)
    assert again.mean == pytest.approx(result.heldout_after.mean, rel=1e-6)
    assert again.ids == [row.id for row in HELDOUT]
    assert json.loads((tmp_path / "training.json").read_text())["schema_version"] == 1


def test_loss_is_cross_entropy_of_assistant_tokens_alone(tiny_model, tiny_chat):
    model = load_causal_lm(tiny_model)
    rows = encode_conversations(tiny_chat, TRAIN[:5], 128).rows
    expected = 0.0
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0]
        for position in range(1, len(row.ids)):
            if row.answer_mask[position]:  # token t is read off the logits at t - 1
                expected += cross_entropy(logits[position - 1], torch.tensor(row.ids[position])).item()
    loss = answer_loss(model, padded(rows, tiny_chat.pad_id))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"budget": 64}, {"budget": 200}, {"budget": 200, "pack_to": 100}, {"budget": 4096, "pack_to": 300}]
)
def test_gradient_is_the_same_whatever_the_microbatches(tiny_model, tiny_chat, options):
    """Means are weighted by tokens across microbatches; packing changes nothing either."""
    model = load_causal_lm(tiny_model)
    rows = encode_conversations(tiny_chat, TRAIN[:9], 128).rows
    whole = gradients(model, rows, tiny_chat, budget=100_000)
    parts = gradients(model, rows, tiny_chat, **options)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_packed_training_ends_at_the_same_weights(tiny_model, tmp_path):
    spec = SFTSpec(**FAST, max_steps=3)
    train_sft(tiny_model, TRAIN, [], tmp_path / "a", spec=spec, seed=3)
    train_sft(tiny_model, TRAIN, [], tmp_path / "b", spec=spec.model_copy(update={"packing": True}), seed=3)
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(weights(tmp_path / "b")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("extra", [{}, {"method": "lora", "learning_rate": 1e-2}, {"neftune_alpha": 5.0}])
def test_resumed_training_is_bit_equal(tiny_model, tmp_path, extra):
    """Resuming bit by bit, for supervised fine-tuning: stopped at step 4 and 7, resumed, the weights are the same."""
    spec = SFTSpec(**{**FAST, "epochs": 2, "checkpoint_every": 3, "patience": 9, **extra})
    straight = train_sft(tiny_model, TRAIN, HELDOUT, tmp_path / "straight", spec=spec, seed=3)
    for stop_at in (4, 7):
        asked = iter(range(100))
        with pytest.raises(TrainingStoppedError):
            train_sft(
                tiny_model,
                TRAIN,
                HELDOUT,
                tmp_path / "never",
                spec=spec,
                seed=3,
                checkpoints=tmp_path / "checkpoints",
                stop_requested=lambda asked=asked, stop_at=stop_at: next(asked) == (4 if stop_at == 4 else 3),
            )
    resumed = train_sft(
        tiny_model, TRAIN, HELDOUT, tmp_path / "resumed", spec=spec, seed=3, checkpoints=tmp_path / "checkpoints"
    )
    assert resumed.resumed_from == 7
    assert resumed.history == straight.history and resumed.heldout_before == straight.heldout_before
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], tensor), name


def test_checkpoints_of_other_settings_are_not_resumed(tiny_model, tmp_path):
    spec = SFTSpec(**FAST, max_steps=2)
    observer = RecordingObserver()
    for seed in (1, 2):
        result = train_sft(
            tiny_model, TRAIN, [], tmp_path / "m", spec=spec, seed=seed, checkpoints=tmp_path / "c", observer=observer
        )
    assert result.resumed_from is None
    assert any("other settings" in note for note in observer.notes)


def test_bf16_training_learns_and_saves_bf16(tmp_path, texts):
    """The masters are fp32, the computation and the saved weights bf16."""
    resolve_model(ModelSpec(source="tiny-random", precision="bf16"), tmp_path / "bf16", texts=texts, seed=1)
    result = train_sft(tmp_path / "bf16", TRAIN, HELDOUT, tmp_path / "out", spec=SFTSpec(**FAST), seed=3)
    assert result.precision == "bf16"
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert result.heldout_after.mean < result.heldout_before.mean - 1.0


def test_lora_is_merged_into_plain_weights(tiny_model, tmp_path):
    spec = SFTSpec(**{**FAST, "learning_rate": 1e-2}, method="lora", lora=LoraSpec(rank=8, alpha=16))
    result = train_sft(tiny_model, TRAIN, HELDOUT, tmp_path, spec=spec, seed=3)
    assert result.trained_parameters < 40_000
    assert weights(tmp_path).keys() == weights(tiny_model).keys()
    embedding = "model.embed_tokens.weight"
    assert torch.equal(weights(tmp_path)[embedding], weights(tiny_model)[embedding])
    assert mean_answer_nll(tmp_path, HELDOUT).mean == pytest.approx(result.heldout_after.mean, rel=1e-5)
    assert result.heldout_after.mean < result.heldout_before.mean - 0.2


def test_lora_targets_that_do_not_exist_are_refused(tiny_model, tmp_path):
    spec = SFTSpec(**FAST, method="lora", lora=LoraSpec(targets="nowhere"))
    with pytest.raises(SpecError, match=r"sft\.lora\.targets"):
        train_sft(tiny_model, TRAIN, [], tmp_path, spec=spec, seed=3)


def test_early_stop_keeps_the_best_weights(tiny_model, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 2.0, 2.5, 2.6, 9.9])
    real = sft.answer_nll

    def scripted(model, chat, encoded, observer):
        nll = real(model, chat, encoded, observer)
        factor = next(losses) / nll.mean
        return nll.model_copy(update={"sums": [value * factor for value in nll.sums]})

    monkeypatch.setattr(sft, "answer_nll", scripted)
    spec = SFTSpec(**FAST, evaluate_every=2, patience=2)
    result = train_sft(tiny_model, TRAIN, HELDOUT, tmp_path / "stopped", spec=spec, seed=3)
    assert (result.stopped, result.steps, result.best_step) == ("patience", 8, 4)
    assert [point.nll for point in result.history] == pytest.approx([3.0, 2.0, 2.5, 2.6])
    monkeypatch.undo()
    # The learning rate of step 4 of 15 is that of the whole plan, so a run that is cut at 4 by a checkpoint compares.
    asked = iter(range(100))
    with pytest.raises(TrainingStoppedError):
        train_sft(
            tiny_model, TRAIN, [], tmp_path / "n", spec=SFTSpec(**FAST), seed=3, checkpoints=tmp_path / "c",
            stop_requested=lambda: next(asked) == 4,
        )  # fmt: skip
    state = torch.load(tmp_path / "c" / "step-00000004" / "state.pt", weights_only=True)
    for name, tensor in state["optimizer"]["masters"].items():
        assert torch.equal(weights(tmp_path / "stopped")[name], tensor)


def test_gradient_checkpointing_does_not_change_the_weights(tiny_model, tmp_path):
    spec = SFTSpec(**FAST, max_steps=3)
    train_sft(tiny_model, TRAIN, [], tmp_path / "a", spec=spec, seed=3)
    again = spec.model_copy(update={"gradient_checkpointing": True})
    train_sft(tiny_model, TRAIN, [], tmp_path / "b", spec=again, seed=3)
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(weights(tmp_path / "b")[name], tensor, rtol=1e-5, atol=1e-6)


def test_neftune_noise_has_the_size_of_the_paper(tiny_model, tiny_chat):
    """alpha / sqrt(L D), uniform, on real tokens only (arXiv 2310.05914)."""
    from tunegate.training.answers import _noisy_embeddings

    model = load_causal_lm(tiny_model)
    rows = encode_conversations(tiny_chat, TRAIN[:6], 128).rows
    batch = padded(rows, tiny_chat.pad_id).batch
    noise = (_noisy_embeddings(model, batch, 5.0) - model.get_input_embeddings()(batch.ids_BT)).detach()
    assert noise[~batch.mask_BT].abs().max() == 0
    for row, length in enumerate(batch.lengths_B.tolist()):
        bound = 5.0 / math.sqrt(length * 64)
        seen = noise[row, :length]
        assert 0.95 * bound < seen.abs().max() <= bound * 1.00001
        assert seen.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_bad_steps_are_skipped_and_counted(tiny_model, tmp_path, monkeypatch):
    """Steps that are not finite are skipped and counted, as in PPO."""
    real = sft.answer_loss
    calls = iter(range(100))
    monkeypatch.setattr(sft, "answer_loss", lambda *a, **k: real(*a, **k) * (math.nan if next(calls) == 1 else 1.0))
    result = train_sft(tiny_model, TRAIN, HELDOUT, tmp_path, spec=SFTSpec(**FAST, max_steps=4), seed=3)
    assert (result.steps, result.skipped_steps) == (4, 1)
    assert math.isfinite(result.heldout_after.mean)


def test_long_conversations_are_counted(tiny_model, tmp_path):
    long = "word " * 200
    rows = [
        *TRAIN[:4],
        Conversation(id="cut", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": long}]),
        Conversation(id="gone", messages=[{"role": "user", "content": long}, {"role": "assistant", "content": "b"}]),
        Conversation(
            id="shortened",
            messages=[
                {"role": "user", "content": long},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ],
        ),
    ]
    result = train_sft(tiny_model, rows, rows[-2:-1], tmp_path, spec=SFTSpec(**FAST, max_steps=1), seed=3)
    assert (result.rows, result.rows_cut, result.rows_dropped, result.rows_shortened) == (6, 1, 1, 1)
    assert result.heldout_after is None
    with pytest.raises(DataError, match=r"sft\.max_length"):
        train_sft(tiny_model, rows[-2:-1], [], tmp_path, spec=SFTSpec(**FAST), seed=3)


def test_disabled_passes_the_model_through(tiny_model, tmp_path):
    result = train_sft(tiny_model, TRAIN, HELDOUT, tmp_path, spec=SFTSpec(enabled=False), seed=3)
    assert result.method == "disabled" and result.heldout_before == result.heldout_after
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_plan_by_tokens_and_by_rows():
    lengths = [10, 20, 30, 40, 50, 60]
    plan, ends = plan_steps(SFTSpec(batch_tokens=100, max_length=64, epochs=2), lengths, seed=1)
    for step in plan:
        assert sum(lengths[index] for index in step) <= 100
    first = [index for step in plan[: min(ends)] for index in step]
    second = [index for step in plan[min(ends) :] for index in step]
    assert sorted(first) == sorted(second) == list(range(6)) and first != second
    plan, ends = plan_steps(SFTSpec(batch_size=4, epochs=3, max_steps=5), lengths, seed=1)
    assert [len(step) for step in plan] == [4, 2, 4, 2, 4] and ends == {2, 4, 5}


def test_batch_units_do_not_mix():
    with pytest.raises(ValueError, match="batch_size and batch_tokens"):
        SFTSpec(batch_size=4, batch_tokens=4096)
    with pytest.raises(ValueError, match="one conversation of max_length"):
        SFTSpec(batch_tokens=100, max_length=512)


def test_answer_nll_by_row(tiny_model, tiny_chat):
    model = load_causal_lm(tiny_model)
    nll = mean_answer_nll(tiny_model, HELDOUT, observer=NullObserver())
    for index in (0, 2, 7):
        row = tiny_chat.encode(HELDOUT[index].messages)
        assert nll.tokens[index] == row.answer_tokens
        assert nll.sums[index] == pytest.approx(answer_loss(model, padded([row], 0)).item(), rel=1e-5)
