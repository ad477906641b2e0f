"""Fits the refusal classifier: `python -m tunegate.evaluation.train_refusal`.

Trains on the `train` rows of `assets/refusal_labels.jsonl` (written to be hard), of `assets/refusal_real.jsonl`
(answers of SmolLM2-135M-Instruct and of fine-tuned copies of it, labelled one by one, split by prompt) and on
`assets/refusal_plain.jsonl` (stock phrases and short plain answers; training only), writes
`assets/refusal_classifier.json`, and prints the error on the held-out `test` rows beside the string matcher's, once
more for answers to harmful prompts, where a false refusal passes for safety. The hyperparameters were chosen by
cross-validation on the training rows alone; `--cross-validate` prints it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.evaluation.coherence import LetterModel, measure
from tunegate.evaluation.refusal import (
    CLASSIFIER_PATH,
    LABELS,
    Label,
    RefusalClassifier,
    ResponseJudge,
    StringMatcher,
    standardise,
)
from tunegate.evaluation.refusal_features import FEATURE_VERSION, HAND_FEATURES, hand_features, terms, weigh
from tunegate.evaluation.statistics import Interval, paired_proportions, proportion

ASSETS = CLASSIFIER_PATH.parent
LABELLED = ASSETS / "refusal_labels.jsonl"
REAL = ASSETS / "refusal_real.jsonl"
PLAIN = ASSETS / "refusal_plain.jsonl"
MINIMUM_DOCUMENTS = 2
FOLDS = 5
_WRAPPER = re.compile(r"\n\nBegin your answer with .*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Settings of the fit; the defaults had the lowest cross-validated log loss and false refusals of `GRID`.

    Attributes:
        inverse_regularisation: C of the L2-penalised logistic regression.
        term_scale: N-gram vectors are stretched by it before the fit, so that the common penalty does not drown them.
        refusal_weight: Weight of refusals over that of balanced classes. Below 1, because compliance with a harmful
            request that is taken for a refusal passes for safety, while a missed refusal only costs the model credit.
    """

    inverse_regularisation: float = 0.3
    term_scale: float = 5.0
    refusal_weight: float = 0.7


GRID = tuple(
    Hyperparameters(c, scale, weight) for c in (0.1, 0.3, 1.0) for scale in (3.0, 5.0, 8.0) for weight in (0.7, 1.0)
)


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """One row of the label files."""

    prompt: str
    response: str
    label: Label
    split: str
    tag: str = ""


def read_labels(path: Path) -> list[LabelledResponse]:
    """Read a label file (JSONL: prompt, response, label, split, and the prompt's tag where it has one)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        LabelledResponse(row["prompt"], row["response"], row["label"], row["split"], row.get("tag", "")) for row in rows
    ]


def fit(rows: Sequence[LabelledResponse], settings: Hyperparameters = Hyperparameters()) -> dict[str, Any]:
    """Fit the classifier.

    Args:
        rows: Training rows of all three labels.
        settings: Hyperparameters.

    Returns:
        What `RefusalClassifier` reads; weights rounded to 4 digits.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    coherent = [row for row in rows if row.label != "incoherent"]
    letters = LetterModel.fit([row.response for row in coherent] + [row.prompt for row in coherent])
    counts = [terms(row.response) for row in rows]
    documents = Counter(term for found in counts for term in found)
    vocabulary = {t: i for i, t in enumerate(sorted(t for t, n in documents.items() if n >= MINIMUM_DOCUMENTS))}
    idf = [round(math.log((1 + len(rows)) / (1 + documents[t])) + 1.0, 4) for t in vocabulary]
    grams = sparse.lil_matrix((len(rows), len(vocabulary)))
    for index, found in enumerate(counts):
        for column, weight in weigh(found, vocabulary, idf).items():
            grams[index, column] = weight * settings.term_scale
    hand = np.asarray(
        [hand_features(r.prompt, r.response, measure(r.prompt, r.response, letters)) for r in rows], dtype=np.float64
    )
    mean, scale = hand.mean(axis=0), hand.std(axis=0)
    scale[scale == 0] = 1.0
    design = sparse.hstack([grams, sparse.csr_matrix(standardise(hand, mean, scale))]).tocsr()
    labels = [LABELS.index(row.label) for row in rows]
    class_weight = {label: len(rows) / (len(LABELS) * labels.count(label)) for label in range(len(LABELS))}
    class_weight[LABELS.index("refusal")] *= settings.refusal_weight
    model = LogisticRegression(C=settings.inverse_regularisation, class_weight=class_weight, max_iter=5000, tol=1e-6)
    model.fit(design, labels)
    weights = model.coef_.T
    return {
        "feature_version": FEATURE_VERSION,
        "labels": list(LABELS),
        "hand_features": list(HAND_FEATURES),
        "hand_mean": np.round(mean, 6).tolist(),
        "hand_scale": np.round(scale, 6).tolist(),
        "hand_weights": np.round(weights[len(vocabulary) :], 4).tolist(),
        "intercept": np.round(model.intercept_, 4).tolist(),
        "vocabulary": list(vocabulary),
        "idf": idf,
        "term_weights": np.round(weights[: len(vocabulary)] * settings.term_scale, 4).tolist(),
        "letters": {"bits": letters.bits, "unseen": letters.unseen},
    }


def cross_validate(rows: Sequence[LabelledResponse], settings: Hyperparameters, seed: int = 0) -> list[Label]:
    """What a classifier says of each row that was fitted without the row's prompt (or a wrapped form of it).

    Args:
        rows: Training rows of all three labels.
        settings: Hyperparameters.
        seed: Of the split into `FOLDS` folds.

    Returns:
        A label a row, in order.
    """
    from sklearn.model_selection import GroupKFold

    groups = [_WRAPPER.sub("", row.prompt) for row in rows]
    said: dict[int, Label] = {}
    for inside, outside in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(rows, groups=groups):
        classifier = RefusalClassifier(fit([rows[i] for i in inside], settings), digest="")
        held = [rows[i] for i in outside]
        found = classifier.judge([row.prompt for row in held], [row.response for row in held])
        said.update({int(i): judgement.label for i, judgement in zip(outside, found, strict=True)})
    return [said[i] for i in range(len(rows))]


@dataclass(frozen=True, slots=True)
class JudgeError:
    """How often a judge is wrong on labelled responses.

    Attributes:
        error: Share of wrong labels out of three.
        refusal_error: Share wrong about "refusal or not".
        missed_refusals: Share of refusals that it calls something else.
        false_refusals: Share of the others that it calls a refusal.
        degenerate_as_safe: Share of incoherent responses that it calls a refusal.
        false_incoherent: Share of coherent responses that it calls incoherent.
        confusion: `{(true, said): count}`.
    """

    error: Interval
    refusal_error: Interval
    missed_refusals: Interval
    false_refusals: Interval
    degenerate_as_safe: Interval
    false_incoherent: Interval
    confusion: dict[tuple[str, str], int]


def error_of(judge: ResponseJudge, rows: Sequence[LabelledResponse]) -> tuple[JudgeError, list[bool]]:
    """A judge's errors on `rows` with Wilson intervals, and for each row whether its refusal call was right."""
    said = [j.label for j in judge.judge([r.prompt for r in rows], [r.response for r in rows])]
    pairs = [(row.label, label) for row, label in zip(rows, said, strict=True)]
    right = [(true == "refusal") == (label == "refusal") for true, label in pairs]

    def share(wrong: Sequence[bool]) -> Interval:
        return proportion(sum(wrong), len(wrong), method="wilson")

    return JudgeError(
        error=share([true != label for true, label in pairs]),
        refusal_error=share([not r for r in right]),
        missed_refusals=share([label != "refusal" for true, label in pairs if true == "refusal"]),
        false_refusals=share([label == "refusal" for true, label in pairs if true != "refusal"]),
        degenerate_as_safe=share([label == "refusal" for true, label in pairs if true == "incoherent"]),
        false_incoherent=share([label == "incoherent" for true, label in pairs if true != "incoherent"]),
        confusion=dict(Counter(pairs)),
    ), right


def compare(classifier: ResponseJudge, rows: Sequence[LabelledResponse], title: str) -> str:
    """A Markdown table of the classifier's errors beside the string matcher's on rows of a kind."""
    ours, ours_right = error_of(classifier, rows)
    theirs, theirs_right = error_of(StringMatcher(), rows)
    lines = [
        f"| on {len(rows)} {title} held-out responses | classifier | string matcher |",
        "|---|---|---|",
    ]
    for name, title in (
        ("error", "wrong label (of three)"),
        ("refusal_error", "wrong about refusal or not"),
        ("missed_refusals", "refusals missed"),
        ("false_refusals", "others called a refusal"),
        ("degenerate_as_safe", "degenerate text called a refusal"),
        ("false_incoherent", "coherent text called degenerate"),
    ):
        lines.append(f"| {title} | {_show(getattr(ours, name))} | {_show(getattr(theirs, name))} |")
    only_ours = sum(a and not b for a, b in zip(ours_right, theirs_right, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours_right, theirs_right, strict=True))
    gain = paired_proportions(only_ours, only_theirs, len(rows))
    lines += ["", f"Right about refusal more often than the string matcher by {_show(gain)} (paired, Tango)."]
    return "\n".join(lines)


def _show(interval: Interval) -> str:
    return f"{100 * interval.estimate:.1f}% [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write and report."""
    parser = argparse.ArgumentParser(description="Fit the refusal classifier and report its held-out error.")
    parser.add_argument("--out", type=Path, default=CLASSIFIER_PATH, help="where the weights go")
    parser.add_argument("--report-only", action="store_true", help="only report on the weights at --out")
    parser.add_argument("--cross-validate", action="store_true", help="compare the hyperparameters; writes nothing")
    parsed = parser.parse_args(arguments)
    sources = (LABELLED, REAL, PLAIN)
    training = [row for path in sources for row in read_labels(path) if row.split == "train"]
    if parsed.cross_validate:
        for settings in GRID:
            print(f"{settings}: {_cross_validated_errors(training, settings)}", flush=True)
        return
    if not parsed.report_only:
        stored = fit(training)
        stored["trained_on"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
        parsed.out.write_text(json.dumps(stored, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    classifier = RefusalClassifier.load(parsed.out)
    hard, real = ([row for row in read_labels(path) if row.split == "test"] for path in (LABELLED, REAL))
    harmful = [row for row in (*hard, *real) if row.tag == "harmful"]
    for title, rows in (("hard", hard), ("real", real), ("harmful (hard and real)", harmful)):
        print(compare(classifier, rows, title), end="\n\n")


def _cross_validated_errors(rows: Sequence[LabelledResponse], settings: Hyperparameters) -> str:
    pairs = [
        (row.label, label)
        for seed in range(3)
        for row, label in zip(rows, cross_validate(rows, settings, seed), strict=True)
    ]
    wrong = sum(true != label for true, label in pairs)
    false_refusals = sum(true != "refusal" and label == "refusal" for true, label in pairs)
    missed = sum(true == "refusal" and label != "refusal" for true, label in pairs)
    return f"wrong {wrong}, false refusals {false_refusals}, missed refusals {missed} of {len(pairs)}"


if __name__ == "__main__":
    main()
