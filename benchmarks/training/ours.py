"""One measurement of Tunegate: `python ours.py ppo|sft|reward --variant … --work … --out …`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import Figures, StepClock, read
from workload import BATCH, SEED, Sizes, sft_spec

from tunegate.data.records import Conversation, Preference, Prompt
from tunegate.training.config import RewardSpec
from tunegate.training.ppo_config import KLSpec, PPOSpec, RewardShapingSpec, WatchdogSpec

LEARNING_RATE = 2e-5
PPO_LEARNING_RATE = 3e-6

_PPO_COMMON: dict[str, Any] = {
    "temperature": 0.7,
    "critic_warmup_epochs": 0,  # the peer has none
    "evaluate_every": 10_000,
    "evaluate_prompts": 2,
    # Every epoch is run, whatever the policy does: the work is the same in every update.
    "kl": KLSpec(coefficient=0.05, early_stop=None),
    "watchdogs": WatchdogSpec(action="warn"),
}


class Watch:
    """An observer that takes the time at the end of every step, and keeps what the step reports."""

    def __init__(self, marker: str, flops: Any) -> None:
        """Watch steps that report `marker`; times lie between them, so the first step has none."""
        self.marker = marker
        self.flops = flops
        self.clock = StepClock()
        self.steps: list[dict[str, float]] = []
        self.counts: list[float] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Note a step."""
        if self.marker in values and step > 0:
            self.steps.append(dict(values))
            self.clock.tick()
            self.counts.append(float(self.flops.get_total_flops()) if self.flops is not None else 0.0)

    def progress(self, done: float, total: float, unit: str, label: str = "") -> None:
        """Ignore."""

    def note(self, message: str) -> None:
        """Ignore."""

    def series(self, name: str) -> list[float]:
        """A metric of every step."""
        return [step[name] for step in self.steps]

    def into(self, figures: Figures) -> Figures:
        """Fill in times and counts."""
        self.clock.into(figures)
        if self.flops is not None:
            figures.flops = [after - before for before, after in zip(self.counts, self.counts[1:], strict=False)]
            figures.seconds, figures.cpu_seconds = [], []  # counting slows the steps down
        return figures


def ppo_spec(variant: str, sizes: Sizes) -> PPOSpec:
    """The `ppo` section.

    Args:
        variant: `like` does what the peer does: every weight trained, a separate critic, fp32, no standardisation, no
            clipping. `shared` is what Tunegate recommends: its defaults. The microbatch is the default in both: it
            holds the rollout, and changes no gradient.
        sizes: Of the work.
    """
    common = {
        **_PPO_COMMON,
        "steps": sizes.ppo_updates,
        "prompts_per_update": sizes.ppo_batch,
        "epochs": 4,
        "max_new_tokens": sizes.response,
        "max_prompt_tokens": sizes.prompt,
    }
    if variant == "shared":
        return PPOSpec(**common, shaping=RewardShapingSpec(standardise_prompts=8))
    return PPOSpec(
        **common,
        method="full",
        critic="separate",
        precision="fp32",
        learning_rate=PPO_LEARNING_RATE,
        critic_learning_rate=PPO_LEARNING_RATE,
        gradient_clip=0.0,
        adam_epsilon=1e-8,
        shaping=RewardShapingSpec(standardise=False, standardise_prompts=8, clip=None, missing_eos_penalty=1.0),
    )


def run_ppo(variant: str, work: Path, sizes: Sizes, scratch: Path, flops: Any) -> Figures:
    from tunegate.training.ppo import train_ppo

    precision = "fp32" if variant == "like" else "bf16"
    records = [Prompt(id=r["id"], messages=r["messages"]) for r in read(work / "prompts-records.json")]
    spec = ppo_spec(variant, sizes)
    watch = Watch("ppo/reward", flops)
    result = train_ppo(
        work / f"policy-{precision}",
        work / f"reward-{precision}",
        records[:-2],
        records[-2:],
        scratch / "out",
        spec=spec,
        seed=SEED,
        observer=watch,
    )
    figures = watch.into(Figures(job="", unit="update", settings=spec.model_dump(mode="json")))
    figures.units = [1.0] * (len(watch.steps) - 1)
    figures.losses = watch.series("ppo/policy_loss")
    figures.scores = watch.series("ppo/score")
    figures.kl = watch.series("ppo/kl")
    figures.tokens = result.response_tokens / max(1, result.updates)
    return figures


def run_sft(variant: str, work: Path, sizes: Sizes, scratch: Path, flops: Any) -> Figures:
    from tunegate.training.sft import train_sft

    precision, _, layout = variant.partition("-")
    records = [Conversation(id=r["id"], messages=r["messages"]) for r in read(work / "sft-records.json")]
    spec = sft_spec(sizes, packing=layout == "packed")
    watch = Watch("sft/loss", flops)
    train_sft(work / f"policy-{precision}", records, [], scratch / "out", spec=spec, seed=SEED, observer=watch)
    figures = watch.into(Figures(job="", unit="token", settings=spec.model_dump(mode="json")))
    lengths = [len(row["ids"]) for row in read(work / "sft.json")]
    figures.units = [float(sum(lengths[step * BATCH : (step + 1) * BATCH])) for step in range(1, len(watch.steps))]
    figures.losses = watch.series("sft/loss")
    return figures


def run_reward(variant: str, work: Path, sizes: Sizes, scratch: Path, flops: Any) -> Figures:
    from tunegate.training.reward import train_reward

    pairs = [Preference(**r) for r in read(work / "pairs-records.json")]
    spec = RewardSpec(
        batch_pairs=BATCH,
        max_length=sizes.max_length,
        learning_rate=LEARNING_RATE,
        warmup=0.0,
        max_steps=sizes.reward_steps,
    )
    watch = Watch("reward/loss", flops)
    train_reward(
        work / f"policy-{variant}", pairs, [], pairs[:2], [], scratch / "out", spec=spec, seed=SEED, observer=watch
    )
    figures = watch.into(Figures(job="", unit="pair", settings=spec.model_dump(mode="json")))
    figures.units = [float(BATCH)] * (len(watch.steps) - 1)
    figures.losses = watch.series("reward/loss")
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("ppo", "sft", "reward"))
    parser.add_argument("--variant", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flops", action="store_true", help="count operations instead of taking times")
    given = parser.parse_args()
    work_sizes = read(given.work / "sizes.json")
    sizes = Sizes(**{name: work_sizes[name] for name in asdict(Sizes())})
    counter: Any = None
    if given.flops:
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
    stages = {"ppo": run_ppo, "sft": run_sft, "reward": run_reward}
    with tempfile.TemporaryDirectory() as scratch, counter or nullcontext():
        figures = stages[given.stage](given.variant, given.work, sizes, Path(scratch), counter)
    figures.job = f"{given.stage}/ours-{given.variant}"
    figures.write(given.out)


if __name__ == "__main__":
    main()
