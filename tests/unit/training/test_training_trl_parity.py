"""Advantages, whitening and losses beside those of TRL 1.12's own PPO trainer, on the same numbers.

`trl_reference.json` holds what TRL's code computed in fp64; made by (see `benchmarks/training/peers.sh`)

    benchmarks/training/.peers/trl-1.12/bin/python benchmarks/training/trl_reference.py \
        tests/unit/training/trl_reference.json

Where TRL is right both agree to 1e-6. Where it is not, the tests say what differs; `docs/training-benchmarks.md` lists
it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tunegate.training.advantages import generalised_advantages, masked_mean, shape_scores, token_rewards, whiten
from tunegate.training.kl import kl_estimate
from tunegate.training.losses import Head, policy_loss, token_logprobs, value_loss

FIXTURE = json.loads((Path(__file__).parent / "trl_reference.json").read_text())
SETTINGS = FIXTURE["settings"]
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


class Run:
    """One update of TRL's trainer as tensors."""

    def __init__(self, estimator: str) -> None:
        self.estimator = estimator
        found = FIXTURE["runs"][estimator]
        self.found = found
        self.lengths_B = torch.tensor(found["lengths"])
        self.finished_B = torch.tensor(found["finished"])
        for name in ("logprobs", "reference_logprobs", "values", "advantages", "whitened_advantages"):
            setattr(self, name, torch.tensor(found[name], dtype=torch.float64))
        self.scores_B = torch.tensor(found["scores"], dtype=torch.float64)
        columns = torch.arange(self.values.shape[1])[None, :]
        self.mask_BT = columns < self.lengths_B[:, None]
        # TRL's value mask goes one column on, past the stop token.
        self.value_mask_BT = columns < self.lengths_B[:, None] + 1
        self.kl_BT = torch.where(self.mask_BT, kl_estimate(self.logprobs, self.reference_logprobs, estimator), 0.0)

    def trl_rewards(self) -> torch.Tensor:
        """Rewards as TRL lays them out: a finished response is paid one column after its stop token."""
        return token_rewards(self.scores_B, self.kl_BT, self.value_mask_BT, SETTINGS["kl_coef"])


@pytest.fixture(params=["k1", "k3"])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


def test_the_fixture_holds_finished_and_unfinished_responses(run: Run) -> None:
    assert FIXTURE["trl"] == "1.12.0"
    assert 2 <= int(run.finished_B.sum()) <= 6
    assert bool((run.lengths_B[~run.finished_B] == run.values.shape[1]).all())
    assert run.found["mask"] == run.mask_BT.tolist()


def test_logprobs_agree(run: Run) -> None:
    logits_TV = torch.tensor(run.found["logits_of_row_0"], dtype=torch.float64)
    identity = torch.eye(logits_TV.shape[1], dtype=torch.float64)
    tokens_T = torch.tensor(run.found["tokens"][0])
    # TRL's generation has divided these logits by the temperature already.
    ours_T = token_logprobs(logits_TV, Head(identity, identity, None), tokens_T, 1.0)
    torch.testing.assert_close(ours_T, run.logprobs[0], **TOLERANCE)


def test_scores_lose_the_penalty_for_a_missing_stop_token(run: Run) -> None:
    before_B = torch.where(run.finished_B, run.scores_B, run.scores_B + SETTINGS["missing_eos_penalty"])
    shaped_B = shape_scores(
        before_B,
        run.finished_B,
        run.lengths_B,
        clip=None,
        missing_eos="subtract",
        missing_eos_penalty=SETTINGS["missing_eos_penalty"],
        length_penalty=0.0,
    )
    torch.testing.assert_close(shaped_B, run.scores_B, **TOLERANCE)


def test_rewards_agree_on_unfinished_responses() -> None:
    run = Run("k3")  # the run that whitens rewards, for which TRL hands them to a function
    theirs_BT = torch.tensor(run.found["rewards"], dtype=torch.float64)
    torch.testing.assert_close(run.trl_rewards(), theirs_BT, **TOLERANCE)
    ours_BT = token_rewards(run.scores_B, run.kl_BT, run.mask_BT, SETTINGS["kl_coef"])
    open_B = ~run.finished_B
    torch.testing.assert_close(ours_BT[open_B], theirs_BT[open_B], **TOLERANCE)
    # TRL pays a finished response one column late; we pay it at its last token.
    ended_B = run.finished_B.nonzero()[:, 0]
    torch.testing.assert_close(theirs_BT[ended_B, run.lengths_B[ended_B]], run.scores_B[ended_B], **TOLERANCE)
    last_B = run.lengths_B[ended_B] - 1
    paid_B = ours_BT[ended_B, last_B] + SETTINGS["kl_coef"] * run.kl_BT[ended_B, last_B]
    torch.testing.assert_close(paid_B, run.scores_B[ended_B], **TOLERANCE)


def test_advantages_agree_given_the_same_rewards() -> None:
    run = Run("k1")
    ours_BT, returns_BT = generalised_advantages(
        run.trl_rewards(), run.values, run.value_mask_BT, gamma=SETTINGS["gamma"], gae_lambda=SETTINGS["lam"]
    )
    torch.testing.assert_close(ours_BT, run.advantages, **TOLERANCE)
    values_BT = torch.where(run.value_mask_BT, run.values, 0.0)
    torch.testing.assert_close(returns_BT, ours_BT + values_BT, **TOLERANCE)


def test_advantages_agree_on_unfinished_responses_without_trl_layout() -> None:
    run = Run("k1")
    rewards_BT = token_rewards(run.scores_B, run.kl_BT, run.mask_BT, SETTINGS["kl_coef"])
    ours_BT, _ = generalised_advantages(
        rewards_BT, run.values, run.mask_BT, gamma=SETTINGS["gamma"], gae_lambda=SETTINGS["lam"]
    )
    open_B = ~run.finished_B
    torch.testing.assert_close(ours_BT[open_B], run.advantages[open_B], **TOLERANCE)
    # On finished ones TRL discounts the score once more and bootstraps from a value past the end.
    assert not torch.allclose(ours_BT[~open_B], run.advantages[~open_B], atol=1e-3)


def test_masked_mean_agrees(run: Run) -> None:
    mean = masked_mean(run.advantages, run.mask_BT)
    assert float(mean) == pytest.approx(run.found["mean_advantage"], rel=1e-6, abs=1e-6)


def test_whitening_agrees_up_to_the_unbiased_variance(run: Run) -> None:
    count = int(run.mask_BT.sum())
    # TRL divides by n - 1. Ours is the variance that makes the result's own variance 1.
    bessel = ((count - 1) / count) ** 0.5
    ours_BT = whiten(run.advantages, run.mask_BT)
    mask = run.mask_BT
    torch.testing.assert_close(ours_BT[mask] * bessel, run.whitened_advantages[mask], **TOLERANCE)
    assert float(ours_BT[run.mask_BT].var(correction=0)) == pytest.approx(1.0, abs=1e-6)


def test_whitened_rewards_agree_up_to_the_unbiased_variance() -> None:
    run = Run("k3")
    rewards_BT = torch.tensor(run.found["rewards"], dtype=torch.float64)
    theirs_BT = torch.tensor(run.found["whitened_rewards"], dtype=torch.float64)
    ours_BT = whiten(rewards_BT, run.value_mask_BT, keep_mean=True)
    mean = masked_mean(rewards_BT, run.value_mask_BT)
    count = int(run.value_mask_BT.sum())
    bessel = ((count - 1) / count) ** 0.5
    mask = run.value_mask_BT
    torch.testing.assert_close(((ours_BT - mean) * bessel + mean)[mask], theirs_BT[mask], **TOLERANCE)


def test_losses_agree_in_every_microbatch(run: Run) -> None:
    white_BT = run.whitened_advantages
    values_BT = torch.where(run.value_mask_BT, run.values, 0.0)
    returns_BT = run.advantages + values_BT
    clipped = []
    for micro in run.found["microbatches"]:
        rows = micro["rows"]
        mask_BT, value_mask_BT = run.mask_BT[rows], run.value_mask_BT[rows]
        new_BT = torch.tensor(micro["logprobs"], dtype=torch.float64)
        found = policy_loss(
            new_BT[mask_BT],
            run.logprobs[rows][mask_BT],
            white_BT[rows][mask_BT],
            clip=SETTINGS["cliprange"],
            tokens=float(mask_BT.sum()),
        )
        assert float(found.loss) == pytest.approx(micro["policy_loss"], rel=1e-6, abs=1e-6)
        assert float(found.clipped) == pytest.approx(micro["clipped"], rel=1e-6, abs=1e-6)
        value = value_loss(
            torch.tensor(micro["values"], dtype=torch.float64)[value_mask_BT],
            values_BT[rows][value_mask_BT],
            returns_BT[rows][value_mask_BT],
            clip=SETTINGS["cliprange_value"],
            tokens=float(value_mask_BT.sum()),
        )
        assert float(value) == pytest.approx(micro["value_loss"], rel=1e-6, abs=1e-6)
        clipped.append(float(found.clipped))
    assert clipped[:2] == [0.0, 0.0]  # before the first step the ratio is 1
    assert max(clipped) > 0.1  # later it is not, or the comparison would show little


def test_trl_weights_microbatches_alike_and_ours_weights_tokens_alike(run: Run) -> None:
    micros = run.found["microbatches"][:2]
    counts = [float(run.mask_BT[micro["rows"]].sum()) for micro in micros]
    assert counts[0] != counts[1]
    theirs = sum(micro["policy_loss"] for micro in micros) / 2
    rows = [row for micro in micros for row in micro["rows"]]
    mask_BT = run.mask_BT[rows]
    logprobs_BT = torch.tensor([line for micro in micros for line in micro["logprobs"]], dtype=torch.float64)
    ours = policy_loss(
        logprobs_BT[mask_BT],
        run.logprobs[rows][mask_BT],
        run.whitened_advantages[rows][mask_BT],
        clip=SETTINGS["cliprange"],
        tokens=float(mask_BT.sum()),
    )
    by_tokens = sum(micro["policy_loss"] * count for micro, count in zip(micros, counts, strict=True)) / sum(counts)
    assert float(ours.loss) == pytest.approx(by_tokens, rel=1e-6, abs=1e-9)
    assert abs(theirs - by_tokens) > 1e-3
