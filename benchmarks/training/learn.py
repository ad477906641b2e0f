"""Does it learn? Real runs on human data, with intervals: `python learn.py reward|ratings|ppo --work … --out …`.

Every run can be broken off (`--minutes`, or any signal) and taken up again with the same command; checkpoints are kept
under `--work`. Results go to `--out` as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.data import ingest, read_records
from tunegate.data.config import DataSpec
from tunegate.data.records import Preference, Prompt, Rating
from tunegate.errors import TrainingStoppedError
from tunegate.observer import NullObserver
from tunegate.training.batching import shuffled
from tunegate.training.config import HeadSpec, ModelSpec, RewardSpec
from tunegate.training.ppo_config import KLSpec, PPOSpec, RewardShapingSpec
from tunegate.training.results import Share

MODEL = "smollm2-135m-instruct"
HH = ("helpful-base", "harmless-base")
SEEDS = (1, 2, 3)
SCORE_RANGE = (1.0, 5.0)  # of "overall" in the topical_chat scores
LONGEST = 256  # tokens of prompt and response; a third of the pairs lose their oldest turns
LONGEST_RATED = 1024  # so that every rated reply keeps its fact and its dialogue


class Progress:
    """Says now and then how far a run is, and keeps its curves."""

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []
        self.spoke = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Keep the figures of a step."""
        self.history.append((step, dict(values)))

    def progress(self, done: float, total: float, unit: str, label: str = "") -> None:
        """Speak once a minute."""
        if time.monotonic() - self.spoke > 60:
            self.spoke = time.monotonic()
            print(f"{label}: {done:g} of {total:g} {unit}s", flush=True)

    def note(self, message: str) -> None:
        """Print a remark."""
        print(message, flush=True)

    def series(self, name: str) -> list[list[float]]:
        """A metric by step."""
        return [[step, values[name]] for step, values in self.history if name in values]


def base_model(work: Path) -> Path:
    """The model that all runs start from."""
    from tunegate.training.models import resolve_model

    out = work / "base"
    if not (out / "config.json").is_file():
        resolve_model(ModelSpec(source=MODEL), out)
    return out


def hh_records(work: Path, shared: Path) -> Path:
    """The two HH test sets, a quarter held out by first user turn: a prompt is on one side only."""
    out = work / "hh"
    if not (out / "summary.json").is_file():
        sources = [{"uri": str(shared / "hh-rlhf" / f"{name}.test.jsonl.gz"), "name": name} for name in HH]
        ingest(
            DataSpec(preferences=sources, heldout_fraction=0.25), out, base_dir=Path(), seed=1, observer=NullObserver()
        )
    return out


def learn_reward(work: Path, shared: Path, stop: Callable[[], bool], arguments: argparse.Namespace) -> dict[str, Any]:
    """A pairwise reward model on both HH sets at once: one head, or one for each set on a common trunk."""
    from tunegate.training.reward import train_reward
    from tunegate.training.reward_evaluation import tfidf_baseline

    data = hh_records(work, shared)
    train: list[Preference] = list(read_records(data, "preferences", "train"))
    heldout: list[Preference] = list(read_records(data, "preferences", "heldout"))
    train = [train[index] for index in shuffled(len(train), seed=1, epoch=0)[: arguments.pairs]]
    spec = RewardSpec(
        trunk=arguments.trunk,
        probe_first=arguments.trunk == "full",
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        max_length=LONGEST,
        checkpoint_every=25,
        heads=tuple(HeadSpec(name=name.partition("-")[0], sources=(name,)) for name in HH) if arguments.heads else (),
    )
    observer = Progress()
    result = train_reward(
        base_model(work),
        train,
        [],
        heldout,
        [],
        work / f"reward-{arguments.name}",
        spec=spec,
        seed=1,
        observer=observer,
        checkpoints=work / f"checkpoints-reward-{arguments.name}",
        stop_requested=stop,
    )
    figures = result.model_dump(mode="json")
    del figures["heldout"]["scores"]
    floors = {}
    for name in HH:  # learned from the set's own pairs, which is kinder to a bag of words than from both
        sides = [[pair for pair in pairs if pair.source == name] for pairs in (train, heldout)]
        right = tfidf_baseline(*sides)
        assert right is not None
        floors[name] = Share.of(sum(right), len(sides[1])).model_dump(mode="json")
    return {
        "result": figures,
        "tfidf_by_source": floors,
        "loss": observer.series("reward/loss"),
        "accuracy": observer.series("reward/accuracy"),
    }


def topical_chat(shared: Path) -> list[Rating]:
    """The 360 rated replies: 60 dialogues, 6 replies to each; the mean of three raters' overall score."""
    ratings = []
    for number, row in enumerate(json.loads((shared / "unieval-human-scores" / "topical_chat.json").read_text())):
        turns = [turn.strip() for turn in row["source"].split("\n") if turn.strip()]
        # The last turn is the one that is replied to; the speakers alternate.
        messages = [
            {"role": "user" if (len(turns) - 1 - place) % 2 == 0 else "assistant", "content": turn}
            for place, turn in enumerate(turns)
        ]
        if messages[0]["role"] == "assistant":
            messages = messages[1:]
        if row["context"].strip():
            messages.insert(0, {"role": "system", "content": f"A fact you may use: {row['context'].strip()}"})
        ratings.append(
            Rating(
                id=f"topical-{number}",
                prompt=messages,
                response=row["system_output"].strip(),
                score=float(row["scores"]["overall"]),
                scale=SCORE_RANGE,
                source=row["source"],
            )
        )
    return ratings


def learn_ratings(work: Path, shared: Path, stop: Callable[[], bool], arguments: argparse.Namespace) -> dict[str, Any]:
    """Pointwise reward models, five folds over the dialogues: no reply is scored by a model that saw its dialogue."""
    from tunegate.training.reward_evaluation import rating_figures
    from tunegate.training.reward_model import RewardHead

    ratings = topical_chat(shared)
    dialogues = sorted({rating.source for rating in ratings})
    order = np.random.default_rng(1).permutation(len(dialogues))
    fold_of = {dialogues[int(index)]: place % 5 for place, index in enumerate(order)}
    folds = [[index for index, rating in enumerate(ratings) if fold_of[rating.source] == fold] for fold in range(5)]
    spec = RewardSpec(
        objective="pointwise",
        trunk=arguments.trunk,
        probe_first=arguments.trunk == "full",
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        max_length=LONGEST_RATED,
    )
    started = time.process_time()
    score = _frozen_folds if arguments.trunk == "frozen" else _trained_folds
    predicted = score(work, ratings, folds, spec, stop, arguments.name)
    seconds = time.process_time() - started
    truth = np.array([rating.score for rating in ratings])
    pooled = rating_figures(predicted, truth, RewardHead())
    lengths = rating_figures(np.array([float(len(r.response)) for r in ratings]), truth, RewardHead())
    constant = float(np.abs(truth - truth.mean()).mean())
    assert pooled is not None and lengths is not None
    return {
        "pooled": pooled.model_dump(mode="json"),
        "within_dialogue": _within(predicted, ratings, SEEDS[0]),
        "mean_absolute_error": float(np.abs(predicted - truth).mean()),
        "mean_absolute_error_of_the_mean": constant,
        "length_alone": lengths.model_dump(mode="json"),
        "processor_seconds": seconds,
        "n": len(ratings),
    }


def _frozen_folds(
    work: Path, ratings: list[Rating], folds: list[list[int]], spec: RewardSpec, stop: Callable[[], bool], name: str
) -> np.ndarray:
    """Predicted ratings by heads on the frozen trunk, whose features are the same in every fold."""
    from tunegate.training.chat import Chat
    from tunegate.training.models import init_score_head, load_sequence_scorer
    from tunegate.training.reward_data import RatingScale, encode_ratings
    from tunegate.training.reward_frozen import fit_head
    from tunegate.training.reward_scores import item_features

    del stop, name
    base = base_model(work)
    chat, model = Chat.load(base), load_sequence_scorer(base)
    init_score_head(model, seed=1)
    everything = encode_ratings(chat, ratings, LONGEST_RATED, RatingScale.fit(ratings)).items
    assert len(everything) == len(ratings)
    features = item_features(model, everything, chat.pad_id, Progress())
    predicted = np.full(len(ratings), np.nan)
    for number, outside in enumerate(folds):
        inside = sorted(set(range(len(ratings))) - set(outside))
        scale = RatingScale.fit([ratings[index] for index in inside])
        items = encode_ratings(chat, [ratings[index] for index in inside], LONGEST_RATED, scale).items
        head = fit_head(items, [features[index] for index in inside], spec, seed=1 + number)
        raw = np.array([(features[index] @ head.weight_D)[0] for index in outside])
        predicted[outside] = scale.mean + scale.scale * raw
    return predicted


def _trained_folds(
    work: Path, ratings: list[Rating], folds: list[list[int]], spec: RewardSpec, stop: Callable[[], bool], name: str
) -> np.ndarray:
    """Predicted ratings by reward models trained in full, one a fold."""
    from tunegate.training.reward import train_reward
    from tunegate.training.reward_model import RewardModel

    predicted = np.full(len(ratings), np.nan)
    for number, outside in enumerate(folds):
        inside = [rating for index, rating in enumerate(ratings) if index not in set(outside)]
        out = work / f"ratings-{name}-{number}"
        if not (out / "reward_head.json").is_file():
            if stop():
                raise TrainingStoppedError(f"stopped before fold {number}", fix="start it again")
            held = [ratings[index] for index in outside]
            train_reward(base_model(work), [], inside, [], held, out, spec=spec, seed=1 + number, observer=Progress())
        model = RewardModel.load(out)
        scores = model.score([ratings[i].prompt for i in outside], [ratings[i].response for i in outside])
        predicted[outside] = model.predicted_ratings(scores)
    return predicted


def _within(predicted: np.ndarray, ratings: list[Rating], seed: int) -> dict[str, float]:
    """Mean over dialogues of Spearman's correlation among the six replies, with a bootstrap interval over dialogues."""
    from scipy.stats import spearmanr

    found = []
    for dialogue in sorted({rating.source for rating in ratings}):
        index = [i for i, rating in enumerate(ratings) if rating.source == dialogue]
        truth = [ratings[i].score for i in index]
        if np.ptp(truth) > 0 and np.ptp(predicted[index]) > 0:
            found.append(float(spearmanr(predicted[index], truth).statistic))
    values = np.array(found)
    draws = np.random.default_rng(seed).choice(values, size=(5000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"rho": float(values.mean()), "low": float(low), "high": float(high), "dialogues": len(values)}


def learn_ppo(work: Path, shared: Path, stop: Callable[[], bool], arguments: argparse.Namespace) -> dict[str, Any]:
    """PPO against the HH reward model on HH prompts, over several seeds."""
    from tunegate.training.ppo import train_ppo

    data = hh_records(work, shared)
    sides: dict[str, list[Prompt]] = {
        split: [Prompt(id=p.id, messages=p.prompt, source=p.source) for p in read_records(data, "preferences", split)]
        for split in ("train", "heldout")
    }
    # The first of the held-out prompts are measured on: those of both sets, not of the set that comes first.
    sides["heldout"] = [sides["heldout"][index] for index in shuffled(len(sides["heldout"]), seed=1, epoch=0)]
    spec = PPOSpec(
        steps=arguments.updates,
        prompts_per_update=arguments.batch,
        epochs=4,
        minibatches=arguments.minibatches,
        learning_rate=arguments.learning_rate,
        max_new_tokens=48,
        max_prompt_tokens=128,
        evaluate_every=max(1, arguments.updates // 3),
        evaluate_prompts=arguments.heldout,
        checkpoint_every=1,
        kl=KLSpec(controller="adaptive", target=4.0, coefficient=0.05, horizon=400),
        shaping=RewardShapingSpec(standardise_prompts=48),
    )
    runs = {}
    for seed in SEEDS:
        out = work / f"ppo-{arguments.name}-{seed}"
        if not (out / "training.json").is_file():
            train_ppo(
                base_model(work),
                work / f"reward-{arguments.reward}",
                sides["train"],
                sides["heldout"],
                out,
                spec=spec,
                seed=seed,
                observer=Progress(),
                checkpoints=work / f"checkpoints-ppo-{arguments.name}-{seed}",
                stop_requested=stop,
                judge=work / f"reward-{arguments.judge}" if arguments.judge else None,
            )
        result = json.loads((out / "training.json").read_text())
        result["examples"] = result["examples"][:2]
        runs[str(seed)] = result
    return {"runs": runs}


def main() -> int:
    """Command line; 3 means broken off, start again to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("reward", "ratings", "ppo"))
    parser.add_argument("--name", default="main", help="of this run, for its folders")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared-data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="break off after so many, with a checkpoint")
    parser.add_argument("--trunk", choices=("full", "frozen", "lora"), default="full")
    parser.add_argument("--heads", action="store_true", help="reward: a head for each of the two sets")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--pairs", type=int, help="train on so many; all without")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32, help="PPO: prompts an update")
    parser.add_argument("--minibatches", type=int, default=1, help="PPO: optimizer steps a pass over a rollout")
    parser.add_argument("--heldout", type=int, default=96, help="PPO: held-out prompts")
    parser.add_argument("--reward", default="main", help="name of the reward run that PPO is trained against")
    parser.add_argument("--judge", help="name of a reward run that PPO is only measured with")
    given = parser.parse_args()
    until = time.monotonic() + given.minutes * 60 if given.minutes else float("inf")
    given.work.mkdir(parents=True, exist_ok=True)
    runs = {"reward": learn_reward, "ratings": learn_ratings, "ppo": learn_ppo}
    try:
        found = runs[given.what](given.work, given.shared_data, lambda: time.monotonic() > until, given)
    except TrainingStoppedError as error:
        print(error)
        return 3
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    for key in ("work", "shared_data", "out"):
        del settings[key]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
