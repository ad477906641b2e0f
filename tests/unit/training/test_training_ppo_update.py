"""The PPO update on a tiny model: log-probabilities, gradients, critics, order, early stop."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tunegate.errors import TrainingError
from tunegate.training.batching import pad_right
from tunegate.training.critic import SeparateCritic, SharedTrunkCritic
from tunegate.training.models import hidden_states, load_causal_lm
from tunegate.training.optim import Optimizer
from tunegate.training.policy import Policy
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.ppo_setup import optimizer_spec as _optimizer_spec
from tunegate.training.reward_model import RewardModel
from tunegate.training.rollout import Completion
from tunegate.training.scoring import Rollout, Scorer, Signal, score_policy, set_values
from tunegate.training.update import Learner, UpdateFigures, ppo_update, set_advantages, warm_up_critic

TOPICS = ["bread", "rice", "a bicycle", "the moon and the tea", "tea", "a fence"]
PROMPTS = [[{"role": "user", "content": f"What about {topic}?"}] for topic in TOPICS]
BASE = {"max_new_tokens": 10, "max_prompt_tokens": 64, "prompts_per_update": 6, "epochs": 1, "precision": "fp32"}


def make_policy(tiny_model, **changes) -> Policy:
    """A policy whose adapters are not at their start, so that it differs from the reference."""
    torch.manual_seed(0)
    policy = Policy(tiny_model, PPOSpec(**(BASE | changes)))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif parameter.requires_grad and policy.spec.method == "full":
                parameter.add_(torch.randn_like(parameter) * 0.01)
    policy.refresh()
    return policy


def make_rollout(policy: Policy, **options) -> Rollout:
    """Responses of different lengths, scored by policy and reference, with made-up scores and values."""
    rows = [policy.chat.prompt_ids(prompt) for prompt in PROMPTS]
    drawn = policy.sampler.generate_ids(rows, policy.spec.rollout_sampling, seed=[1])
    stop = policy.chat.stop_ids[0]
    completions = []
    for index, completion in enumerate(drawn):
        ids = completion.token_ids[: 3 + index]
        if index % 2:
            ids = [*ids[:-1], stop]
        completions.append(
            Completion(policy.chat.decode(ids), ids, completion.logprobs[: len(ids)], ids[-1] == stop, len(rows[index]))
        )
    rollout = score_policy(policy, rows, completions, temperature=policy.spec.temperature, **options)
    torch.manual_seed(5)
    signal = Signal(torch.randn(len(rows)))
    signal.values_BT = torch.where(rollout.mask_BT, torch.randn(rollout.mask_BT.shape), 0.0)
    rollout.signals["reward"] = signal
    return rollout


def naive_logprobs(model, rollout: Rollout, row: int, temperature: float) -> torch.Tensor:
    """One row, the whole model, all logits: nothing shared, cached, padded or chunked."""
    prompt, response = rollout.prompts[row], rollout.completions[row].token_ids
    logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float() / temperature
    predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return predicted[torch.arange(len(response)), response]


# -- log-probabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"adapted_layers": 1.0}, {"method": "full"}, {"lora": {"targets": "q_proj"}}])
def test_policy_and_reference_log_probabilities(tiny_model, changes):
    """Stems, padding and chunks change nothing; the reference is the model that PPO started from."""
    policy = make_policy(tiny_model, **changes)
    assert policy.has_stem == (changes.get("adapted_layers", 0.5) < 1 and changes.get("method") != "full")
    rollout = make_rollout(policy)
    original = load_causal_lm(tiny_model, "fp32")
    for row, completion in enumerate(rollout.completions):
        length = len(completion.token_ids)
        with torch.no_grad():
            new = naive_logprobs(policy.model, rollout, row, 0.7)
            sampled = naive_logprobs(policy.sampler.model, rollout, row, 0.7)
            reference = naive_logprobs(original, rollout, row, 0.7)
        assert torch.allclose(rollout.old_logprobs_BT[row, :length], new, atol=2e-5)
        assert torch.allclose(new, sampled, atol=2e-5)
        assert torch.allclose(rollout.reference_logprobs_BT[row, :length], reference, atol=2e-5)
        assert not torch.allclose(new, reference, atol=1e-3)
        drawn = length - row % 2  # every other response had its last token replaced by the stop token
        assert completion.logprobs[:drawn] == pytest.approx(new[:drawn].tolist(), abs=1e-4)
        assert rollout.old_logprobs_BT[row, length:].eq(0).all()


def test_entropy_is_that_of_the_distribution_before_each_token(tiny_model):
    """Metrics are masked."""
    policy = make_policy(tiny_model)
    rollout = make_rollout(policy)
    prompt, response = rollout.prompts[2], rollout.completions[2].token_ids
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0] / 0.7
    expected = torch.distributions.Categorical(logits=logits[len(prompt) - 1 : -1]).entropy()
    assert torch.allclose(rollout.entropy_BT[2, : len(response)], expected, atol=1e-4)


def test_layers_below_the_adapters_are_computed_once(tiny_model):
    """The stem replaces the lower layers exactly, and they are not run again."""
    policy = make_policy(tiny_model)
    rollout = make_rollout(policy)
    batch = rollout.batch([0, 3], policy.chat.pad_id)
    calls: list[int] = []
    policy.model.model.layers[0].register_forward_hook(lambda *_: calls.append(0))
    from_stem = policy.hidden(batch.batch, rollout.stem([0, 3]))
    assert calls == []
    whole = policy.hidden(batch.batch, None)
    assert calls == [0]
    assert torch.allclose(batch.predictors(from_stem), batch.predictors(whole), atol=1e-6)


def test_trunk_that_cannot_be_split_is_run_whole(tiny_model, monkeypatch):
    """A model whose upper layers alone give something else gets no stem, and the same log-probabilities."""
    expected = make_rollout(make_policy(tiny_model)).old_logprobs_BT
    original = Policy.hidden

    def broken(self, batch, stem_BTD):
        hidden = original(self, batch, stem_BTD)
        return hidden if stem_BTD is None else hidden * 1.5

    monkeypatch.setattr(Policy, "hidden", broken)
    policy = make_policy(tiny_model)
    assert not policy.has_stem
    assert torch.allclose(make_rollout(policy).old_logprobs_BT, expected, atol=1e-5)


def test_sampler_follows_the_policy_only_when_refreshed(tiny_model):
    policy = make_policy(tiny_model)
    before = make_rollout(policy)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3.0)
        stale = naive_logprobs(policy.sampler.model, before, 0, 0.7)
        policy.refresh()
        fresh = naive_logprobs(policy.sampler.model, before, 0, 0.7)
        trained = naive_logprobs(policy.model, before, 0, 0.7)
    assert torch.allclose(stale, before.old_logprobs_BT[0, : len(stale)], atol=2e-5)
    assert torch.allclose(fresh, trained, atol=2e-5) and not torch.allclose(fresh, stale, atol=1e-2)


def test_sampler_shares_what_is_not_adapted(tiny_model):
    policy = make_policy(tiny_model)
    assert policy.sampler.model.model.embed_tokens.weight is policy.model.model.embed_tokens.weight
    lower, upper = policy.sampler.model.model.layers
    assert lower.mlp.up_proj.weight is policy.model.model.layers[0].mlp.up_proj.weight
    assert upper.mlp.up_proj.weight is not policy.model.model.layers[1].mlp.up_proj.base_layer.weight


# -- gradients ----------------------------------------------------------------------------------------------------


def run_update(policy, rollout, spec, learner=None, *, catch=True, monkeypatch=None):
    """One `ppo_update`; with `catch` the gradients before the first step instead of the step."""
    advantages = set_advantages(rollout, spec, beta=0.1, multiplier=None)
    optimizer = Optimizer(
        policy.model.named_parameters(), _optimizer_spec(spec), learning_rate=spec.policy_learning_rate, total_steps=100
    )
    learners = {} if learner is None else {"reward": learner}
    caught: list[dict[str, torch.Tensor]] = []
    if catch:
        original = Optimizer.step

        def step(self):
            caught.append({n: m.grad.clone() for n, m in zip(self.names, self._masters, strict=True)})
            return original(self)

        monkeypatch.setattr(Optimizer, "step", step)
    figures = ppo_update(policy, optimizer, learners, rollout, advantages, spec, beta=0.1, seed=0, update=0)
    return figures, caught, advantages


SPECS = [
    {},
    {"method": "full", "learning_rate": 1e-4},
    {"entropy_coefficient": 0.3},
    {"kl": {"placement": "loss"}},
    {"adapted_layers": 1.0},
]


@pytest.mark.parametrize("changes", SPECS)
def test_gradient_is_that_of_the_formula_and_of_no_microbatch(tiny_model, monkeypatch, changes):
    """The gradient of the mean over all tokens, written down naively, at every microbatch size."""
    found = []
    for tokens in (64, 100, 4096):
        policy = make_policy(tiny_model, **changes, microbatch_tokens=tokens)
        rollout = make_rollout(policy)
        rollout.old_logprobs_BT = torch.where(rollout.mask_BT, rollout.old_logprobs_BT + 0.15, 0.0)  # ratios off 1
        spec = policy.spec
        naive = copy.deepcopy(policy.model)
        with monkeypatch.context() as patched:
            _, caught, advantages = run_update(policy, rollout, spec, monkeypatch=patched)
        found.append(caught[0])
    policy_terms, count = [], 0
    for row in range(len(rollout)):
        prompt, response = rollout.prompts[row], rollout.completions[row].token_ids
        logits = naive(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0] / spec.temperature
        full = logits[len(prompt) - 1 : -1].log_softmax(-1)
        new = full[torch.arange(len(response)), response]
        size = slice(0, len(response))
        ratio = (new - rollout.old_logprobs_BT[row, size]).exp()
        advantage = advantages[row, size]
        term = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        term = term + spec.entropy_coefficient * (full.exp() * full).sum(-1)
        if spec.kl.placement == "loss":
            term = term + 0.1 * 0.5 * (new - rollout.reference_logprobs_BT[row, size]).square()
        policy_terms.append(term.sum())
        count += len(response)
    (sum(policy_terms) / count).backward()
    wanted = {name: parameter.grad for name, parameter in naive.named_parameters() if parameter.requires_grad}
    assert wanted.keys() == found[0].keys()
    for gradients in found:
        for name, gradient in gradients.items():
            scale = float(wanted[name].abs().max())
            assert torch.allclose(gradient, wanted[name], atol=2e-4 * scale + 1e-8), name


def test_shares_of_ranks_add_up_to_the_whole_gradient(tiny_model, monkeypatch):
    """Two ranks' gradients, each divided by the tokens of both, sum to one process's."""
    policy = make_policy(tiny_model)
    rollout = make_rollout(policy)
    with monkeypatch.context() as patched:
        _, caught, advantages = run_update(policy, rollout, policy.spec, monkeypatch=patched)
    total = int(rollout.lengths_B.sum())
    parts = []
    for rank in (0, 1):
        mine = make_policy(tiny_model)
        rows = list(range(rank, len(rollout), 2))
        part = score_policy(
            mine, [rollout.prompts[r] for r in rows], [rollout.completions[r] for r in rows], temperature=0.7
        )
        width = part.mask_BT.shape[1]
        with monkeypatch.context() as patched:
            patched.setattr(
                "tunegate.training.update.sum_over_ranks",
                lambda tensor: torch.tensor(total) if tensor.dtype == torch.int64 else tensor,
            )
            gradients: list[dict[str, torch.Tensor]] = []

            def step(self, into=gradients):
                into.append({n: m.grad.clone() for n, m in zip(self.names, self._masters, strict=True)})
                raise StopIteration

            patched.setattr(Optimizer, "step", step)
            optimizer = Optimizer(
                mine.model.named_parameters(), _optimizer_spec(mine.spec), learning_rate=1e-4, total_steps=9
            )
            with pytest.raises(StopIteration):
                ppo_update(mine, optimizer, {}, part, advantages[rows][:, :width], mine.spec, beta=0, seed=0, update=0)
        parts.append(gradients[0])
    for name, gradient in caught[0].items():
        both = parts[0][name] + parts[1][name]
        assert torch.allclose(gradient, both, atol=1e-4 * float(gradient.abs().max()) + 1e-9), name


def test_ratio_is_one_before_the_first_step(tiny_model):
    """With old log-probabilities recomputed by the same forward pass, to the last bit."""
    policy = make_policy(tiny_model, learning_rate=1e-3)
    rollout = make_rollout(policy)
    figures, _, _ = run_update(policy, rollout, policy.spec, catch=False)
    assert figures.steps == 1
    assert figures.divergence == 0.0
    assert figures.clip_fraction == 0.0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_pass_behind_the_old_log_probabilities_serves_the_first_step(tiny_model, monkeypatch, method):
    found = {}
    for kept in (False, True):
        policy = make_policy(tiny_model, method=method, epochs=2, learning_rate=1e-4, kl={"early_stop": None})
        rollout = make_rollout(policy, keep_first_pass=kept)
        assert (rollout.first_pass is not None) == kept
        passes: list[int] = []
        original = policy.hidden
        monkeypatch.setattr(policy, "hidden", lambda *args, run=original, seen=passes: seen.append(1) or run(*args))
        with monkeypatch.context() as patch:
            figures, gradients, _ = run_update(policy, rollout, policy.spec, monkeypatch=patch)
        assert rollout.first_pass is None
        assert len(passes) == (1 if kept else 2)
        found[kept] = (figures, gradients)
    (without, own), (figures, gradients) = found[False], found[True]
    assert figures.policy_loss == pytest.approx(without.policy_loss, abs=1e-6)
    assert figures.divergence == pytest.approx(without.divergence, rel=1e-2)
    for step in range(2):
        for name, gradient in own[step].items():
            assert torch.allclose(
                gradients[step][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-9
            ), name


def test_no_pass_is_kept_of_a_rollout_that_takes_several_microbatches(tiny_model):
    policy = make_policy(tiny_model, microbatch_tokens=64)
    assert make_rollout(policy, keep_first_pass=True).first_pass is None


def test_first_loss_is_minus_the_mean_advantage(tiny_model):
    """A closed form at ratio 1; whitened advantages make it 0."""
    policy = make_policy(tiny_model, whiten_advantages=False)
    rollout = make_rollout(policy)
    figures, _, advantages = run_update(policy, rollout, policy.spec, catch=False)
    assert figures.policy_loss == pytest.approx(-float(advantages[rollout.mask_BT].mean()), rel=1e-4)


def test_dropout_is_refused():
    """Dropout is off, so the ratio is exactly 1 before the first step."""
    with pytest.raises(ValueError, match="dropout"):
        PPOSpec(lora={"dropout": 0.1})


# -- order, early stop, bad steps ---------------------------------------------------------------------------------


def test_every_epoch_is_a_fresh_permutation_of_a_frozen_rollout(tiny_model, monkeypatch):
    """A fresh permutation an epoch over a frozen rollout."""
    policy = make_policy(tiny_model, epochs=3, minibatches=2, learning_rate=1e-3, microbatch_tokens=64)
    rollout = make_rollout(policy)
    seen: list[int] = []
    original = Rollout.batch
    monkeypatch.setattr(Rollout, "batch", lambda self, rows, pad: seen.extend(rows) or original(self, rows, pad))
    frozen = [rollout.old_logprobs_BT.clone(), rollout.signals["reward"].values_BT.clone()]
    figures, _, advantages = run_update(policy, rollout, policy.spec, catch=False)
    kept = advantages.clone()
    assert figures.steps == 6
    epochs = [seen[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(sorted(epoch[:3])) for epoch in epochs}) > 1
    assert torch.equal(rollout.old_logprobs_BT, frozen[0])
    assert torch.equal(rollout.signals["reward"].values_BT, frozen[1])
    assert torch.equal(advantages, kept)


def test_update_ends_when_the_new_policy_is_too_far_from_the_old(tiny_model):
    """KL(new, old) > 1.5 target; the step that showed it is not taken."""
    policy = make_policy(tiny_model, epochs=4, learning_rate=0.05, kl={"early_stop": 0.01})
    figures, _, _ = run_update(policy, make_rollout(policy), policy.spec, catch=False)
    assert figures.stopped_early
    assert figures.steps == 1
    assert figures.divergence > 0.015
    assert all(parameter.grad is None for parameter in policy.model.parameters())

    policy = make_policy(tiny_model, epochs=4, learning_rate=0.05, kl={"early_stop": None})
    figures, _, _ = run_update(policy, make_rollout(policy), policy.spec, catch=False)
    assert (figures.steps, figures.stopped_early) == (4, False)


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny_model):
    """Steps that are not finite are skipped and counted."""
    policy = make_policy(tiny_model, epochs=2)
    rollout = make_rollout(policy)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = Optimizer(policy.model.named_parameters(), _optimizer_spec(policy.spec), learning_rate=1, total_steps=9)
    advantages = torch.where(rollout.mask_BT, float("inf"), 0.0)
    figures = ppo_update(policy, optimizer, {}, rollout, advantages, policy.spec, beta=0, seed=0, update=0)
    assert isinstance(figures, UpdateFigures)
    assert (figures.steps, figures.skipped, optimizer.skipped_steps) == (2, 2, 2)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


# -- critics ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tiny_model, tiny_reward):
    """A rollout with the scores and features of a reward model of the same tokens."""
    policy = make_policy(tiny_model)
    rollout = make_rollout(policy)
    model = RewardModel.load(tiny_reward, precision="fp32")
    scorer = Scorer([model])
    raw, features = scorer.raw_with_features(PROMPTS, rollout.prompts, rollout.completions)
    return policy, rollout, model, scorer, raw, features


def test_scores_and_features_come_from_one_pass(scored):
    """The score is that of the text, whether or not its tokens are the ones that were drawn."""
    _, rollout, model, _, raw, features = scored
    texts = [completion.text for completion in rollout.completions]
    assert raw[0] == pytest.approx(model.score(PROMPTS, texts), abs=1e-5)
    for prompt, completion, row in zip(rollout.prompts, rollout.completions, features, strict=True):
        batch = pad_right([[*prompt, *completion.token_ids]], 0)
        with torch.no_grad():
            hidden = hidden_states(model.model, batch)[0, len(prompt) - 1 : -1]
        assert torch.allclose(row.hidden_TD, hidden, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared_trunk", "separate"])
def test_critic_starts_as_the_reward_models_reading(scored, tiny_reward, kind):
    """V before token t is the standardised score of prompt and tokens before t."""
    policy, rollout, model, scorer, raw, features = scored
    scale = scorer.standardise_on(raw)
    if kind == "shared_trunk":
        critic = SharedTrunkCritic(64, 16, policy.device)
    else:
        critic = SeparateCritic(tiny_reward, precision="fp32", gradient_checkpointing=False)
        scale.gain[0] *= model.head.gain  # on raw outputs, not on the folder's own scale
        scale.bias[0] += scorer.standardisation.gain[0] / model.head.gain * model.head.bias
    critic.gain, critic.bias = scale.gain[0], scale.bias[0]
    signal = Signal(torch.zeros(6), features)
    set_values(rollout, signal, critic, pad_id=policy.chat.pad_id, budget=100)
    for row, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        prefixes = [[*prompt, *completion.token_ids[:t]] for t in range(len(completion.token_ids))]
        readings = model.raw_ids(prefixes) if kind == "separate" else model.score_ids(prefixes)
        expected = critic.gain * readings + critic.bias
        assert signal.values_BT[row, : len(prefixes)].numpy() == pytest.approx(expected, abs=1e-4)
        assert signal.values_BT[row, len(prefixes) :].eq(0).all()


@pytest.mark.parametrize("budget", [64, 4096])
def test_the_pass_behind_the_old_values_serves_the_first_step(scored, tiny_reward, monkeypatch, budget):
    """Where one microbatch holds the rollout; the critic is then run once less, and learns the same."""
    policy, rollout = scored[:2]
    spec = PPOSpec(**BASE | {"epochs": 2}, microbatch_tokens=budget, kl={"early_stop": None})
    start = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    found = []
    for keep in (False, True):
        policy.model.load_state_dict(start, strict=False)
        critic = SeparateCritic(tiny_reward, precision="fp32", gradient_checkpointing=False)
        signal = rollout.signals["reward"]
        set_values(rollout, signal, critic, pad_id=policy.chat.pad_id, budget=budget, keep_first_pass=keep)
        kept = signal.first_pass is not None
        assert kept == (keep and budget == 4096)
        passes: list[int] = []
        values = critic.values
        monkeypatch.setattr(critic, "values", lambda *args, run=values, seen=passes: seen.append(1) or run(*args))
        optimizer = Optimizer(
            critic.module.named_parameters(), _optimizer_spec(spec), learning_rate=1e-3, total_steps=9
        )
        figures, _, _ = run_update(policy, rollout, spec, Learner(critic, optimizer), catch=False)
        assert signal.first_pass is None
        found.append((figures.value_loss["reward"], critic.module.state_dict(), len(passes) + kept))
    (loss, weights, passes), (other_loss, other_weights, other_passes) = found
    assert passes == other_passes >= 2
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, weight in weights.items():
        assert torch.allclose(other_weights[name], weight, atol=1e-6), name


@pytest.mark.parametrize("tokens", [64, 4096])
def test_value_gradient_does_not_depend_on_the_microbatch(scored, monkeypatch, tokens):
    """The clipped value loss against the formula on all tokens at once."""
    policy, rollout, _, _, _, features = scored
    torch.manual_seed(1)
    critic = SharedTrunkCritic(64, 16, policy.device)
    torch.nn.init.normal_(critic.module.outer.weight, std=0.3)
    signal = rollout.signals["reward"]
    signal.features = features
    naive = copy.deepcopy(critic)
    spec = PPOSpec(**BASE, microbatch_tokens=tokens)
    learner = Learner(
        critic,
        Optimizer(critic.module.named_parameters(), _optimizer_spec(spec), learning_rate=1e-3, total_steps=9),
    )
    with monkeypatch.context() as patched:
        _, caught, _ = run_update(policy, rollout, spec, learner, monkeypatch=patched)
    values = torch.cat([naive.module(row.hidden_TD, row.reading_T) for row in features])
    old, returns = signal.values_BT[rollout.mask_BT], signal.returns_BT[rollout.mask_BT]
    clipped = old + (values - old).clamp(-spec.value_clip, spec.value_clip)
    loss = spec.value_coefficient * 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()
    loss.backward()
    for name, parameter in naive.module.named_parameters():
        assert torch.allclose(caught[1][name], parameter.grad, atol=1e-5), name


def test_warm_up_teaches_the_critic_the_returns(scored):
    """Before the policy moves the critic learns what the reference's responses are worth."""
    policy, rollout, _, _, _, features = scored
    signal = rollout.signals["reward"]
    signal.features = features
    spec = PPOSpec(**BASE)
    set_advantages(rollout, spec, beta=0.0, multiplier=None)
    critic = SharedTrunkCritic(64, 32, policy.device)
    learner = Learner(
        critic, Optimizer(critic.module.named_parameters(), _optimizer_spec(spec), learning_rate=1e-2, total_steps=999)
    )
    options = {"pad_id": policy.chat.pad_id, "seed": 0}
    first = warm_up_critic(learner, rollout, "reward", spec, epochs=1, **options)
    last = warm_up_critic(learner, rollout, "reward", spec, epochs=60, **options)
    assert last < 0.2 * first


# -- functions as rewards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, texts: [1.0], "one number a response"),
        (lambda prompts, texts: [float("nan")] * len(texts), "not finite"),
        (lambda prompts, texts: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_bad_reward_functions_are_named(function, message):
    scorer = Scorer(function=function, name="ppo.reward_function")
    completions = [Completion(text, [1], [0.0], True, 1) for text in ("a", "b")]
    with pytest.raises(TrainingError, match=message) as caught:
        scorer.raw(PROMPTS[:2], completions)
    assert caught.value.key == "ppo.reward_function"


def test_equal_scores_cannot_be_standardised():
    """Scores of reference samples have mean 0 and variance 1."""
    with pytest.raises(TrainingError, match="same score"):
        Scorer(function=lambda p, t: [0.0]).standardise_on(np.ones((1, 8)))


def test_standardised_scores_have_mean_0_and_variance_1():
    """For each model of an ensemble by itself; the standardised scores are joined."""
    raw = np.random.default_rng(0).normal([[3.0], [-40.0]], [[0.1], [7.0]], size=(2, 50))
    scorer = Scorer(
        [object(), object()],  # type: ignore[list-item] - only counted
        ensemble=PPOSpec(ensemble={"members": ["x"]}).ensemble,
    )
    scorer.standardise_on(raw)
    standardised = scorer.standardisation(raw)
    assert standardised.mean(1) == pytest.approx([0, 0], abs=1e-9)
    assert standardised.std(1) == pytest.approx([1, 1])
    assert scorer.combined(raw) == pytest.approx(standardised.min(0))
