"""One measurement of TRL 1.16's reward trainer, in its own environment: `--variant fp32|bf16`.

`bf16` is the trainer's own setting: autocast over fp32 weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import Figures, read
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from trl_sft import MICRO, Watch

BATCH = 16


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sizes = read(given.work / "sizes.json")
    rows = [
        {"chosen_ids": row["prompt"] + row["chosen"], "rejected_ids": row["prompt"] + row["rejected"]}
        for row in read(given.work / "pairs.json")
    ]
    path = given.work / f"reward-{given.variant}"
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=BATCH // MICRO,
            max_steps=sizes["reward_steps"],
            max_length=None,
            center_rewards_coefficient=0.01,
            learning_rate=2e-5,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=given.variant == "bf16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(str(path), dtype=torch.float32, num_labels=1),
            args=config,
            processing_class=AutoTokenizer.from_pretrained(str(path)),
            train_dataset=Dataset.from_list(rows),
            callbacks=[watch],
        )
        trainer.train()
    figures = Figures(job=f"reward/trl-{given.variant}", unit="pair", settings={"micro": MICRO})
    watch.clock.into(figures)
    figures.units = [float(BATCH)] * len(figures.seconds)
    figures.losses = watch.losses
    figures.write(given.out)


if __name__ == "__main__":
    main()
