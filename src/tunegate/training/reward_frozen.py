"""A reward head on a frozen trunk: features are computed once, and the head is a small convex problem.

The features are the trunk's hidden states at the last token. The head is fitted by L-BFGS in float64 with an L2 penalty
chosen by cross-validation over prompts. It is kept orthogonal to the mean feature, so that raw scores need no bias.

Shape suffixes: N responses, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from tunegate.training.config import RewardSpec
from tunegate.training.reward_data import Item
from tunegate.training.reward_losses import pairwise_loss, pointwise_loss, sign_loss

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FOLDS = 5
_LARGE = 4000  # items beyond which one split replaces the five folds
_WORTH_THREADS = 2**22  # features (N x D) beyond which a product is large enough to share among threads


@dataclass(frozen=True, slots=True)
class FittedHead:
    """The head on raw features, and what was found on the way."""

    weight_D: np.ndarray  # noqa: N815 - shape suffix
    ridge: float
    loss: float


def fit_head(items: Sequence[Item], features: Sequence[np.ndarray], spec: RewardSpec, *, seed: int) -> FittedHead:
    """Fit the head.

    Args:
        items: Training items.
        features: For each item the features [responses, D] of its responses.
        spec: Objective and its weights.
        seed: Of the folds.
    """
    stacked_ND = np.concatenate(features)
    mean_D = stacked_ND.mean(0)
    spread_D = stacked_ND.std(0) + 1e-6
    direction_D = mean_D / spread_D
    direction_D /= np.linalg.norm(direction_D) + 1e-12
    # Standardised features without their component along the mean: a head on them scores the mean feature 0.
    scaled = [(own - mean_D) / spread_D for own in features]
    scaled = [own - np.outer(own @ direction_D, direction_D) for own in scaled]
    with _one_thread(stacked_ND.size):
        ridge, weight_D, loss = _best(items, scaled, _folds(items, seed), spec)
    weight_D = weight_D - (weight_D @ direction_D) * direction_D
    return FittedHead(weight_D / spread_D, ridge, loss)


def _best(
    items: Sequence[Item], scaled: Sequence[np.ndarray], folds: np.ndarray, spec: RewardSpec
) -> tuple[float, np.ndarray, float]:
    """The ridge with the smallest loss on items left out, the head fitted with it to all, and its loss."""
    losses = []
    for ridge in RIDGES:
        total = 0.0
        for fold in np.unique(folds[folds >= 0]):
            inside = [index for index in range(len(items)) if folds[index] != fold]
            outside = [index for index in range(len(items)) if folds[index] == fold]
            weight_D = _solve(_Problem(items, scaled, inside, spec), ridge)
            total += _Problem(items, scaled, outside, spec).value(weight_D) * len(outside)
        losses.append(total)
    ridge = RIDGES[int(np.argmin(losses))]
    problem = _Problem(items, scaled, range(len(items)), spec)
    weight_D = _solve(problem, ridge)
    return ridge, weight_D, problem.value(weight_D)


@contextmanager
def _one_thread(values: int) -> Iterator[None]:
    """Compute with one thread while there are few features: handing out thousands of tiny products costs more.

    Args:
        values: Features in all, N x D.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if values < _WORTH_THREADS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Problem:
    """The objective on some items, as a function of the head."""

    def __init__(
        self, items: Sequence[Item], features: Sequence[np.ndarray], chosen: Sequence[int], spec: RewardSpec
    ) -> None:
        compared = [index for index in chosen if items[index].compared]
        pairs = [(index, *pair) for index in compared for pair in items[index].compared]
        labelled = [
            (features[index][response], sign)
            for index in chosen
            for response, signs in enumerate(items[index].labels)
            for sign in signs
        ]
        rated = [
            (features[index][response], value)
            for index in chosen
            for response, values in enumerate(items[index].ratings)
            for value in values
        ]
        self.spec = spec
        self.with_pairs = bool(pairs) and spec.objective != "pointwise"
        self.with_ratings = bool(rated) and spec.objective != "pairwise"
        if self.with_pairs:
            self.chosen = torch.from_numpy(np.stack([features[index][better] for index, better, _, _ in pairs]))
            self.rejected = torch.from_numpy(np.stack([features[index][worse] for index, _, worse, _ in pairs]))
            self.margins = torch.tensor([margin for _, _, _, margin in pairs], dtype=torch.float64)
            # A ranking weighs as much as a pair.
            shares = [1.0 / len(items[index].compared) / len(compared) for index, _, _, _ in pairs]
            self.shares = torch.tensor(shares, dtype=torch.float64)
        self.with_labels = bool(labelled)
        if self.with_labels:
            self.labelled = torch.from_numpy(np.stack([feature for feature, _ in labelled]))
            self.signs = torch.tensor([sign for _, sign in labelled], dtype=torch.float64)
        if self.with_ratings:
            self.rated = torch.from_numpy(np.stack([feature for feature, _ in rated]))
            self.targets = torch.tensor([value for _, value in rated], dtype=torch.float64)

    def loss(self, weight_D: Tensor) -> Tensor:
        """Mean objective."""
        parts = []
        if self.with_pairs:
            scores = self.chosen @ weight_D, self.rejected @ weight_D
            loss = (self.shares * pairwise_loss(*scores, self.margins, centering=self.spec.centering)).sum()
            parts.append(loss * (self.spec.alpha if self.spec.objective == "joint" else 1.0))
        if self.with_ratings:
            loss = pointwise_loss(self.rated @ weight_D, self.targets, huber_delta=self.spec.huber_delta).mean()
            parts.append(loss * (1.0 - self.spec.alpha if self.spec.objective == "joint" else 1.0))
        if self.with_labels:
            parts.append(sign_loss(self.labelled @ weight_D, self.signs).mean())
        return torch.stack(parts).sum() if parts else weight_D.sum() * 0.0

    def value(self, weight_D: np.ndarray) -> float:
        """Mean objective as a number."""
        return float(self.loss(torch.from_numpy(weight_D)))

    @property
    def width(self) -> int:
        """D."""
        return int((self.chosen if self.with_pairs else self.rated if self.with_ratings else self.labelled).shape[1])


def _solve(problem: _Problem, ridge: float) -> np.ndarray:
    """The head that minimises the mean objective + ridge / 2 |w|^2."""

    def value_and_gradient(flat_D: np.ndarray) -> tuple[float, np.ndarray]:
        weight_D = torch.from_numpy(flat_D).requires_grad_()
        loss = problem.loss(weight_D) + 0.5 * ridge * weight_D.square().sum()
        (gradient_D,) = torch.autograd.grad(loss, weight_D)
        return float(loss.detach()), gradient_D.numpy()

    found = minimize(value_and_gradient, np.zeros(problem.width), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(found.x)


def _folds(items: Sequence[Item], seed: int) -> np.ndarray:
    """Fold of each item, [items]; items with one prompt share a fold, so that no fold has seen another's prompts.

    With many items one fold of a fifth is held out once; the others get -1 and are only trained on.
    """
    prompts = list(dict.fromkeys(tuple(item.prompt) for item in items))
    order = np.random.default_rng(seed).permutation(len(prompts))
    folds = {prompt: int(order[number]) % min(_FOLDS, len(prompts)) for number, prompt in enumerate(prompts)}
    found = np.array([folds[tuple(item.prompt)] for item in items])
    return np.where(found == 0, 0, -1) if len(items) > _LARGE else found
