from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from tunegate.training import cross_entropy as module
from tunegate.training.best import BestWeights
from tunegate.training.config import OptimizerSpec
from tunegate.training.cross_entropy import linear_cross_entropy, token_nll
from tunegate.training.optim import Optimizer, schedule_factor


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_fused_cross_entropy_equals_torchs(monkeypatch, bias, chunk):
    """Loss and gradients, to 1e-6 in fp32, whatever the chunk; the upstream gradient is not 1."""
    monkeypatch.setattr(module, "chunk_rows", lambda *_: chunk)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=draw).requires_grad_()
    weight = torch.randn(50, 16, generator=draw).requires_grad_()
    offset = torch.randn(50, generator=draw).requires_grad_() if bias else None
    targets = torch.randint(0, 50, (23,), generator=draw)
    inputs = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    loss = linear_cross_entropy(hidden, weight, offset, targets)
    expected = cross_entropy(linear(hidden, weight, offset), targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for found, right in zip(
        torch.autograd.grad(loss * 0.37, inputs), torch.autograd.grad(expected * 0.37, inputs), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    per_token = cross_entropy(linear(hidden, weight, offset), targets, reduction="none")
    torch.testing.assert_close(token_nll(hidden, weight, offset, targets), per_token, rtol=1e-6, atol=1e-6)


def test_fused_cross_entropy_with_a_frozen_head_and_no_tokens():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    linear_cross_entropy(hidden, weight, None, torch.tensor([1, 2, 3, 4])).backward()
    assert hidden.grad is not None and weight.grad is None
    nothing = linear_cross_entropy(hidden[:0], weight, None, torch.zeros(0, dtype=torch.long))
    nothing.backward()
    assert nothing.item() == 0


def test_fused_cross_entropy_in_bf16_is_close_to_fp32():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 64, generator=draw), torch.randn(300, 64, generator=draw) / 8
    targets = torch.randint(0, 300, (40,), generator=draw)
    exact = linear_cross_entropy(hidden, weight, None, targets)
    rough = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), None, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=5e-3, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule):
    factors = [schedule_factor(schedule, step, warmup_steps=4, total_steps=20) for step in range(20)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and factors[4] == 1.0
    if schedule == "linear":
        assert factors[4:] == pytest.approx([1 - step / 16 for step in range(16)])
    elif schedule == "cosine":
        assert factors[12] == pytest.approx(0.5) and 0 < factors[-1] < 0.02
    else:
        assert set(factors[4:]) == {1.0}
    assert schedule_factor(schedule, 0, warmup_steps=0, total_steps=1) == 1.0


def module_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1)).to(dtype)


def test_fp32_steps_are_torchs_adamw_with_clipping():
    spec = OptimizerSpec(schedule="linear", warmup=0.0, weight_decay=0.1, gradient_clip=0.5)
    ours, theirs = module_of(), module_of()
    optimizer = Optimizer(ours.named_parameters(), spec, learning_rate=0.01, total_steps=4)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        eps=1e-8,
    )
    for step in range(4):
        x = torch.randn(7, 6)
        (ours(x).square().mean() * 10).backward()
        (theirs(x).square().mean() * 10).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (1 - step / 4)
        reference.step()
        reference.zero_grad()
        report = optimizer.step()
        assert report.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
        assert report.learning_rate == pytest.approx(0.01 * (1 - step / 4))
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_bf16_weights_keep_small_updates_in_fp32_masters():
    """200 updates of 1e-4 on a weight of 1.0: bf16 alone would stay at 1.0."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    spec = OptimizerSpec(schedule="constant", warmup=0.0, gradient_clip=0.0)
    optimizer = Optimizer([("w", weight)], spec, learning_rate=1e-4, total_steps=200)
    for _ in range(200):
        (weight * 1.0).sum().backward()
        assert weight.grad is None  # moved to the fp32 accumulator at once
        optimizer.step()
    assert optimizer.state_dict()["masters"]["w"].item() == pytest.approx(1 - 200e-4, rel=1e-4)
    assert weight.item() == pytest.approx(0.98, abs=0.004)


def test_gradients_of_microbatches_add_up_in_fp32():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], OptimizerSpec(), learning_rate=1e-4, total_steps=1)
    for size in (256.0, *[0.5] * 64):  # in bf16 256 + 0.5 is 256
        (weight * size).sum().backward()
    assert optimizer.step().gradient_norm == 288.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_gradients_change_nothing(dtype):
    """Steps that are not finite are skipped and counted."""
    model = module_of(dtype)
    optimizer = Optimizer(model.named_parameters(), OptimizerSpec(), learning_rate=0.1, total_steps=3)
    before = optimizer.weights()
    (model(torch.ones(2, 6, dtype=dtype)).sum() * math.inf).backward()
    report = optimizer.step()
    assert report.skipped and optimizer.skipped_steps == 1 and optimizer.step_count == 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_best_weights_are_put_back_and_handed_on(tmp_path):
    model = module_of(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), OptimizerSpec(), learning_rate=0.1, total_steps=3)
    best = BestWeights(optimizer, tmp_path / "runs" / "out")
    assert best.gathered() == {}
    best.take({})
    assert best.gathered() == {}
    before = optimizer.weights()
    best.keep()
    handed_on = best.gathered()
    for _ in range(2):
        model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())
    best.put_back()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

    other = BestWeights(optimizer, tmp_path / "runs" / "out")
    other.take(handed_on)
    best.keep()  # does not disturb what was read before
    assert all(torch.equal(before[name], weight) for name, weight in handed_on.items())
    other.put_back()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    del best, other
    gc.collect()
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_is_exact(dtype):
    def run(model, optimizer, steps, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            model(torch.randn(4, 6, dtype=dtype)).square().mean().backward()
            optimizer.step()

    spec = OptimizerSpec(warmup=0.3)
    one = module_of(dtype)
    first = Optimizer(one.named_parameters(), spec, learning_rate=0.05, total_steps=6)
    run(one, first, 3, seed=1)
    copied = torch.load(_bytes(first.state_dict()), weights_only=True)
    run(one, first, 3, seed=2)
    two = module_of(dtype)
    second = Optimizer(two.named_parameters(), spec, learning_rate=0.05, total_steps=6)
    second.load_state_dict(copied)
    run(two, second, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def _bytes(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer
