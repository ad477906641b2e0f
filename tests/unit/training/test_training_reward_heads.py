"""Rankings, several heads, costs, ensembles of reward models: losses against closed forms, and PPO on them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from training_samples import make_preferences, make_ratings

from tunegate.config import build_spec
from tunegate.data.records import Preference, Prompt, Rating
from tunegate.errors import DataError, ModelError, SpecError
from tunegate.observer import RecordingObserver
from tunegate.training.config import MEMBERS, RewardSpec
from tunegate.training.models import init_score_head, load_sequence_scorer
from tunegate.training.ppo import train_ppo
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.reward import train_reward
from tunegate.training.reward_data import encode_pairs, join_rankings, join_ratings, resample, with_heads
from tunegate.training.reward_frozen import fit_head
from tunegate.training.reward_losses import sign_loss
from tunegate.training.reward_model import RewardModel
from tunegate.training.reward_scores import raw_item_scores

SMALL = {"batch_pairs": 8, "max_length": 96, "learning_rate": 1e-2, "max_steps": 6}
ANSWERS = ["Start with the basics, then look again.", "Look it up in a book.", "No idea.", "Whatever, who cares."]


def ranking(number: int, answers: list[str]) -> list[Preference]:
    """One person's order of K answers, as pairs."""
    prompt = [{"role": "user", "content": f"What about number {number}?"}]
    return [
        Preference(id=f"k{number}-{a}-{b}", prompt=prompt, chosen=answers[a], rejected=answers[b], source="made")
        for a, b in combinations(range(len(answers)), 2)
    ]


# -- rankings -----------------------------------------------------------------------------------------------------


def test_a_ranking_is_one_item_with_every_answer_once(tiny_chat):
    items = encode_pairs(tiny_chat, ranking(1, ANSWERS) + ranking(2, ANSWERS[:2]), 96, use_margin=True).items
    whole, pair = join_rankings(items)
    assert len(whole.responses) == 4 and len(whole.compared) == 6
    assert whole.compared == [(a, b, 0.0) for a, b in combinations(range(4), 2)]
    assert len(pair.responses) == 2 and pair.compared == [(0, 1, 0.0)]


@pytest.mark.parametrize("budget", [64, 4000])
def test_a_ranking_weighs_as_much_as_a_pair(tiny_model, tiny_chat, tmp_path, budget):
    """Mean over the C(K, 2) pairs of each prompt, then mean over prompts, against scores of separate rows."""
    observer = RecordingObserver()
    pairs = ranking(1, ANSWERS) + ranking(2, ANSWERS[:3]) + ranking(3, ANSWERS[1:3])
    spec = RewardSpec(
        **(SMALL | {"max_steps": 1, "microbatch_tokens": budget}),
        rankings=True,
        centering=0.01,
        judge={"enabled": False},
    )
    result = train_reward(tiny_model, pairs, [], pairs, [], tmp_path / "o", spec=spec, seed=5, observer=observer)
    assert result.pairs == 6 + 3 + 1

    scorer = load_sequence_scorer(tiny_model)
    init_score_head(scorer, seed=5)
    alone = encode_pairs(tiny_chat, pairs, 96, use_margin=True).items
    raw = np.array(raw_item_scores(scorer, alone, tiny_chat.pad_id, observer))
    losses = np.log1p(np.exp(-(raw[:, 0] - raw[:, 1]))) + 0.01 * (raw[:, 0] + raw[:, 1]) ** 2
    by_prompt = [losses[:6].mean(), losses[6:9].mean(), losses[9]]
    assert observer.series("reward/loss")[0][1] == pytest.approx(np.mean(by_prompt), rel=1e-5)


def test_opposite_opinions_stay_and_equal_texts_go(tiny_chat):
    pair = ranking(1, ANSWERS[:2])[0]
    same = replace(pair, id="same", rejected=pair.chosen)
    turned = replace(pair, id="turned", chosen=pair.rejected, rejected=pair.chosen)
    (item,) = join_rankings(encode_pairs(tiny_chat, [pair, turned, same], 96, use_margin=True).items)
    assert item.compared == [(0, 1, 0.0), (1, 0, 0.0)]


def test_the_frozen_head_weighs_rankings_likewise():
    """Against autograd of the mean over prompts at the solution: the gradient, ridge included, is 0."""
    rng = np.random.default_rng(0)
    from tunegate.training.reward_data import Item

    features = [rng.normal(size=(k, 5)) for k in (4, 2, 3, 2, 4, 2)]
    items = [
        Item(i, [i], [[1]] * len(own), 0.0, [[]] * len(own), [(a, b, 0.0) for a, b in combinations(range(len(own)), 2)])
        for i, own in enumerate(features)
    ]
    spec = RewardSpec(trunk="frozen", centering=0.01)
    fitted = fit_head(items, features, spec, seed=0)
    stacked = np.concatenate(features)
    mean, spread = stacked.mean(0), stacked.std(0) + 1e-6
    direction = mean / spread / np.linalg.norm(mean / spread)
    scaled = [(own - mean) / spread for own in features]
    scaled = [torch.from_numpy(own - np.outer(own @ direction, direction)) for own in scaled]
    weight = torch.from_numpy(fitted.weight_D * spread).requires_grad_()
    losses = []
    for own, item in zip(scaled, items, strict=True):
        pairs = [
            torch.nn.functional.softplus(-(own[a] - own[b]) @ weight) + 0.01 * ((own[a] + own[b]) @ weight) ** 2
            for a, b, _ in item.compared
        ]
        losses.append(torch.stack(pairs).mean())
    loss = torch.stack(losses).mean() + 0.5 * fitted.ridge * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(gradient.abs().max()) < 1e-4


# -- heads and costs ----------------------------------------------------------------------------------------------

HEADS = (
    {"name": "helpful", "sources": ["made"]},
    {"name": "harm", "sources": ["other"], "kind": "cost", "weight": 0.5, "harmful_above": 2.5},
)


def labels(count: int) -> list[Rating]:
    """How harmful people found answers, 1 to 5."""
    return [replace(rating, source="other") for rating in make_ratings(count)]


def test_the_sign_loss_is_that_of_safe_rlhf():
    """-log sigmoid(s C), s = 1 for harmful; log 2 at the border."""
    cost, sign = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, -1.0, 1.0])
    expected = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0)), np.log(2.0)]
    assert sign_loss(cost, sign).numpy() == pytest.approx(expected)


def test_a_cost_scores_the_rejected_answer_higher_and_takes_ratings_as_labels(tiny_chat):
    heads = RewardSpec(heads=HEADS).heads
    pairs = make_preferences(6)
    items = with_heads(encode_pairs(tiny_chat, pairs, 96, use_margin=True).items, [p.source for p in pairs], heads)
    assert [item.head for item in items] == [0 if p.source == "made" else 1 for p in pairs]
    assert {item.compared[0][:2] for item in items if item.head == 1} == {(1, 0)}
    assert {item.compared[0][:2] for item in items if item.head == 0} == {(0, 1)}
    with pytest.raises(DataError, match=r"belongs to no head.*'third'"):
        with_heads(items[:1], ["third"] * 9, heads)


@pytest.fixture(scope="module", params=["full", "lora", "frozen"])
def two_heads(request, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("heads") / "reward"
    spec = RewardSpec(**SMALL, heads=HEADS, trunk=request.param, epochs=2)
    heldout = make_preferences(12, seed=9)
    observer = RecordingObserver()
    result = train_reward(
        tiny_model, make_preferences(40), labels(20), heldout, labels(5), out, spec=spec, seed=3, observer=observer
    )
    return out, result


def test_every_head_learns_from_its_own_and_the_joint_head_is_their_sum(two_heads):
    out, result = two_heads
    assert result.heads == ["helpful", "harm"] and result.labels > 0
    assert result.heldout.by_head.keys() == {"helpful", "harm"}
    assert sum(share.n for share in result.heldout.by_head.values()) == result.heldout.pairs == 12
    assert result.heldout.accuracy.value == pytest.approx(1.0)
    whole, helpful, harm = (RewardModel.load(out, precision="fp32", head=h) for h in (None, "helpful", "harm"))
    prompts = [[{"role": "user", "content": f"What about {n}?"}] for n in range(8)]
    answers = (ANSWERS * 2)[:8]
    scores = {name: model.score(prompts, answers) for name, model in (("w", whole), ("h", helpful), ("c", harm))}
    cost = next(scale for scale in whole.head.heads if scale.name == "harm")
    standardised = cost.gain * scores["c"] + cost.bias
    joint = scores["h"] - 0.5 * standardised
    # The joint score is standardised once more: equal up to a straight line with a positive slope.
    slope, intercept = np.polyfit(joint, scores["w"], 1)
    assert slope > 0 and scores["w"] == pytest.approx(slope * joint + intercept, abs=1e-3)
    assert (harm.head.gain, harm.head.bias) == (1.0, 0.0)
    with pytest.raises(ModelError, match="helpful, harm"):
        RewardModel.load(out, head="gone")


def test_ratings_join_the_head_they_are_about(tiny_chat):
    """One text may be rated for two heads; the labels of a cost are no ratings to predict."""
    from tunegate.training.reward_data import Item

    pair = Item(0, [1], [[2], [3]], 0.0, [[], []], head=1)
    other, label = Item(0, [1], [[2]], None, [[0.5]], head=0), Item(1, [1], [[3]], None, [[]], head=1, labels=[[-1]])
    joined = join_ratings([pair], [other, label])
    assert [(item.head, item.ratings, item.labels) for item in joined] == [
        (1, [[], []], [[], [-1]]),
        (0, [[0.5]], [[]]),
    ]


PROMPTS = [Prompt(id=f"p{n}", messages=[{"role": "user", "content": f"What about {n}?"}]) for n in range(16)]
PPO = {
    "steps": 2, "prompts_per_update": 8, "max_new_tokens": 8, "max_prompt_tokens": 64, "epochs": 1, "evaluate_every": 2,
    "evaluate_prompts": 6, "critic_warmup_epochs": 1, "precision": "fp32", "shaping": {"standardise_prompts": 8},
}  # fmt: skip


def test_a_head_is_the_cost_of_safe_rlhf(two_heads, tiny_model, tmp_path):
    """The Lagrangian holds the harm head below its limit while the joint head is the reward."""
    out, _ = two_heads
    cost = {"head": "harm", "limit": -5.0, "multiplier_rate": 0.1}
    spec = PPOSpec(**PPO, cost=cost)
    result = train_ppo(tiny_model, out, PROMPTS[:10], PROMPTS[10:], tmp_path / "o", spec=spec, seed=1)
    first = result.history[0]
    assert first.multiplier == pytest.approx(np.exp(0.1 * (first.cost + 5.0)), rel=1e-4)
    harm = RewardModel.load(out, precision="fp32", head="harm")
    messages = [prompt.messages for prompt in PROMPTS[10:]]
    texts = [example.before for example in result.examples]
    assert result.before.cost == pytest.approx(harm.score(messages, texts).mean(), rel=1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="exactly one source"):
        PPOSpec(cost={"head": "harm", "function": "a:b"})


def test_heads_that_cannot_be_are_refused():
    for heads, message in (
        ([{"name": "a", "sources": ["x"]}, {"name": "a", "sources": ["y"]}], "a is there twice"),
        ([{"name": "a", "sources": ["x"]}, {"name": "b", "sources": ["x"]}], "x is there twice"),
        ([{"name": "a", "sources": ["x"], "weight": 0}], "every weight is 0"),
        ([{"name": "a", "sources": ["x"], "harmful_above": 3}], "use kind: cost"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardSpec(heads=heads)


def test_a_spec_whose_heads_and_sources_do_not_fit_is_refused():
    data = {"preferences": [{"uri": "a.jsonl", "name": "help"}, {"uri": "b.jsonl", "name": "harm"}]}
    helpful = {"name": "helpful", "sources": ["help"]}
    harm = {"name": "harm", "sources": ["harm"], "kind": "cost"}
    assert build_spec({"data": data, "reward": {"heads": [helpful, harm]}, "ppo": {"cost": {"head": "harm"}}})
    for layer, message in (
        ({"reward": {"heads": [helpful, harm | {"sources": ["harms"]}]}}, "no source harms.*there are harm, help"),
        ({"reward": {"heads": [helpful]}}, "source harm belongs to no head"),
        ({"ppo": {"cost": {"head": "harm"}}}, "no head 'harm' of kind 'cost'"),
        ({"reward": {"heads": [helpful, harm]}, "ppo": {"cost": {"head": "helpful"}}}, "no head 'helpful' of kind"),
    ):
        with pytest.raises(SpecError, match=message):
            build_spec({"data": data}, layer)


# -- ensembles ----------------------------------------------------------------------------------------------------


def test_members_differ_and_ppo_takes_the_worst_opinion(tiny_model, tmp_path):
    spec = RewardSpec(**SMALL, ensemble=3)
    out = tmp_path / "reward"
    places = [(out, spec, 1), *((out / MEMBERS / str(n), spec.for_member(), n) for n in (2, 3))]
    for place, own, seed in places:
        train_reward(tiny_model, make_preferences(30), [], make_preferences(8, seed=9), [], place, spec=own, seed=seed)
    result = train_ppo(tiny_model, out, PROMPTS[:10], PROMPTS[10:], tmp_path / "o", spec=PPOSpec(**PPO), seed=1)
    assert len(result.scale) == 3
    messages = [prompt.messages for prompt in PROMPTS[10:]]
    texts = [example.before for example in result.examples]
    raw = [RewardModel.load(place, precision="fp32").score(messages, texts) for place, _, _ in places]
    scaled = np.array([s.gain * own + s.bias for s, own in zip(result.scale, raw, strict=True)])
    assert not np.allclose(scaled[0], scaled[1], atol=1e-3)
    assert result.before.score == pytest.approx(scaled.min(0).mean(), abs=1e-3)

    joined = PPOSpec(**PPO, ensemble={"combine": "mean_minus_variance", "variance_weight": 0.3})
    other = train_ppo(tiny_model, out, PROMPTS[:10], PROMPTS[10:], tmp_path / "p", spec=joined, seed=1)
    assert other.before.score == pytest.approx((scaled.mean(0) - 0.3 * scaled.var(0)).mean(), abs=1e-3)


def test_members_on_a_frozen_trunk_see_other_prompts(tiny_chat):
    assert RewardSpec(trunk="frozen", ensemble=2).for_member().bootstrap
    items = encode_pairs(tiny_chat, [p for n in range(9) for p in ranking(n, ANSWERS[:3])], 96, use_margin=True).items
    one, other = resample(items, 1), resample(items, 2)
    assert len(one) == len(other) == len(items)
    assert [item.index for item in one] != [item.index for item in other]
    assert len({item.index for item in one}) < len(items)  # some twice, some never
    assert resample(items, 1) == one


def test_an_ensemble_of_one_is_refused(tiny_model, tiny_reward, tmp_path):
    with pytest.raises(SpecError, match=r"set reward\.ensemble"):
        spec = PPOSpec(**PPO, ensemble={"combine": "min"})
        train_ppo(tiny_model, tiny_reward, PROMPTS[:10], PROMPTS[10:], tmp_path, spec=spec, seed=1)
