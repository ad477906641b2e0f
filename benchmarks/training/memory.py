"""Peak memory of each training stage against what `tunegate plan` says.

    python benchmarks/training/memory.py OUT.json

Each stage trains SmolLM2-135M-Instruct (or --model FOLDER) for a few steps in a process of its own, on random words
that fill its microbatches, with its defaults but for the sizes below.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tunegate.training import estimate as plan

WORDS = (
    "river",
    "stone",
    "green",
    "walk",
    "under",
    "seven",
    "bright",
    "table",
    "often",
    "music",
    "north",
    "apple",
    "quiet",
    "train",
    "paper",
    "winter",
)
CASES = {
    "sft-full": {},
    "sft-lora": {"method": "lora"},
    "sft-full-recompute": {"gradient_checkpointing": True},
    "reward-full": {},
    "reward-lora": {"trunk": "lora"},
    "reward-frozen": {"trunk": "frozen"},
    "ppo-lora": {},
    "ppo-full": {"method": "full"},
    "ppo-full-separate": {"method": "full", "critic": "separate", "critic_warmup_epochs": 1},
    # One microbatch holds the rollout, so the first forward passes of policy and critic are kept for the update.
    "ppo-full-separate-whole": {"method": "full", "critic": "separate", "microbatch_tokens": 2048},
    "dpo-lora": {},
    "dpo-full": {"method": "full"},
}
SFT = {"batch_size": 4, "max_steps": 2, "max_length": 512}
REWARD = {"batch_pairs": 4, "max_steps": 2, "max_length": 512, "judge": {"enabled": False}}
PPO = {
    "steps": 2, "prompts_per_update": 8, "epochs": 1, "max_new_tokens": 32, "max_prompt_tokens": 256,
    "evaluate_every": 2, "evaluate_prompts": 4, "microbatch_tokens": 1024, "critic_warmup_epochs": 2,
    "shaping": {"standardise_prompts": 8, "missing_eos": "none"},
}  # fmt: skip
DPO = {"batch_pairs": 2, "max_steps": 2, "max_length": 512, "max_new_tokens": 32, "evaluate_prompts": 4}


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def spec_of(case: str) -> Any:
    """The stage's section of the spec."""
    from tunegate.training.config import RewardSpec, SFTSpec
    from tunegate.training.dpo_config import DPOSpec
    from tunegate.training.ppo_config import PPOSpec

    sections = {"sft": (SFTSpec, SFT), "reward": (RewardSpec, REWARD), "ppo": (PPOSpec, PPO), "dpo": (DPOSpec, DPO)}
    section, common = sections[case.split("-")[0]]
    return section(**(common | CASES[case]))


def estimated(case: str, size: plan.ModelSize, hardware: plan.Hardware) -> int:
    """What `tunegate plan` says of a case, in bytes."""
    spec = spec_of(case)
    said = {
        "sft": lambda: plan.estimate_sft(size, spec, hardware, rows=12, mean_tokens=480, heldout_rows=4),
        "reward": lambda: plan.estimate_reward(
            size, spec, hardware, pairs=12, ratings=0, mean_tokens=350, heldout_pairs=4
        ),
        "ppo": lambda: plan.estimate_ppo(size, spec, hardware, mean_prompt_tokens=170),
        "dpo": lambda: plan.estimate_dpo(
            size, spec, hardware, pairs=10, mean_tokens=350, mean_prompt_tokens=170, heldout_pairs=4
        ),
    }
    return said[case.split("-")[0]]().memory_bytes


def one(case: str, model: Path, reward: Path) -> None:
    """Train, and print the estimate and the measured peak."""
    from tunegate.data.records import Conversation, Preference, Prompt
    from tunegate.training.dpo import train_dpo
    from tunegate.training.ppo import train_ppo
    from tunegate.training.reward import train_reward
    from tunegate.training.sft import train_sft

    draw, stage, spec = random.Random(1), case.split("-")[0], spec_of(case)
    size = plan.ModelSize.of_config(json.loads((model / "config.json").read_text()))
    ask = [[{"role": "user", "content": text(draw, 150)}] for _ in range(12)]
    pairs = [
        Preference(id=str(n), prompt=prompt, chosen=text(draw, 150), rejected=text(draw, 150))
        for n, prompt in enumerate(ask)
    ]
    prompts = [Prompt(id=str(n), messages=prompt) for n, prompt in enumerate(ask)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if stage == "sft":
            rows = [
                Conversation(id=str(n), messages=[*prompt, {"role": "assistant", "content": text(draw, 300)}])
                for n, prompt in enumerate(ask)
            ]
            result = train_sft(model, rows[2:], rows[:2], out, spec=spec, seed=1)
        elif stage == "reward":
            result = train_reward(model, pairs[2:], [], pairs[:2], [], out, spec=spec, seed=1)
        elif stage == "dpo":
            result = train_dpo(model, pairs[2:], pairs[:2], prompts[:4], out, spec=spec, seed=1, reward=reward)
        else:
            result = train_ppo(model, reward, prompts[4:], prompts[:4], out, spec=spec, seed=1)
    said = estimated(case, size, plan.Hardware.here())
    print(json.dumps({"estimated": said, "measured": result.peak_memory_bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, model, reward = options.one
        one(case, Path(model), Path(reward))
        return
    from tunegate.training.chat import Chat
    from tunegate.training.config import ModelSpec
    from tunegate.training.models import init_score_head, load_sequence_scorer, resolve_model
    from tunegate.training.reward_model import RewardHead, RewardModel

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model, reward = Path(folder) / "model", Path(folder) / "reward"
        source = str(options.model) if options.model else "smollm2-135m-instruct"
        resolve_model(ModelSpec(source=source), model)
        scorer = load_sequence_scorer(model)
        init_score_head(scorer, seed=1)
        RewardModel(scorer, Chat.load(model), RewardHead(max_length=1024)).save(reward, like=model)
        del scorer
        for case in options.cases:
            command = [sys.executable, __file__, "--one", case, str(model), str(reward)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                raise SystemExit(f"{case} failed")
            found[case] = json.loads(done.stdout.splitlines()[-1])
            ratio = found[case]["estimated"] / found[case]["measured"]
            gib = {name: value / 2**30 for name, value in found[case].items()}
            print(
                f"{case:20} estimated {gib['estimated']:5.2f} GiB, measured {gib['measured']:5.2f} GiB, {ratio:.2f}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps({"model": source, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
