"""One measurement of TRL 1.12's PPO trainer, in its own environment: `python trl_ppo.py --variant … --work … --out …`.

`bf16=True` does nothing in this trainer, so `fp32` is how it runs. `bf16` loads the weights themselves in bf16, which
also puts Adam's arithmetic into bf16: no setting of the trainer, but the fastest it can be made to run. `fp32-whole`
takes the whole rollout in one microbatch, as Tunegate does, instead of four rows at a time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Figures, StepClock, read
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Watch(TrainerCallback):
    """Takes the time after each update and keeps what was logged."""

    def __init__(self) -> None:
        self.clock = StepClock()
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the figures of an update."""
        if logs and "objective/kl" in logs:
            self.logs.append(dict(logs))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update has ended."""
        self.clock.tick()

    def series(self, name: str) -> list[float]:
        """A figure of every update."""
        return [float(log[name]) for log in self.logs]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=("fp32", "fp32-whole", "bf16"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sizes = read(given.work / "sizes.json")
    precision, _, whole = given.variant.partition("-")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    policy_path, reward_path = given.work / f"policy-{precision}", given.work / f"reward-{precision}"
    micro = sizes["ppo_batch"] if whole else sizes["ppo_micro"]
    tokenizer = AutoTokenizer.from_pretrained(str(policy_path), padding_side="left")

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(str(policy_path), dtype=dtype)

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(str(reward_path), dtype=dtype, num_labels=1)

    with tempfile.TemporaryDirectory() as scratch:
        config = PPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=sizes["ppo_batch"] // micro,
            num_mini_batches=1,
            num_ppo_epochs=4,
            total_episodes=sizes["ppo_batch"] * sizes["ppo_updates"],
            local_rollout_forward_batch_size=sizes["ppo_batch"],
            response_length=sizes["response"],
            stop_token="eos",
            missing_eos_penalty=1.0,
            temperature=0.7,
            kl_coef=0.05,
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
            gamma=1.0,
            lam=0.95,
            learning_rate=3e-6,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=1,
        )
        watch = Watch()
        rows = [{"input_ids": ids} for ids in read(given.work / "prompts.json")]
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy(),
            ref_model=policy(),
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:micro]),
            callbacks=[watch],
        )
        trained = _count_tokens(trainer)
        trainer.train()
    figures = Figures(job=f"ppo/trl-{given.variant}", unit="update", settings={"ppo": "trl.experimental.ppo"})
    watch.clock.into(figures)
    figures.units = [1.0] * len(figures.seconds)
    figures.losses = watch.series("loss/policy_avg")
    figures.scores = watch.series("objective/scores")
    figures.kl = watch.series("objective/kl")
    figures.tokens = sum(trained) / max(1, len(watch.logs))
    figures.write(given.out)


def _count_tokens(trainer: Any) -> list[int]:
    """Response tokens up to the stop token, counted where the trainer cuts the responses."""
    import trl.experimental.ppo.ppo_trainer as module

    counts: list[int] = []
    original = module.truncate_response

    def counted(stop: int, pad: int, responses: Any) -> Any:
        cut = original(stop, pad, responses)
        counts.append(int((cut != pad).sum()))
        return cut

    module.truncate_response = counted
    return counts


if __name__ == "__main__":
    main()
