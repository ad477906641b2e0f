"""Measuring a policy on held-out prompts, always with the same noise, so that two policies can be compared in pairs.

Shape suffixes: B responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from tunegate.data.records import Messages, Prompt
from tunegate.observer import Observer
from tunegate.training.advantages import shape_scores
from tunegate.training.kl import kl_estimate
from tunegate.training.policy import Policy
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.ppo_results import Example, HeldoutFigures, PairedDifference, SourceFigures
from tunegate.training.ranks import gather, share
from tunegate.training.scoring import Scorer, score_policy
from tunegate.training.watchdogs import distinct_2

LEVEL = 0.95
_RESAMPLES = 9_999


@dataclass
class Measurement:
    """One policy on every held-out prompt.

    Attributes:
        update: After so many updates.
        values: By name, one number a prompt: `reward`, `score`, `judge`, `cost`, `kl`, `kl_k3`, `length`, `finished`,
            `entropy` (mean over the response); without `judge` or `cost` if there is none.
        texts: The responses.
    """

    update: int
    values: dict[str, list[float]]
    texts: list[str]

    def array(self, name: str) -> np.ndarray:
        """One quantity, [B]."""
        return np.asarray(self.values[name])

    def mean(self, name: str) -> float:
        """Mean over the prompts."""
        return float(self.array(name).mean())

    def figures(self) -> HeldoutFigures:
        """The means."""
        lengths = self.array("length")
        return HeldoutFigures(
            update=self.update,
            n=len(self.texts),
            reward=self.mean("reward"),
            score=self.mean("score"),
            judge=self.mean("judge") if "judge" in self.values else None,
            cost=self.mean("cost") if "cost" in self.values else None,
            kl=self.mean("kl"),
            kl_k3=self.mean("kl_k3"),
            length=float(lengths.mean()),
            finished=self.mean("finished"),
            distinct_2=distinct_2(self.texts),
            entropy=float((self.array("entropy") * lengths).sum() / lengths.sum()),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return dict(vars(self))


def measure(
    policy: Policy,
    prompts: Sequence[Prompt],
    scorers: Mapping[str, Scorer],
    spec: PPOSpec,
    *,
    update: int,
    seed: Sequence[int],
    observer: Observer,
) -> Measurement:
    """Let the policy answer the held-out prompts and score what it says.

    Args:
        policy: As of its last `refresh`.
        prompts: Every rank gives all of them.
        scorers: `reward`, and `judge` and `cost` if there are any.
        spec: Sampling and shaping.
        update: How many updates the policy has had.
        seed: Of the noise: the same in every measurement.
        observer: Told the progress.
    """
    numbers = share(range(len(prompts)))
    mine: list[Messages] = [prompts[number].messages for number in numbers]
    sampling = spec.rollout_sampling
    rows = [policy.engine.encode(messages, sampling) for messages in mine]
    completions = policy.engine.generate_ids(rows, sampling, seed=seed, numbers=numbers, observer=observer)
    scored = score_policy(policy, rows, completions, temperature=spec.temperature, keep_stems=False)
    values: dict[str, list[float]] = {}
    for name, scorer in scorers.items():
        values["score" if name == "reward" else name] = scorer.combined(scorer.raw(mine, completions)).tolist()
    shaping = spec.shaping
    values["reward"] = shape_scores(
        torch.tensor(values["score"], dtype=torch.float64),
        scored.finished_B.cpu(),
        scored.lengths_B.cpu(),
        clip=shaping.clip,
        missing_eos=shaping.missing_eos,
        missing_eos_penalty=shaping.missing_eos_penalty,
        length_penalty=shaping.length_penalty,
    ).tolist()
    for name, estimator in (("kl", "k1"), ("kl_k3", "k3")):
        kl_BT = kl_estimate(scored.old_logprobs_BT, scored.reference_logprobs_BT, estimator)  # type: ignore[arg-type]
        values[name] = kl_BT.sum(dim=1).tolist()
    values["length"] = scored.lengths_B.double().tolist()
    values["finished"] = scored.finished_B.double().tolist()
    values["entropy"] = (scored.entropy_BT.sum(dim=1) / scored.lengths_B).tolist()
    total = len(prompts)
    return Measurement(
        update=update,
        values={name: gather(row, total) for name, row in values.items()},
        texts=gather([completion.text for completion in completions], total),
    )


def paired_difference(before: np.ndarray, after: np.ndarray, *, seed: int) -> PairedDifference:
    """Mean of after - before with a percentile bootstrap interval over prompts.

    Args:
        before: By prompt.
        after: By prompt, in the same order.
        seed: Of the resampling.
    """
    change = after - before
    mean = float(change.mean())
    low = high = mean
    if len(change) > 1 and float(np.ptp(change)) > 0.0:
        interval = bootstrap(
            (change,),
            np.mean,
            n_resamples=_RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return PairedDifference(mean=mean, low=low, high=high, level=LEVEL, n=len(change))


def by_source(prompts: Sequence[Prompt], before: Measurement, after: Measurement) -> dict[str, SourceFigures]:
    """Mean standardised scores by the prompts' source."""
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt.source, []).append(index)
    return {
        source: SourceFigures(
            n=len(index),
            before=float(before.array("score")[index].mean()),
            after=float(after.array("score")[index].mean()),
        )
        for source, index in sorted(rows.items())
    }


def examples(prompts: Sequence[Prompt], before: Measurement, after: Measurement, count: int = 8) -> list[Example]:
    """The first few prompts with both policies' responses."""
    return [
        Example(
            prompt=prompt.messages[-1]["content"],
            before=before.texts[index],
            after=after.texts[index],
            score_before=before.values["score"][index],
            score_after=after.values["score"][index],
        )
        for index, prompt in enumerate(prompts[:count])
    ]
