"""A process that trains a tiny model in children of its own and kills them; run by `test_training_kill.py`.

Children are forked, so that a start costs no imports and ten kills a stage are affordable. Prints one JSON document.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from training_samples import make_conversations, make_preferences

from tunegate.data.records import Prompt
from tunegate.errors import TrainingStoppedError
from tunegate.training.config import ModelSpec, RewardSpec, SFTSpec
from tunegate.training.dpo import train_dpo
from tunegate.training.dpo_config import DPOSpec
from tunegate.training.models import resolve_model
from tunegate.training.ppo import train_ppo
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.reward import train_reward
from tunegate.training.sft import train_sft
from tunegate.training.stopping import stop_on_sigterm

KILLS = 10


def prompts(count: int, prefix: str) -> list[Prompt]:
    return [
        Prompt(id=f"{prefix}{n}", messages=[{"role": "user", "content": f"What about number {n}?"}])
        for n in range(count)
    ]


def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]


def train(stage: str, work: Path, **options) -> None:
    """One training with a checkpoint after every step."""
    base, out = work / "base", work / "out"
    if stage == "sft":
        spec = SFTSpec(
            epochs=2, batch_size=4, checkpoint_every=1, evaluate_every=3, max_length=96, learning_rate=1e-2,
            neftune_alpha=5.0, lora={"rank": 4, "dropout": 0.1}, method="lora",
        )  # fmt: skip
        train_sft(base, make_conversations(40), make_conversations(8, seed=9), out, spec=spec, seed=1, **options)
    elif stage == "reward":
        spec = RewardSpec(
            batch_pairs=2, checkpoint_every=1, max_length=96, learning_rate=1e-2, lora={"rank": 4, "dropout": 0.1},
            trunk="lora",
        )  # fmt: skip
        train_reward(base, make_preferences(40), [], make_preferences(8, seed=9), [], out, spec=spec, seed=1, **options)
    elif stage == "dpo":
        spec = DPOSpec(
            batch_pairs=2, checkpoint_every=1, max_length=96, learning_rate=1e-2, max_new_tokens=8,
            max_prompt_tokens=64, evaluate_every=5, evaluate_prompts=8, method="full", precision="fp32",
        )  # fmt: skip
        pairs = make_preferences(40), make_preferences(8, seed=9)
        train_dpo(base, *pairs, prompts(8, "h"), out, spec=spec, seed=1, **options)
    else:
        spec = PPOSpec(
            reward_function="killed_training:vowels", steps=6, prompts_per_update=8, max_new_tokens=8,
            max_prompt_tokens=64, epochs=2, minibatches=2, learning_rate=1e-2, evaluate_every=3, evaluate_prompts=8,
            critic_warmup_epochs=2, checkpoint_every=1, precision="fp32",
            shaping={"standardise_prompts": 8, "missing_eos": "none"},
            kl={"controller": "adaptive", "target": 0.5, "horizon": 50, "early_stop": None, "limit": 100.0},
        )  # fmt: skip
        train_ppo(base, None, prompts(20, "t"), prompts(8, "h"), out, spec=spec, seed=1, **options)


def child(stage: str, work: Path) -> int:
    """Fork a training; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with stop_on_sigterm() as stop_requested:
            train(stage, work, checkpoints=work / "checkpoints", stop_requested=stop_requested)
        status = 0
    except TrainingStoppedError as error:
        status = error.exit_code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def ended(pid: int, work: Path, checkpoints: int, seconds: float) -> int | None:
    """Wait status of a child, or None at a moment: so many checkpoints after its start, and so many seconds later.

    Counting checkpoints lets a busy machine get on: seconds alone might never be enough for the next one.
    """
    first = step(work)
    until = time.monotonic() + seconds if checkpoints == 0 else None
    while until is None or time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if until is None and step(work) >= first + checkpoints:
            until = time.monotonic() + seconds
        time.sleep(0.002)
    return None


def step(work: Path) -> int:
    last = newest(work)
    return int(last.name.removeprefix("step-")) if last is not None else 0


def newest(work: Path) -> Path | None:
    return max(work.glob("checkpoints/step-*"), default=None)


def damage(folder: Path) -> None:
    """What a disk that filled up, or a node that went, leaves behind."""
    file = folder / "state.pt"
    file.write_bytes(file.read_bytes()[:-20])


def weights(work: Path) -> str:
    return hashlib.sha256((work / "out" / "model.safetensors").read_bytes()).hexdigest()


def clean(work: Path) -> None:
    for name in ("out", "checkpoints"):
        shutil.rmtree(work / name, ignore_errors=True)


def harass(stage: str, work: Path) -> dict:
    """Kill one stage's training again and again; what became of it."""
    texts = [message["content"] for row in make_conversations(60) for message in row.messages]
    resolve_model(ModelSpec(source="tiny-random", precision="fp32"), work / "base", texts=texts, seed=1)
    draw = random.Random(f"{stage} {os.environ.get('KILL_SEED', 0)}")

    started = time.monotonic()
    assert os.waitpid(child(stage, work), 0)[1] == 0
    whole = time.monotonic() - started
    expected = weights(work)
    clean(work)

    found, resumed, kills, damaged, terminated = [], [], 0, 0, []

    def note_end() -> None:
        found.append(weights(work))
        resumed.append(json.loads((work / "out" / "training.json").read_text())["resumed_from"])
        clean(work)

    while kills < KILLS:
        pid = child(stage, work)
        status = ended(pid, work, draw.choice([0, 1, 2, 3]), draw.uniform(0.0, 0.2) * whole)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            last = newest(work)
            if kills % 4 == 0 and last is not None:
                damage(last)
                damaged += 1
            continue
        assert status == 0, f"a training ended with {status}"
        note_end()
    # What the last kill left is brought to its end as well.
    assert os.waitpid(child(stage, work), 0)[1] == 0
    note_end()
    # SIGTERM half way: a checkpoint and status 75, then the same weights.
    pid = child(stage, work)
    while newest(work) is None:
        time.sleep(0.002)
    os.kill(pid, signal.SIGTERM)
    terminated.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    terminated.append(os.waitstatus_to_exitcode(os.waitpid(child(stage, work), 0)[1]))
    found.append(weights(work))
    kept = len(list(work.glob("checkpoints/step-*")))
    return {
        "expected": expected, "found": found, "resumed": resumed, "kills": kills, "damaged": damaged,
        "terminated": terminated, "kept": kept,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    print(json.dumps({stage: harass(stage, root / stage) for stage in ("sft", "reward", "ppo", "dpo")}))
