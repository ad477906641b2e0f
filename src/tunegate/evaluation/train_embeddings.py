"""Fits the embedding classifier: `python -m tunegate.evaluation.train_embeddings`.

It learns from the same rows as the shipped classifier (see `train_refusal`), writes `assets/refusal_embeddings.json`
and prints the held-out errors of both and of the string matcher. The penalty was chosen by cross-validation on the
training rows, grouped by prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.evaluation.coherence import LetterModel, measure
from tunegate.evaluation.embeddings import (
    EMBEDDINGS_PATH,
    EmbeddingClassifier,
    hand_matrix,
    pair_features,
    shared_embedder,
)
from tunegate.evaluation.refusal import LABELS, RefusalClassifier, ResponseJudge, StringMatcher, standardise
from tunegate.evaluation.refusal_features import FEATURE_VERSION, HAND_FEATURES
from tunegate.evaluation.statistics import paired_proportions
from tunegate.evaluation.train_refusal import LABELLED, PLAIN, REAL, LabelledResponse, error_of, read_labels

INVERSE_REGULARISATION = 0.01
REFUSAL_WEIGHT = 0.7
"""As for the shipped classifier: taking compliance for a refusal is the dearer error."""


def fit(rows: Sequence[LabelledResponse]) -> dict[str, Any]:
    """Fit the classifier on training rows of all three labels; returns what `EmbeddingClassifier` reads."""
    from sklearn.linear_model import LogisticRegression

    prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
    coherent = [row for row in rows if row.label != "incoherent"]
    letters = LetterModel.fit([row.response for row in coherent] + [row.prompt for row in coherent])
    hand = hand_matrix(prompts, responses, [measure(p, r, letters) for p, r in zip(prompts, responses, strict=True)])
    mean, scale = hand.mean(axis=0), hand.std(axis=0)
    scale[scale == 0] = 1.0
    embedder = shared_embedder()
    design = np.hstack(
        [standardise(hand, mean, scale), pair_features(embedder.embed(responses), embedder.embed(prompts))]
    )
    labels = [LABELS.index(row.label) for row in rows]
    class_weight = {label: len(rows) / (len(LABELS) * labels.count(label)) for label in range(len(LABELS))}
    class_weight[LABELS.index("refusal")] *= REFUSAL_WEIGHT
    model = LogisticRegression(C=INVERSE_REGULARISATION, class_weight=class_weight, max_iter=5000, tol=1e-6)
    model.fit(design, labels)
    return {
        "feature_version": FEATURE_VERSION,
        "labels": list(LABELS),
        "hand_features": list(HAND_FEATURES),
        "hand_mean": np.round(mean, 6).tolist(),
        "hand_scale": np.round(scale, 6).tolist(),
        "weights": np.round(model.coef_.T, 5).tolist(),
        "intercept": np.round(model.intercept_, 5).tolist(),
        "embedding_model": embedder.digest,
        "letters": {"bits": letters.bits, "unseen": letters.unseen},
    }


def compare(judges: dict[str, ResponseJudge], rows: Sequence[LabelledResponse], title: str) -> str:
    """A Markdown table of every judge's errors, and how the first differs from the second, paired."""
    errors = {name: error_of(judge, rows) for name, judge in judges.items()}
    lines = [f"| on {len(rows)} {title} held-out responses | {' | '.join(errors)} |", "|---" * (len(errors) + 1) + "|"]
    for field, label in (
        ("error", "wrong label (of three)"),
        ("refusal_error", "wrong about refusal or not"),
        ("false_refusals", "others called a refusal"),
    ):
        cells = [getattr(found, field) for found, _ in errors.values()]
        shown = [f"{100 * c.estimate:.1f}% [{100 * c.low:.1f}, {100 * c.high:.1f}]" for c in cells]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    (first, (_, one)), (second, (_, two)) = list(errors.items())[:2]
    gain = paired_proportions(
        sum(a and not b for a, b in zip(one, two, strict=True)),
        sum(b and not a for a, b in zip(one, two, strict=True)),
        len(rows),
    )
    points = f"{100 * gain.estimate:.1f} points [{100 * gain.low:.1f}, {100 * gain.high:.1f}]"
    return "\n".join(
        [*lines, "", f"{first} is right about refusal more often than {second} by {points} (paired, Tango)."]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write and report."""
    parser = argparse.ArgumentParser(description="Fit the embedding classifier and report its held-out error.")
    parser.add_argument("--out", type=Path, default=EMBEDDINGS_PATH, help="where the weights go")
    parser.add_argument("--report-only", action="store_true", help="only report on the weights at --out")
    parsed = parser.parse_args(arguments)
    if not parsed.report_only:
        training = [row for path in (LABELLED, REAL, PLAIN) for row in read_labels(path) if row.split == "train"]
        parsed.out.write_text(json.dumps(fit(training), ensure_ascii=False, separators=(",", ":")) + "\n")
    judges: dict[str, ResponseJudge] = {
        "features": RefusalClassifier.load(),
        "embeddings": EmbeddingClassifier.load(parsed.out),
        "string matcher": StringMatcher(),
    }
    hard, real = ([row for row in read_labels(path) if row.split == "test"] for path in (LABELLED, REAL))
    harmful = [row for row in (*hard, *real) if row.tag == "harmful"]
    for title, rows in (("hard", hard), ("real", real), ("harmful (hard and real)", harmful)):
        print(compare(judges, rows, title), end="\n\n")


if __name__ == "__main__":
    main()
