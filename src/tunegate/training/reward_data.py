"""Preferences and ratings as ids, with standardised ratings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tunegate.data.records import Preference, Rating
from tunegate.errors import DataError
from tunegate.training.chat import Chat
from tunegate.training.config import HeadSpec


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with the responses to it that go through the model in one row.

    Attributes:
        index: Position of the record in the sequence that was given.
        prompt: Ids.
        responses: Ids of each response, with its end-of-turn token unless cut; of a pair, the chosen one first.
        margin: Of a pair (0 without one); None for a single rated response.
        ratings: For each response its standardised ratings, if any.
        comparisons: Of a ranking: index of the better response, of the worse one, and the margin.
        head: Which head of the model scores it.
        labels: For each response what is said of it, 1 (harmful) or -1; for heads that are costs.
    """

    index: int
    prompt: list[int]
    responses: list[list[int]]
    margin: float | None
    ratings: list[list[float]] = field(default_factory=list)
    comparisons: list[tuple[int, int, float]] = field(default_factory=list)
    head: int = 0
    labels: list[list[int]] = field(default_factory=list)

    @property
    def compared(self) -> list[tuple[int, int, float]]:
        """Index of the higher response, of the lower one, and the margin, of every pair in the item."""
        if self.comparisons or self.margin is None:
            return self.comparisons
        return [(0, 1, self.margin)]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return len(self.prompt) + sum(len(ids) for ids in self.responses)


@dataclass(frozen=True, slots=True)
class Items:
    """Encoded records, how many did not fit at all, and how many lost the end of a response."""

    items: list[Item]
    dropped: int = 0
    cut: int = 0


@dataclass(frozen=True, slots=True)
class RatingScale:
    """Standardisation of ratings, fitted on the training split only.

    Attributes:
        low: Lowest rating of the common scale.
        high: Highest.
        mean: Of the training ratings, on the common scale.
        scale: Their standard deviation.
    """

    low: float
    high: float
    mean: float
    scale: float

    @classmethod
    def fit(cls, ratings: Sequence[Rating]) -> RatingScale:
        """The most frequent scale is the common one; ratings on others are mapped onto it linearly.

        Raises:
            DataError: If there are no ratings, or all are equal.
        """
        if not ratings:
            raise DataError(
                "the objective needs ratings and there are none in the training split",
                key="reward.objective",
                fix="add a ratings source, scores to the preferences, or use objective 'pairwise'",
            )
        low, high = Counter(rating.scale for rating in ratings).most_common(1)[0][0]
        values = cls(low, high, 0.0, 1.0).common(ratings)
        spread = float(values.std())
        if spread == 0.0:
            raise DataError(
                "all training ratings are equal, so there is nothing to learn from them",
                key="ratings",
                value=float(values[0]),
                fix="add ratings of other responses, or use objective 'pairwise'",
            )
        return cls(low, high, float(values.mean()), spread)

    def common(self, ratings: Sequence[Rating]) -> np.ndarray:
        """Ratings on the common scale, [N]."""
        width = self.high - self.low
        return np.array([self.low + (r.score - r.scale[0]) / (r.scale[1] - r.scale[0]) * width for r in ratings])

    def standardised(self, ratings: Sequence[Rating]) -> np.ndarray:
        """Ratings as z = (rating - mean) / scale, [N]."""
        return np.asarray((self.common(ratings) - self.mean) / self.scale)


def encode_pairs(chat: Chat, pairs: Sequence[Preference], max_length: int, *, use_margin: bool) -> Items:
    """Encode preferences; both responses of a pair keep the same prompt (see `Chat.fit_exchange`)."""
    items, dropped, cut = [], 0, 0
    for index, pair in enumerate(pairs):
        fitted = chat.fit_exchange(pair.prompt, [pair.chosen, pair.rejected], max_length)
        if fitted is None:
            dropped += 1
            continue
        cut += fitted.cut
        margin = pair.margin if use_margin and pair.margin is not None else 0.0
        items.append(Item(index, fitted.prompt_ids, fitted.response_ids, margin, [[], []]))
    return Items(items, dropped, cut)


def encode_ratings(chat: Chat, ratings: Sequence[Rating], max_length: int, scale: RatingScale) -> Items:
    """Encode ratings, each an item of one response with its standardised value."""
    values = scale.standardised(ratings)
    items, dropped, cut = [], 0, 0
    for index, rating in enumerate(ratings):
        fitted = chat.fit_exchange(rating.prompt, [rating.response], max_length)
        if fitted is None:
            dropped += 1
            continue
        cut += fitted.cut
        items.append(Item(index, fitted.prompt_ids, fitted.response_ids, None, [[float(values[index])]]))
    return Items(items, dropped, cut)


def with_heads(items: Sequence[Item], sources: Sequence[str], heads: Sequence[HeadSpec]) -> list[Item]:
    """Give each item the head that its source belongs to; a head that is a cost scores the rejected response higher.

    Args:
        items: Encoded records.
        sources: Source of each record, by `Item.index`.
        heads: Of the model; none leaves the items as they are.

    Raises:
        DataError: If a source belongs to no head.
    """
    if not heads:
        return list(items)
    places = {source: number for number, head in enumerate(heads) for source in head.sources}
    found = []
    for item in items:
        source = sources[item.index]
        if source not in places:
            raise DataError(
                "the source belongs to no head",
                key="reward.heads",
                value=source,
                fix=f"name it among the sources of a head ({', '.join(head.name for head in heads)})",
            )
        head = places[source]
        turned = [(worse, better, margin) for better, worse, margin in item.compared]
        comparisons = turned if heads[head].kind == "cost" else item.comparisons
        found.append(replace(item, head=head, comparisons=comparisons))
    return found


def join_rankings(items: Sequence[Item]) -> list[Item]:
    """Bring the pairs about one prompt together: one item, each response once (InstructGPT, section 3.5)."""
    rankings: dict[tuple[int, tuple[int, ...]], Item] = {}
    for item in items:
        key = (item.head, tuple(item.prompt))
        if key not in rankings:
            rankings[key] = replace(item, responses=[], ratings=[], comparisons=[])
        whole = rankings[key]
        places = []
        for response in item.responses:
            if response not in whole.responses:
                whole.responses.append(response)
                whole.ratings.append([])
            places.append(whole.responses.index(response))
        # Two people may prefer opposite responses; a pair of equal texts says nothing.
        whole.comparisons.extend(
            (places[better], places[worse], margin)
            for better, worse, margin in item.compared
            if places[better] != places[worse]
        )
    return [item for item in rankings.values() if item.comparisons]


def resample(items: Sequence[Item], seed: int) -> list[Item]:
    """As many prompts as there are, drawn with replacement, each with all its items (Efron 1979)."""
    by_prompt: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        by_prompt.setdefault(tuple(item.prompt), []).append(item)
    groups = list(by_prompt.values())
    drawn = np.random.default_rng([seed, len(groups)]).integers(len(groups), size=len(groups))
    return [item for number in drawn for item in groups[number]]


def join_ratings(pairs: Sequence[Item], rated: Sequence[Item]) -> list[Item]:
    """Attach ratings to the responses that they are about, so that no text goes through the model twice.

    Preferences with a score for each response are rated twice each, so joint training would otherwise cost double.

    Returns:
        The pairs, then one item for each rated response that is in no pair.
    """
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], tuple[list[float], list[int]]] = {}
    joined: list[Item] = []
    for item in [*pairs, *rated]:
        prompt = tuple(item.prompt)
        if not item.compared:
            key = (item.head, prompt, tuple(item.responses[0]))
            if key in places:
                ratings, labels = places[key]
                ratings += item.ratings[0]
                labels += item.labels[0] if item.labels else []
                continue
        # Lists are copied, since ratings and labels are added to them.
        fresh = replace(
            item,
            ratings=[list(own) for own in item.ratings],
            labels=[list(own) for own in item.labels] or [[] for _ in item.responses],
        )
        for ids, own_ratings, own_labels in zip(fresh.responses, fresh.ratings, fresh.labels, strict=True):
            places.setdefault((fresh.head, prompt, tuple(ids)), (own_ratings, own_labels))
        joined.append(fresh)
    return joined


def as_labels(items: Sequence[Item], ratings: Sequence[Rating], heads: Sequence[HeadSpec]) -> list[Item]:
    """Ratings of heads that are costs: not numbers to predict but words on what is harmful."""
    labelled = []
    for item in items:
        head = heads[item.head] if heads else None
        if head is None or head.kind == "reward":
            labelled.append(item)
        elif head.harmful_above is not None:
            sign = 1 if ratings[item.index].score > head.harmful_above else -1
            labelled.append(replace(item, ratings=[[]], labels=[[sign]]))
    return labelled
