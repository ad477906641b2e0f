"""One measurement of TRL 1.16's SFT trainer, in its own environment: `--variant fp32-padded|bf16-packed|…`.

`bf16` is the trainer's own setting: autocast over fp32 weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Figures, StepClock, read
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

MICRO = 4


class Watch(TrainerCallback):
    """Takes the time after each optimizer step and keeps the losses."""

    def __init__(self) -> None:
        self.clock = StepClock()
        self.losses: list[float] = []
        self.tokens: list[float] = []
        self.pending = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep a loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step has ended."""
        self.clock.tick()
        self.tokens.append(self.pending)
        self.pending = 0.0


class CountingTrainer(SFTTrainer):
    """The trainer, which tells how many real tokens went through."""

    watch: Watch

    def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        """Count and go on."""
        mask = inputs.get("attention_mask")
        self.watch.pending += float(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *rest, **options)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    precision, _, layout = given.variant.partition("-")
    sizes = read(given.work / "sizes.json")
    rows = [{"input_ids": row["ids"], "assistant_masks": row["mask"]} for row in read(given.work / "sft.json")]
    packed = layout == "packed"
    # Packed rows hold `max_length` tokens: as many a step as 16 conversations have.
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    rows_a_step = max(1, round(16 * mean / sizes["max_length"]))
    path = given.work / f"policy-{precision}"
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=1 if packed else MICRO,
            gradient_accumulation_steps=rows_a_step if packed else 16 // MICRO,
            max_steps=-1 if packed else sizes["sft_steps"],
            num_train_epochs=1,
            max_length=sizes["max_length"],
            packing=packed,
            learning_rate=2e-5,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = CountingTrainer(
            model=AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32),
            args=config,
            processing_class=AutoTokenizer.from_pretrained(str(path)),
            train_dataset=Dataset.from_list(rows),
            callbacks=[watch],
        )
        trainer.watch = watch
        trainer.train()
    figures = Figures(job=f"sft/trl-{given.variant}", unit="token", settings={"micro": MICRO, "packed": packed})
    watch.clock.into(figures)
    figures.units = watch.tokens[1:]
    figures.losses = watch.losses
    figures.write(given.out)


if __name__ == "__main__":
    main()
