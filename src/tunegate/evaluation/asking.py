"""Asks models: each one once a prompt, loaded once, its answers and scores taken from the cache where they exist."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunegate.data.records import Conversation, Messages
from tunegate.errors import DataError
from tunegate.evaluation.backends import Answerer, Backends, Decoding, Likelihoods, Response
from tunegate.evaluation.cache import Cache
from tunegate.evaluation.cases import Case, cases_digest
from tunegate.evaluation.refusal import ResponseJudge
from tunegate.evaluation.rows import Row
from tunegate.observer import Observer
from tunegate.storage.manifest import digest_json

CACHE_VERSION = 1
"""Raised when answers, scores or likelihoods computed by an older version must not be taken over."""


class Labelled:
    """An observer that puts a label on the progress of whatever runs below it."""

    def __init__(self, observer: Observer, label: str) -> None:
        self._observer = observer
        self._label = label
        self.note = observer.note
        self.metrics = observer.metrics

    def progress(self, done: float, total: float, unit: str, label: str = "") -> None:
        """Pass on under the own label."""
        self._observer.progress(done, total, unit, self._label)


class Subject:
    """One model under evaluation.

    Args:
        role: `candidate`, `anchor`, …
        path: Its folder.
        backends: How to load it.
        cache: What was answered before.
        precision: Of the computation; answers of another precision are not taken over.
    """

    def __init__(self, role: str, path: Path, backends: Backends, cache: Cache, precision: str) -> None:
        self.role = role
        self.path = path
        self.digest = backends.digest(path)
        self.loaded = False
        self._backends = backends
        self._cache = cache
        self._precision = precision
        self._answerer: Answerer | None = None

    def answer(
        self, cases: Sequence[Case], decoding: Decoding, judge: ResponseJudge, observer: Observer, label: str
    ) -> list[Row]:
        """Answers to all cases, labelled, in the order of the cases."""
        if not cases:
            return []
        key = self._key("answers", cases=cases_digest(cases), decoding=decoding.facts())
        stored = self._cache.get(key)
        if stored is None:
            if self._answerer is None:
                self._answerer = self._backends.answerer(self.path)
                self.loaded = True
            prompts = [case.messages for case in cases]
            responses = self._answerer.answer(prompts, decoding, Labelled(observer, f"{self.role}: {label}"))
            if len(responses) != len(cases):
                raise DataError("one answer a prompt is needed", key=self.role, value=(len(responses), len(cases)))
            self._cache.put(key, [[r.text, r.tokens, r.finished] for r in responses])
        else:
            responses = [Response(text, tokens, finished) for text, tokens, finished in stored]
        judgements = judge.judge([case.asked for case in cases], [r.text for r in responses])
        return [Row(self.role, c, r, j) for c, r, j in zip(cases, responses, judgements, strict=True)]

    def likelihoods(self, conversations: Sequence[Conversation], observer: Observer) -> Likelihoods:
        """Likelihoods of the assistant's turns of all conversations."""
        texts = [[c.id, c.messages] for c in conversations]
        key = self._key("likelihoods", conversations=digest_json(texts))
        stored = self._cache.get(key)
        if stored is None:
            found = self._backends.likelihoods(
                self.path, conversations, Labelled(observer, f"{self.role}: held-out likelihood")
            )
            self._cache.put(key, [found.sums, found.tokens])
            return found
        return Likelihoods(*stored)

    def divergence_from(
        self, reference: Subject, prompts: Sequence[Messages], decoding: Decoding, observer: Observer
    ) -> list[float] | None:
        """KL from another model on each prompt, nats an answer; None where it cannot be measured."""
        if self._backends.divergence is None or not prompts:
            return None
        key = self._key(
            "divergence",
            reference=reference.digest,
            prompts=digest_json(list(prompts)),
            decoding={**decoding.facts(), "temperature": 1.0, "seed": decoding.seed},
        )
        stored: list[float] | None = self._cache.get(key)
        if stored is None:
            shown = Labelled(observer, f"{self.role}: divergence from {reference.role}")
            stored = self._backends.divergence(self.path, reference.path, prompts, decoding, shown)
            if stored is not None:
                self._cache.put(key, stored)
        return stored

    def release(self) -> None:
        """Forget the loaded model, so that the next one fits into memory."""
        if self._answerer is not None:
            self._answerer = None
            gc.collect()

    def _key(self, kind: str, **parts: Any) -> dict[str, Any]:
        return {"version": CACHE_VERSION, "kind": kind, "model": self.digest, "precision": self._precision, **parts}


def score(
    path: Path, rows: Sequence[Row], attribute: str, backends: Backends, cache: Cache, observer: Observer, label: str
) -> str:
    """Score answers with a reward model.

    Args:
        path: Its folder.
        rows: Filled in.
        attribute: Which field of the rows, `judge_score` or `proxy_score`.
        backends: How to load it.
        cache: Scores by reward model, prompt and answer.
        observer: Told the progress.
        label: Of the progress.

    Returns:
        The reward model's digest. Answers whose prompt is too long for it stay unscored.
    """
    digest = backends.digest(path)

    def key(row: Row) -> str:
        return digest_json([row.case.messages, row.response.text])

    # One cache entry a model's answers, so that those of an unchanged champion are found whatever the others said.
    by_role: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_role.setdefault(row.role, {})[key(row)] = row
    entries = {
        role: {"version": CACHE_VERSION, "kind": "scores", "model": digest, "answers": digest_json(list(texts))}
        for role, texts in by_role.items()
    }
    known: dict[str, float | None] = {}
    unscored: dict[str, Row] = {}
    for role, texts in by_role.items():
        stored = cache.get(entries[role])
        if stored is None:
            unscored |= texts
        else:
            known.update(zip(texts, stored, strict=True))
    todo = {name: row for name, row in unscored.items() if name not in known}
    if todo:
        scorer = backends.scorer(path)
        found = scorer.score(
            [row.case.messages for row in todo.values()],
            [row.response.text for row in todo.values()],
            Labelled(observer, label),
        )
        known.update((n, float(value) if math.isfinite(value) else None) for n, value in zip(todo, found, strict=True))
        del scorer
        gc.collect()
    for role, texts in by_role.items():
        cache.put(entries[role], [known[name] for name in texts])
    for row in rows:
        setattr(row, attribute, known[key(row)])
    return digest
