from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest
from training_samples import make_preferences, make_ratings

from tunegate.data.records import Preference, Rating
from tunegate.errors import DataError, ModelError, TrainingStoppedError
from tunegate.observer import RecordingObserver
from tunegate.training.batching import pad_right
from tunegate.training.chat import Chat
from tunegate.training.config import LoraSpec, ModelSpec, RewardSpec
from tunegate.training.models import init_score_head, load_sequence_scorer, resolve_model
from tunegate.training.results import RewardResult, Share
from tunegate.training.reward import train_reward
from tunegate.training.reward_data import RatingScale, encode_pairs, encode_ratings, join_ratings
from tunegate.training.reward_evaluation import LENGTH_EDGES, evaluate_pairs, rating_figures, reliability
from tunegate.training.reward_frozen import fit_head
from tunegate.training.reward_losses import pairwise_loss, pointwise_loss
from tunegate.training.reward_model import RewardHead, RewardModel, raw_scores
from tunegate.training.reward_scores import score_items

PAIRS = make_preferences(48)
RATINGS = make_ratings(48)
HELDOUT_PAIRS = make_preferences(16, seed=7, split="heldout")
HELDOUT_RATINGS = make_ratings(16, seed=7, split="heldout")
FAST = {"learning_rate": 2e-3, "batch_pairs": 8, "max_length": 128}


def weights(path):
    return load_file(path / "model.safetensors")


def train(model, out, *, pairs=PAIRS, ratings=RATINGS, seed=3, observer=None, checkpoints=None, stop=None, **spec):
    return train_reward(
        model, pairs, ratings, HELDOUT_PAIRS, HELDOUT_RATINGS, out,
        spec=RewardSpec(**{**FAST, **spec}), seed=seed, observer=observer, checkpoints=checkpoints, stop_requested=stop,
    )  # fmt: skip


# -- losses -----------------------------------------------------------------------------------------------------------


def test_pairwise_loss_with_margin_and_centering():
    """The pairwise loss with margin and centering."""
    chosen, rejected, margin = [1.5, -0.2, 3.0], [0.5, 0.4, -2.0], [0.0, 1.0, 0.5]
    expected = [
        -math.log(1 / (1 + math.exp(-(c - r - m)))) + 0.1 * (c + r) ** 2
        for c, r, m in zip(chosen, rejected, margin, strict=True)
    ]
    found = pairwise_loss(*map(torch.tensor, (chosen, rejected, margin)), centering=0.1)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_pointwise_loss_squared_and_huber():
    """The pointwise loss on standardised ratings."""
    raw, target = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.5, 1.0, 0.0])
    assert pointwise_loss(raw, target, huber_delta=None).tolist() == [0.25, 0.0, 16.0]
    assert pointwise_loss(raw, target, huber_delta=1.0).tolist() == [0.125, 0.0, 3.5]


def test_ratings_are_standardised_on_the_training_split_only():
    """Other scales are mapped onto the most frequent one; held-out ratings do not move the fit."""
    rows = [
        Rating(id=str(i), prompt=[], response="", score=score, scale=scale)
        for i, (score, scale) in enumerate([(1, (1, 5)), (5, (1, 5)), (3, (1, 5)), (10, (0, 10))])
    ]
    scale = RatingScale.fit(rows)
    assert scale.common(rows).tolist() == [1, 5, 3, 5]
    assert (scale.mean, scale.scale) == (3.5, pytest.approx(np.std([1, 5, 3, 5])))
    assert scale.standardised(rows[:1]).tolist() == pytest.approx([(1 - 3.5) / np.std([1, 5, 3, 5])])
    with pytest.raises(DataError, match="equal"):
        RatingScale.fit(rows[:1])
    with pytest.raises(DataError, match="no"):
        RatingScale.fit([])


# -- the model --------------------------------------------------------------------------------------------------------


def test_head_is_drawn_from_n_0_1_over_d_plus_1_without_bias(tiny_model):
    """The head's first weights and the decay of the learning rate."""
    model = load_sequence_scorer(tiny_model)
    assert model.score.bias is None
    drawn = []
    for seed in range(60):
        init_score_head(model, seed=seed)
        drawn.append(model.score.weight.detach().flatten().clone())
    values = torch.cat(drawn)
    assert values.mean().item() == pytest.approx(0, abs=4 / math.sqrt(65 * len(values)))
    assert values.var().item() == pytest.approx(1 / 65, rel=0.08)
    init_score_head(model, seed=0)
    assert torch.equal(model.score.weight.flatten(), drawn[0])


def test_learning_rate_decays_to_zero_over_one_epoch(tiny_model, tmp_path):
    """The head's first weights and the decay of the learning rate; a constant schedule is refused."""
    observer = RecordingObserver()
    result = train(tiny_model, tmp_path, observer=observer)
    assert RewardSpec().epochs == 1 and result.steps == 6
    rates = [rate for _, rate in observer.series("reward/learning_rate")]
    assert rates == pytest.approx([2e-3 * (1 - step / 6) for step in range(6)])
    with pytest.raises(ValueError, match="decay to 0"):
        RewardSpec(schedule="constant")


def test_score_is_read_at_the_last_real_token_of_the_cut_text(tiny_model, tiny_chat):
    """The score is read at the last real token of the cut text, though it holds padding tokens itself."""
    model = load_sequence_scorer(tiny_model)
    init_score_head(model, seed=1)
    row = tiny_chat.exchange([{"role": "user", "content": "hi"}], ["some answer"]).row()
    row = [*row[:-1], tiny_chat.pad_id, row[-1]]
    alone = raw_scores(model, pad_right([row], tiny_chat.pad_id))
    hidden = model.model(torch.tensor([row])).last_hidden_state
    torch.testing.assert_close(alone[0], hidden[0, -1] @ model.score.weight[0])
    beside = raw_scores(model, pad_right([row, row + row], tiny_chat.pad_id))
    torch.testing.assert_close(beside[0], alone[0], rtol=1e-5, atol=1e-6)
    ends_with_pad = [*row, tiny_chat.pad_id]
    hidden = model.model(torch.tensor([ends_with_pad])).last_hidden_state
    torch.testing.assert_close(
        raw_scores(model, pad_right([ends_with_pad], tiny_chat.pad_id))[0], hidden[0, -1] @ model.score.weight[0]
    )


def test_shared_prompt_gives_the_scores_of_separate_rows(tiny_model, tiny_chat):
    """Prompt once, both answers in a row, 4-D mask, positions reset: the scores of separate rows."""
    model = load_sequence_scorer(tiny_model)
    init_score_head(model, seed=1)
    items = encode_pairs(tiny_chat, PAIRS[:6], 128, use_margin=True).items
    together = score_items(model, items, tiny_chat.pad_id)
    rows = [item.prompt + ids for item in items for ids in item.responses]
    separate = torch.cat([raw_scores(model, pad_right([row], tiny_chat.pad_id)) for row in rows])
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(together.sum(), model.model.layers[0].mlp.up_proj.weight)
    (expected,) = torch.autograd.grad(separate.sum(), model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_normalised_scores_have_mean_0_and_variance_1():
    """Scores of reference samples have mean 0 and variance 1."""
    raw = np.random.default_rng(0).normal(3.0, 0.2, 200)
    head = RewardHead().normalised_on(raw)
    scores = head.gain * raw + head.bias
    assert scores.mean() == pytest.approx(0, abs=1e-9) and scores.var() == pytest.approx(1)
    for hopeless in (np.ones(5), np.array([1.0]), np.array([1.0, np.nan])):
        with pytest.raises(ModelError, match="same score"):
            RewardHead().normalised_on(hopeless)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["pairwise", "pointwise", "joint"])
@pytest.mark.parametrize("trunk", ["full", "lora", "frozen"])
def test_reward_model_learns_and_loads_again(tiny_model, tmp_path, objective, trunk):
    rate = 1e-2 if trunk == "lora" else 2e-3
    result = train(tiny_model, tmp_path, objective=objective, trunk=trunk, learning_rate=rate, epochs=2)
    assert result.heldout.accuracy.value > 0.9 and result.heldout.pairs == 16
    assert result.heldout.ratings.rho > 0.5 and result.heldout.ratings.n == 16
    assert (result.ratings, result.pairs) == {"pairwise": (0, 48), "pointwise": (48, 0), "joint": (48, 48)}[objective]
    assert (result.ridge is not None) == (trunk == "frozen")
    model = RewardModel.load(tmp_path)
    prompt = HELDOUT_PAIRS[0].prompt
    scores = model.score([prompt, prompt], [HELDOUT_PAIRS[0].chosen, HELDOUT_PAIRS[0].rejected])
    saved = result.heldout.scores
    assert scores.tolist() == pytest.approx([saved.chosen[0], saved.rejected[0]], abs=1e-4)
    head = json.loads((tmp_path / "reward_head.json").read_text())
    assert (head["gain"], head["bias"]) == (result.gain, result.bias)
    if objective != "pairwise":
        assert (head["rating_mean"], head["rating_scale"]) == (result.rating_mean, result.rating_scale)
        predicted = model.predicted_ratings(scores)
        assert predicted[0] > predicted[1]
    assert RewardResult.model_validate_json((tmp_path / "training.json").read_text()) == result


def test_scores_of_training_responses_are_normalised(tiny_model, tmp_path):
    """Scores of reference samples have mean 0 and variance 1, through the saved folder."""
    train(tiny_model, tmp_path)
    model = RewardModel.load(tmp_path)
    scores = model.score([p.prompt for p in PAIRS] * 2, [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS])
    assert scores.mean() == pytest.approx(0, abs=1e-3) and scores.var() == pytest.approx(1, abs=1e-3)


def test_plain_transformers_loads_the_reward_model(tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train(tiny_model, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    model = RewardModel.load(tmp_path)
    turns = [*PAIRS[0].prompt, {"role": "assistant", "content": PAIRS[0].chosen}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    logit = plain(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
    expected = model.score([PAIRS[0].prompt], [PAIRS[0].chosen])[0]
    assert model.head.gain * logit + model.head.bias == pytest.approx(expected, abs=1e-4)


def test_bf16_frozen_head_scores_what_it_saved(tmp_path, texts):
    resolve_model(ModelSpec(source="tiny-random", precision="bf16"), tmp_path / "bf16", texts=texts, seed=1)
    result = train(tmp_path / "bf16", tmp_path / "out", trunk="frozen")
    model = RewardModel.load(tmp_path / "out")
    scores = model.score([p.prompt for p in HELDOUT_PAIRS], [p.chosen for p in HELDOUT_PAIRS])
    np.testing.assert_allclose(scores, result.heldout.scores.chosen, atol=0.1)
    assert result.precision == "bf16" and result.heldout.accuracy.value > 0.9


@pytest.mark.parametrize("extra", [{}, {"trunk": "lora", "lora": LoraSpec(rank=4)}, {"objective": "joint"}])
def test_resumed_training_is_bit_equal(tiny_model, tmp_path, extra):
    """Resuming bit by bit, for the reward model."""
    straight = train(tiny_model, tmp_path / "straight", checkpoint_every=2, **extra)
    asked = iter(range(100))
    with pytest.raises(TrainingStoppedError):
        train(
            tiny_model, tmp_path / "never", checkpoint_every=2, checkpoints=tmp_path / "c",
            stop=lambda: next(asked) == 3, **extra,
        )  # fmt: skip
    resumed = train(tiny_model, tmp_path / "resumed", checkpoint_every=2, checkpoints=tmp_path / "c", **extra)
    assert resumed.resumed_from == 3 and resumed.heldout == straight.heldout
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], tensor), name


def test_gradient_is_the_same_whatever_the_microbatches(tiny_model, tmp_path):
    """Means over the whole step, whatever the microbatch: pairs and ratings of different lengths, joint objective."""
    for name, tokens in (("small", 64), ("large", 100_000)):
        train(tiny_model, tmp_path / name, objective="joint", microbatch_tokens=tokens, max_steps=2)
    for name, tensor in weights(tmp_path / "large").items():
        torch.testing.assert_close(weights(tmp_path / "small")[name], tensor, rtol=1e-3, atol=2e-5)


def test_ratings_of_a_pairs_responses_ride_along(tiny_chat):
    """A scored preference arrives as a pair and two ratings; no text goes through the model twice."""
    prompt = PAIRS[0].prompt
    rows = [
        Rating(id="a", prompt=prompt, response=PAIRS[0].chosen, score=5),
        Rating(id="b", prompt=prompt, response=PAIRS[0].rejected, score=1),
        Rating(id="c", prompt=prompt, response=PAIRS[0].chosen, score=4),
        Rating(id="d", prompt=prompt, response="another", score=2),
    ]
    scale = RatingScale.fit(rows)
    z = scale.standardised(rows).tolist()
    pairs = encode_pairs(tiny_chat, PAIRS[:1], 128, use_margin=True).items
    items = join_ratings(pairs, encode_ratings(tiny_chat, rows, 128, scale).items)
    assert [item.margin is None for item in items] == [False, True]
    assert items[0].ratings == [[z[0], z[2]], [z[1]]] and items[1].ratings == [[z[3]]]
    assert pairs[0].ratings == [[], []]


def test_joint_loss_weighs_every_pair_and_every_rating_the_same(tiny_model, tmp_path):
    """Over an epoch the steps' losses average to alpha x pairwise + (1 - alpha) x pointwise."""
    observer = RecordingObserver()
    spec = {"objective": "joint", "alpha": 0.3, "learning_rate": 1e-12, "centering": 0.0}
    train(tiny_model, tmp_path, ratings=RATINGS[:13], observer=observer, **spec)
    chat = Chat.load(tiny_model)
    model = load_sequence_scorer(tiny_model)
    init_score_head(model, seed=3)
    scale = RatingScale.fit(RATINGS[:13])
    items = encode_pairs(chat, PAIRS, 128, use_margin=True).items
    rated = encode_ratings(chat, RATINGS[:13], 128, scale).items
    with torch.no_grad():
        scores = score_items(model, items, chat.pad_id).view(-1, 2)
        margins = torch.tensor([item.margin for item in items])
        pairwise = pairwise_loss(scores[:, 0], scores[:, 1], margins, centering=0.0).mean().item()
        targets = torch.tensor([item.ratings[0][0] for item in rated])
        pointwise = pointwise_loss(score_items(model, rated, chat.pad_id), targets, huber_delta=None).mean().item()
    losses = [loss for _, loss in observer.series("reward/loss")]
    sizes = [8] * (len(losses) - 1)
    joined = len(join_ratings(items, rated))
    sizes.append(joined - sum(sizes))
    mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / joined
    assert mean == pytest.approx(0.3 * pairwise + 0.7 * pointwise, rel=1e-4)


def test_margins_can_be_switched_off(tiny_chat):
    assert {item.margin for item in encode_pairs(tiny_chat, PAIRS, 128, use_margin=True).items} == {0.0, 0.5}
    assert {item.margin for item in encode_pairs(tiny_chat, PAIRS, 128, use_margin=False).items} == {0.0}


def test_frozen_head_is_the_regularised_optimum():
    """Against an independent solver: with squared error and no pairs the head is ridge regression."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(200, 6)) + 3.0
    targets = features @ draw.normal(size=6) + draw.normal(size=200) * 0.1
    targets = (targets - targets.mean()) / targets.std()
    rows = [Rating(id=str(i), prompt=[{"role": "user", "content": str(i)}], response="", score=0) for i in range(200)]
    from tunegate.training.reward_data import Item

    items = [Item(i, [i], [[1]], None, [[float(targets[i])]]) for i in range(len(rows))]
    fitted = fit_head(items, [row[None] for row in features], RewardSpec(objective="pointwise"), seed=0)
    spread, mean = features.std(0) + 1e-6, features.mean(0)
    unit = (mean / spread) / np.linalg.norm(mean / spread)
    X = (features - mean) / spread
    X = X - np.outer(X @ unit, unit)
    expected = np.linalg.solve(2 * X.T @ X / 200 + fitted.ridge * np.eye(6), 2 * X.T @ targets / 200)
    np.testing.assert_allclose(features @ fitted.weight_D, X @ expected, atol=1e-4)
    assert mean @ fitted.weight_D == pytest.approx(0, abs=1e-6)


def test_a_probed_head_starts_where_the_frozen_trunk_ends(tiny_model, tmp_path):
    frozen = train(tiny_model, tmp_path / "frozen", trunk="frozen")
    started = train(tiny_model, tmp_path / "started", probe_first=True, learning_rate=1e-12)
    assert started.ridge == frozen.ridge
    torch.testing.assert_close(
        weights(tmp_path / "started")["score.weight"], weights(tmp_path / "frozen")["score.weight"]
    )
    probed, drawn = (train(tiny_model, tmp_path / "m", probe_first=p, max_steps=1).heldout for p in (True, False))
    assert probed.log_loss < drawn.log_loss


def test_objectives_without_data_are_refused(tiny_model, tmp_path):
    with pytest.raises(DataError, match=r"reward\.objective"):
        train(tiny_model, tmp_path, objective="joint", ratings=[])
    with pytest.raises(DataError, match=r"reward\.objective"):
        train(tiny_model, tmp_path, pairs=[])
    long = Preference(id="x", prompt=[{"role": "user", "content": "word " * 300}], chosen="a", rejected="b")
    result = train(tiny_model, tmp_path, pairs=[*PAIRS, long])
    assert (result.dropped, result.pairs) == (1, 48)


def test_judge_has_its_own_trunk_and_rate():
    spec = RewardSpec(learning_rate=1e-5, trunk="full").for_judge()
    assert (spec.trunk, spec.judge.enabled, spec.learning_rate) == ("frozen", False, None)


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_accuracy_and_breakdowns():
    """What is reported on held-out data."""
    draw = np.random.default_rng(1)
    pairs = [dataclasses.replace(p, source="abc"[i % 3]) for i, p in enumerate(make_preferences(90))]
    raw = draw.normal(size=(90, 2))
    raw[5] = 1.0  # a tie
    lengths = draw.integers(1, 120, size=(90, 2))
    found = evaluate_pairs(pairs, raw, lengths, head=RewardHead(gain=2, bias=1), dropped=3, tfidf=None, ratings=None)
    wins = sum(r[0] > r[1] for r in raw)
    assert found.correct == wins + 0.5 and found.accuracy.value == pytest.approx((wins + 0.5) / 90)
    assert sum(share.n for share in found.by_source.values()) == 90
    by_hand = [r[0] > r[1] for r, p in zip(raw, pairs, strict=True) if p.source == "a"]
    assert found.by_source["a"].value == pytest.approx(np.mean(by_hand))
    assert [(b.low, b.high) for b in found.by_length] == list(
        zip((None, *LENGTH_EDGES), (*LENGTH_EDGES, None), strict=True)
    )
    assert sum(bucket.accuracy.n for bucket in found.by_length) == 90
    middle = [r[0] > r[1] for r, n in zip(raw, lengths, strict=True) if -10 <= n[0] - n[1] < 10 and r[0] != r[1]]
    assert found.by_length[2].accuracy.n in (len(middle), len(middle) + 1)
    length_right = [1.0 if n[0] > n[1] else 0.5 if n[0] == n[1] else 0.0 for n in lengths]
    assert found.length_correct == sum(length_right)
    assert found.only_model == sum(r[0] > r[1] and x < 1 for r, x in zip(raw, length_right, strict=True))
    assert found.only_length == sum(not r[0] > r[1] and x == 1 for r, x in zip(raw, length_right, strict=True))
    assert found.log_loss == pytest.approx(np.mean([math.log(1 + math.exp(b - a)) for a, b in raw]))
    assert found.scores.chosen == pytest.approx(2 * raw[:, 0] + 1)


def test_wilson_interval_is_scipys():
    for wins, n in [(0, 10), (7, 10), (10, 10), (190, 340)]:
        interval = binomtest(wins, n).proportion_ci(method="wilson")
        share = Share.of(wins, n)
        assert (share.low, share.high) == (pytest.approx(interval.low, abs=1e-12), pytest.approx(interval.high))
    assert Share.of(0, 0).n == 0 and math.isnan(Share.of(0, 0).value)


def test_calibration_by_hand():
    """ECE = sum over bins of n_b / n x |confidence_b - accuracy_b|."""
    difference = np.array([0.1, -0.1, 0.15, 3.0, 4.0, -3.5])
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    low, high = confidence[:3], confidence[3:]
    bins, error = reliability(difference)
    assert error == pytest.approx(
        0.5 * abs(low.mean() - 2 / 3)
        + sum(abs(high[high >= 0.95].mean() - 2 / 3) * 0.5 for _ in [0] if (high >= 0.95).all())
    )
    assert [b.n for b in bins] == [3, 3] and bins[0].low == 0.5 and bins[-1].high == 1.0
    perfect = np.concatenate([np.full(73, 1.0), np.full(27, -1.0)])
    assert reliability(perfect)[1] == pytest.approx(abs(1 / (1 + math.exp(-1)) - 0.73), abs=1e-9)


def test_baselines_on_pairs_that_differ_in_words(tiny_model, tmp_path):
    """The words tell all; in tokens the preferred answers are shorter (the tokenizer knows them)."""
    heldout = train(tiny_model, tmp_path).heldout
    assert heldout.tfidf_baseline.value == 1.0 and heldout.length_baseline.value == 0.0
    assert (heldout.only_model, heldout.only_length) == (heldout.correct, 0)
    assert set(heldout.by_source) == {"made", "other"}


def test_rating_figures_know_the_scale():
    raw = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    ratings = np.array([1.0, 1.5, 2.0, 2.5, 4.0, 3.0])
    found = rating_figures(raw, ratings, RewardHead(rating_mean=1.0, rating_scale=0.5))
    assert found.rho == pytest.approx(1 - 6 * 2 / (6 * 35)) and found.low < found.rho < found.high
    assert found.mean_absolute_error == pytest.approx(np.abs(1 + 0.5 * raw - ratings).mean())
    assert rating_figures(raw[:4], ratings[:4], RewardHead()) is None
