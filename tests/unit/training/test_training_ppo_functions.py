"""Advantages, losses, KL and sampling against independent NumPy computations and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.training.advantages import (
    ensemble_scores,
    explained_variance,
    generalised_advantages,
    masked_mean,
    regression_line,
    safe_advantages,
    shape_scores,
    token_rewards,
    whiten,
)
from tunegate.training.kl import KLController, LagrangeMultiplier, kl_estimate
from tunegate.training.losses import Head, logprobs_and_entropy, policy_loss, token_logprobs, value_loss
from tunegate.training.ppo_config import KLSpec
from tunegate.training.sampling import draw, row_noise


def ragged_mask(lengths: list[int], width: int) -> torch.Tensor:
    mask = np.zeros((len(lengths), width), dtype=bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return torch.from_numpy(mask)


# -- KL -----------------------------------------------------------------------------------------------------------


def exact_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum())


@pytest.fixture
def two_distributions() -> tuple[np.ndarray, np.ndarray]:
    draw_logits = np.random.default_rng(0)
    p, q = (np.exp(draw_logits.normal(size=7)) for _ in range(2))
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(two_distributions, estimator):
    """The expectation of k1 and of k3 under the policy is the divergence itself."""
    p, q = two_distributions
    each = kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), estimator).numpy()
    assert (p * each).sum() == pytest.approx(exact_kl(p, q), rel=1e-12)


def test_k2_is_half_the_squared_log_ratio_and_k3_is_never_negative(two_distributions):
    """The KL estimators and the token rewards."""
    p, q = two_distributions
    logs = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    assert kl_estimate(*logs, "k2").numpy() == pytest.approx(0.5 * (np.log(p) - np.log(q)) ** 2)
    assert (kl_estimate(*logs, "k3") >= 0).all()


@pytest.mark.parametrize(("estimator", "right"), [("k1", False), ("k2", True), ("k3", False)])
def test_as_a_loss_only_k2_has_the_gradient_of_the_divergence(two_distributions, estimator, right):
    """Differentiated on samples of the policy, k1's expected gradient is 0 and k3's is another one."""
    p, q = two_distributions
    logits = torch.tensor(np.log(p), requires_grad=True)
    logp = logits.log_softmax(0)
    estimated = (torch.tensor(p) * kl_estimate(logp, torch.tensor(np.log(q)), estimator)).sum()
    (gradient,) = torch.autograd.grad(estimated, logits)  # the sampling weights p are constants
    log_ratio = np.log(p) - np.log(q)
    exact = p * (log_ratio - exact_kl(p, q))  # d KL / d logits in closed form
    assert np.allclose(gradient.numpy(), exact, atol=1e-12) == right
    if estimator == "k1":
        assert np.allclose(gradient.numpy(), 0.0, atol=1e-12)


def test_adaptive_controller_follows_the_formula_and_its_clip():
    """The coefficient grows by the factor 1 + clip(KL/target - 1, +-0.2) n / horizon."""
    controller = KLController.from_spec(KLSpec(coefficient=0.1, controller="adaptive", target=6.0, horizon=1000))
    controller.update(6.6, 50)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.1 * 50 / 1000))
    before = controller.coefficient
    controller.update(60.0, 50)
    assert controller.coefficient == pytest.approx(before * (1 + 0.2 * 50 / 1000))
    before = controller.coefficient
    controller.update(0.0, 50)
    assert controller.coefficient == pytest.approx(before * (1 - 0.2 * 50 / 1000))
    controller.update(math.nan, 50)
    assert controller.coefficient == pytest.approx(before * (1 - 0.2 * 50 / 1000))
    resumed = KLController.from_spec(KLSpec(controller="adaptive"))
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coefficient == controller.coefficient


def test_fixed_controller_stays():
    """The adaptive KL coefficient."""
    controller = KLController.from_spec(KLSpec(coefficient=0.05))
    controller.update(100.0, 64)
    assert controller.coefficient == 0.05


def test_lagrange_multiplier_moves_in_log_space_and_is_capped():
    """Log lambda += eta lambda (E[C] - d), capped."""
    multiplier = LagrangeMultiplier(value=0.5, limit=1.0, rate=0.1, cap=2.0)
    multiplier.update(3.0)
    assert multiplier.value == pytest.approx(0.5 * math.exp(0.1 * 0.5 * 2.0))
    before = multiplier.value
    multiplier.update(0.0)
    assert multiplier.value == pytest.approx(before * math.exp(-0.1 * before))
    multiplier.update(1e6)
    assert multiplier.value == pytest.approx(2.0)
    multiplier.update(math.nan)
    assert multiplier.value == pytest.approx(2.0)


# -- rewards and advantages ---------------------------------------------------------------------------------------


def test_shaping_of_scores():
    """Clipped, then the penalty for a missing stop token, subtracted or in place of the score."""
    scores = torch.tensor([9.0, 9.0, -0.5, -0.5])
    finished = torch.tensor([True, False, True, False])
    lengths = torch.tensor([10, 20, 30, 40])
    common = {"clip": 5.0, "missing_eos_penalty": 1.5}
    subtract = shape_scores(scores, finished, lengths, missing_eos="subtract", length_penalty=0.0, **common)
    assert subtract.tolist() == [5.0, 3.5, -0.5, -2.0]
    replace = shape_scores(scores, finished, lengths, missing_eos="replace", length_penalty=0.0, **common)
    assert replace.tolist() == [5.0, -1.5, -0.5, -1.5]
    none = shape_scores(scores, finished, lengths, missing_eos="none", length_penalty=0.01, **common)
    assert none.tolist() == pytest.approx([4.9, 4.8, -0.8, -0.9])


def test_token_rewards_put_the_score_on_the_last_token():
    """Token rewards: -beta kl_t + [t last] score; nothing outside the mask."""
    mask = ragged_mask([3, 1], 4)
    kl = torch.tensor([[1.0, 2.0, 3.0, 99.0], [4.0, 99.0, 99.0, 99.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, 0.1)
    assert rewards.numpy() == pytest.approx(np.array([[-0.1, -0.2, 9.7, 0.0], [19.6, 0.0, 0.0, 0.0]]))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    gamma=st.floats(0.5, 1.0),
    lam=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_gae_is_the_discounted_sum_of_deltas(lengths, gamma, lam, seed):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, V = 0 after the end, whatever the padding holds."""
    numbers = np.random.default_rng(seed)
    width = max(lengths) + 2
    rewards, values = numbers.normal(size=(2, len(lengths), width))
    mask = ragged_mask(lengths, width)
    garbage = np.where(mask.numpy(), values, 1e6)
    advantages, returns = generalised_advantages(
        torch.tensor(rewards), torch.tensor(garbage), mask, gamma=gamma, gae_lambda=lam
    )
    for row, length in enumerate(lengths):
        nexts = [*values[row, 1:length], 0.0]
        deltas = [rewards[row, t] + gamma * nexts[t] - values[row, t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-9)
            assert float(returns[row, t]) == pytest.approx(expected + values[row, t], abs=1e-9)
        assert advantages[row, length:].eq(0).all() and returns[row, length:].eq(0).all()


def test_gae_with_lambda_one_is_the_return_less_the_value():
    """The closed form of generalised advantages at lambda 1."""
    rewards = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    advantages, returns = generalised_advantages(rewards, values, ragged_mask([3], 3), gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == [[6.0, 5.0, 3.0]]
    assert advantages.tolist() == [[5.5, 6.0, 1.0]]


def test_whitening_over_valid_tokens_only():
    """(A - mean) / sqrt(var + 1e-8); reward whitening keeps the mean."""
    numbers = np.random.default_rng(1).normal(3.0, 2.0, size=(3, 5))
    mask = ragged_mask([5, 2, 3], 5)
    valid = numbers[mask.numpy()]
    expected = np.where(mask.numpy(), (numbers - valid.mean()) / np.sqrt(valid.var() + 1e-8), 0.0)
    assert whiten(torch.tensor(numbers), mask).numpy() == pytest.approx(expected)
    kept = np.where(mask.numpy(), expected + valid.mean(), 0.0)
    assert whiten(torch.tensor(numbers), mask, keep_mean=True).numpy() == pytest.approx(kept)


def test_masked_metrics_ignore_padding():
    """Mean and explained variance over valid tokens."""
    mask = ragged_mask([2, 3], 4)
    numbers = np.random.default_rng(2)
    values, returns = numbers.normal(size=(2, 2, 4))
    valid = mask.numpy()
    expected = 1 - (returns - values)[valid].var() / returns[valid].var()
    values[~valid], returns[~valid] = 1e9, np.nan
    assert explained_variance(torch.tensor(values), torch.tensor(returns), mask) == pytest.approx(expected)
    assert float(masked_mean(torch.tensor(returns), mask)) == pytest.approx(returns[valid].mean())
    constant = torch.ones(2, 4, dtype=torch.float64)
    assert math.isnan(explained_variance(torch.tensor(values), constant, mask))


@pytest.mark.parametrize("sign", [1, -1])
def test_regression_line(sign):
    """Against NumPy's least squares; a contrary reading counts as none."""
    mask = ragged_mask([2, 4, 3], 4)
    values, noise = np.random.default_rng(3).normal(size=(2, 3, 4))
    targets = sign * 0.7 * values + 2.0 + 0.1 * noise
    found = regression_line(torch.tensor(values), torch.tensor(targets), mask)
    valid = mask.numpy()
    expected = np.polyfit(values[valid], targets[valid], 1) if sign > 0 else (0.0, targets[valid].mean())
    assert found == pytest.approx(tuple(expected))


def test_safe_advantages():
    """A = (A_r - lambda A_c) / (1 + lambda)."""
    mixed = safe_advantages(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]), 2.0)
    assert mixed.tolist() == pytest.approx([1 / 3, -5 / 3])


def test_ensembles():
    """Min, or mean - k var."""
    scores = np.random.default_rng(3).normal(size=(3, 5))
    assert ensemble_scores(torch.tensor(scores), "min", 0.5).numpy() == pytest.approx(scores.min(0))
    mean_less_variance = scores.mean(0) - 0.5 * scores.var(0)
    assert ensemble_scores(torch.tensor(scores), "mean_minus_variance", 0.5).numpy() == pytest.approx(
        mean_less_variance
    )


# -- losses -------------------------------------------------------------------------------------------------------


def test_policy_loss_and_clip_fraction():
    """Mean of max(-A rho, -A clip(rho, 1-eps, 1+eps)); the clip fraction counts where the second is larger."""
    numbers = np.random.default_rng(4)
    new, old, advantage = numbers.normal(scale=0.5, size=(3, 40))
    rho = np.exp(new - old)
    plain, clipped = -advantage * rho, -advantage * np.clip(rho, 0.8, 1.2)
    found = policy_loss(*(torch.tensor(x) for x in (new, old, advantage)), clip=0.2, tokens=40)
    assert float(found.loss) == pytest.approx(np.maximum(plain, clipped).mean())
    assert float(found.clipped) == pytest.approx((clipped > plain).mean())
    log_ratio = new - old
    assert float(found.divergence) == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).mean())


def test_policy_loss_gradient_at_ratio_one_is_the_policy_gradient():
    """Before the first step the gradient is that of -A log pi."""
    old = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    new = old.clone().requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    policy_loss(new, old, advantage, clip=0.2, tokens=3).loss.backward()
    assert new.grad.tolist() == pytest.approx((-advantage / 3).tolist())


def test_log_ratio_is_clamped():
    """Log rho is clamped to +-20, so that no ratio is infinite."""
    new = torch.tensor([1000.0, -1000.0], requires_grad=True)
    found = policy_loss(new, torch.zeros(2), torch.tensor([-1.0, 1.0]), clip=0.2, tokens=2)
    assert float(found.loss.detach()) == pytest.approx((math.exp(20) - math.exp(-20)) / 2, rel=1e-6)


def test_value_loss():
    """Half the mean of the larger of the plain and the clipped squared error."""
    numbers = np.random.default_rng(5)
    new, old, returns = numbers.normal(size=(3, 30))
    clipped = old + np.clip(new - old, -0.2, 0.2)
    expected = 0.5 * np.maximum((new - returns) ** 2, (clipped - returns) ** 2).mean()
    found = value_loss(*(torch.tensor(x) for x in (new, old, returns)), clip=0.2, tokens=30)
    assert float(found) == pytest.approx(expected)


# -- log-probabilities --------------------------------------------------------------------------------------------


@pytest.fixture
def head_problem() -> tuple[torch.Tensor, Head, torch.Tensor]:
    torch.manual_seed(0)
    weight, bias = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    return hidden, Head(weight, weight, bias), torch.randint(0, 50, (11,))


def plain_logprobs(hidden, head, tokens, temperature):
    logits = (hidden @ head.weight_VD.T + head.bias_V) / temperature
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens], logits


def test_log_probabilities_at_the_sampling_temperature(head_problem, monkeypatch):
    """Logits are divided by the temperature; chunks change nothing, nor does the fused gradient."""
    hidden, head, tokens = head_problem
    monkeypatch.setattr("tunegate.training.losses.chunk_rows", lambda *_: 3)
    weights = torch.randn(11, dtype=torch.float64)
    expected, logits = plain_logprobs(hidden, head, tokens, 0.7)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), hidden, retain_graph=True)
    fused = token_logprobs(hidden, head, tokens, 0.7)
    (got,) = torch.autograd.grad((weights * fused).sum(), hidden)
    assert torch.allclose(fused, expected) and torch.allclose(got, wanted)

    recomputed, entropy = logprobs_and_entropy(hidden, head, tokens, 0.7, entropy="trained")
    probabilities = logits.softmax(-1)
    exact_entropy = -(probabilities * probabilities.log()).sum(-1)
    assert torch.allclose(recomputed, expected) and torch.allclose(entropy, exact_entropy)
    (wanted,) = torch.autograd.grad((weights * exact_entropy).sum(), hidden)
    (got,) = torch.autograd.grad((weights * entropy).sum(), hidden)
    assert torch.allclose(got, wanted)
    _, watched = logprobs_and_entropy(hidden, head, tokens, 0.7)
    assert torch.allclose(watched, exact_entropy) and not watched.requires_grad


def test_log_probabilities_train_the_head_too(head_problem):
    """As above, where the output layer is trained itself."""
    hidden, head, tokens = head_problem
    weight = head.weight_VD.clone().requires_grad_()
    trained = Head(weight, weight, head.bias_V)
    (got,) = torch.autograd.grad(token_logprobs(hidden, trained, tokens, 0.7).sum(), weight)
    (wanted,) = torch.autograd.grad(plain_logprobs(hidden, trained, tokens, 0.7)[0].sum(), weight)
    assert torch.allclose(got, wanted)


def test_bf16_head_computes_logits_in_fp32():
    """A bf16 logit near 20 would be rounded to a multiple of 1/8."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 30, bias=False).bfloat16()

    class Model:
        def get_output_embeddings(self):
            return layer

    hidden = (torch.randn(5, 64) * 30).bfloat16()
    exact = hidden.double() @ layer.weight.double().T
    head = Head.of(Model())
    assert torch.allclose(head.logits(hidden).double(), exact, atol=1e-4)


# -- sampling -----------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    """The frequencies of draws are the probabilities at the temperature (chi-square)."""
    from scipy.stats import chisquare

    logits = torch.tensor(np.random.default_rng(6).normal(size=20), dtype=torch.float32)
    count = 40_000
    noise = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits.expand(count, 20), noise, temperature=0.7)
    probabilities = torch.softmax(logits.double() / 0.7, 0).numpy()
    assert chisquare(np.bincount(tokens.numpy(), minlength=20), probabilities * count).pvalue > 1e-3
    assert logprobs.numpy() == pytest.approx(np.log(probabilities)[tokens.numpy()], abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(vocabulary=st.integers(2, 1200), seed=st.integers(0, 10_000))
def test_draw_inverts_the_distribution_function(vocabulary, seed):
    """The token drawn is the first whose cumulated probability exceeds the noise, across chunks."""
    numbers = np.random.default_rng(seed)
    logits = numbers.normal(scale=2.0, size=(4, vocabulary)).astype(np.float32)
    noise = numbers.random(4)
    tokens, _ = draw(torch.tensor(logits), torch.tensor(noise), temperature=1.0)
    weights = np.exp(logits.astype(np.float64))
    cumulated = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
    for row in range(4):
        token = int(tokens[row])
        assert cumulated[row, token] >= noise[row] - 1e-5
        assert token == 0 or cumulated[row, token - 1] <= noise[row] + 1e-5


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2**-53])
def test_extreme_noise_draws_a_possible_token(noise):
    """Neither padding of the vocabulary nor an impossible token is ever drawn."""
    logits = torch.full((1, 700), float("-inf"))
    logits[0, [300, 301, 420]] = 0.0
    tokens, logprobs = draw(logits, torch.tensor([noise], dtype=torch.float64), temperature=1.0)
    assert int(tokens) in {300, 420}
    assert float(logprobs) == pytest.approx(-math.log(3))


def test_greedy_takes_the_maximum():
    """Temperature 0 for evaluation."""
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs = draw(logits, torch.tensor([0.999], dtype=torch.float64), temperature=0.0)
    assert tokens.tolist() == [1]
    assert float(logprobs) == pytest.approx(3 - math.log(1 + math.e**3 + math.e))


@pytest.mark.parametrize(
    ("top_p", "top_k", "allowed"), [(1.0, 2, {0, 1}), (0.6, 0, {0, 1}), (0.5, 0, {0}), (0.01, 0, {0})]
)
def test_truncated_sampling(top_p, top_k, allowed):
    """Evaluation may truncate; the log-probability is that of the truncated distribution."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits = torch.tensor(np.log(probabilities), dtype=torch.float32).expand(200, 4)
    noise = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    tokens, logprobs = draw(logits, noise, temperature=1.0, top_p=top_p, top_k=top_k)
    assert set(tokens.tolist()) == allowed
    total = probabilities[sorted(allowed)].sum()
    assert logprobs.numpy() == pytest.approx(np.log(probabilities[tokens.numpy()] / total), abs=1e-5)


def test_noise_belongs_to_the_row():
    """A row's noise depends on seed and number, not on its batch; other seeds and rows differ."""
    noise = row_noise([7, 1], [0, 1, 2], 5)
    assert torch.equal(row_noise([7, 1], [2], 5)[0], noise[2])
    assert torch.equal(row_noise([7, 1], [2], 3)[0], noise[2, :3])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(row_noise([7, 2], [0], 5)[0], noise[0])
    assert not torch.equal(row_noise([8, 1], [0], 5)[0], noise[0])
    assert ((noise >= 0) & (noise < 1)).all()
