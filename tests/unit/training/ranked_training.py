"""What `test_training_ranks.py` runs in several processes: the trainers on a tiny model, and single updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_samples import make_conversations, make_preferences, make_ratings

from tunegate.data.records import Prompt
from tunegate.errors import TrainingError
from tunegate.observer import Observer
from tunegate.training.config import RewardSpec, SFTSpec
from tunegate.training.dpo import train_dpo
from tunegate.training.dpo_config import DPOSpec
from tunegate.training.ppo import train_ppo
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.ranks import world
from tunegate.training.reward import train_reward
from tunegate.training.sft import train_sft


def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]


def prompts(count: int, prefix: str) -> list[Prompt]:
    return [
        Prompt(
            id=f"{prefix}{n}", messages=[{"role": "user", "content": f"What about number {n}?" + " Well?" * (n % 3)}]
        )
        for n in range(count)
    ]


SFT = SFTSpec(epochs=1, batch_size=5, max_length=96, learning_rate=1e-3, microbatch_tokens=100, checkpoint_every=3)
REWARD = RewardSpec(
    objective="joint", batch_pairs=5, max_length=96, learning_rate=1e-3, microbatch_tokens=100, max_steps=4
)
PPO = PPOSpec(
    reward_function="ranked_training:vowels", steps=2, prompts_per_update=7, max_new_tokens=8, max_prompt_tokens=64,
    epochs=2, learning_rate=1e-3, evaluate_every=2, evaluate_prompts=6, critic_warmup_epochs=2, precision="fp32",
    microbatch_tokens=100, shaping={"standardise_prompts": 9, "missing_eos": "none"},
    kl={"controller": "adaptive", "target": 0.05, "horizon": 20, "early_stop": None, "limit": 100.0},
)  # fmt: skip
GRPO = PPO.model_copy(update={"algorithm": "grpo", "group_size": 3, "prompts_per_update": 4})
DPO = DPOSpec(
    batch_pairs=5, max_length=96, learning_rate=1e-3, microbatch_tokens=100, max_steps=4, max_new_tokens=8,
    max_prompt_tokens=64, evaluate_prompts=6, precision="fp32",
)  # fmt: skip
PPO_WHOLE = PPO.model_copy(update={"method": "full", "critic": "separate"})


def train_all(base: Path, reward: Path, out: Path, *, observer: Observer, stop_requested: Any, sharding: str = "none"):
    """Every trainer once; its figures by name."""
    options = {"observer": observer, "stop_requested": stop_requested, "sharding": sharding, "seed": 1}
    pairs, ratings = make_preferences(23), make_ratings(9)
    heldout = make_preferences(6, seed=9)
    few = prompts(15, "t"), prompts(6, "h")
    sft = train_sft(base, make_conversations(23), make_conversations(6, seed=9), out / "sft", spec=SFT, **options)
    scored = train_reward(base, pairs, ratings, heldout, [], out / "reward", spec=REWARD, **options)
    adapters = train_ppo(base, None, *few, out / "ppo", spec=PPO, **options)
    whole = train_ppo(
        base, reward, *few, out / "ppo-full", spec=PPO_WHOLE.model_copy(update={"reward_function": None}), **options
    )
    groups = train_ppo(base, None, *few, out / "grpo", spec=GRPO, **options)
    conversations = make_conversations(23), make_conversations(6, seed=9)
    lora = train_sft(base, *conversations, out / "sft-lora", spec=SFT.model_copy(update={"method": "lora"}), **options)
    direct = train_dpo(base, pairs, heldout, few[1], out / "dpo", spec=DPO, **options)
    return {
        "world": world()[1],
        "sft": sft.heldout_after.mean,
        "sft-lora": lora.heldout_after.mean,
        "dpo": [direct.final_loss, *(point.loss for point in direct.preferences)],
        "grpo": [(s.kl, s.policy_loss, s.kl_coefficient, s.divergence) for s in groups.history],
        "reward": scored.final_loss,
        "ppo": [(s.kl, s.policy_loss, s.value_loss, s.kl_coefficient, s.divergence) for s in adapters.history],
        "ppo-full": [(s.kl, s.policy_loss, s.value_loss, s.kl_coefficient, s.divergence) for s in whole.history],
    }


def stop_early(base: Path, reward: Path, out: Path, *, observer: Observer, stop_requested: Any, sharding: str = "none"):
    """PPO whose updates end early: how many steps each rank's updates took."""
    spec = PPO.model_copy(
        update={"learning_rate": 0.05, "epochs": 6, "kl": PPO.kl.model_copy(update={"early_stop": 0.002})}
    )
    from torch import distributed

    result = train_ppo(
        base, None, prompts(15, "t"), prompts(6, "h"), out / f"stop-{world()[0]}", spec=spec, seed=1, observer=observer
    )
    steps: list[Any] = [None] * world()[1]
    distributed.all_gather_object(steps, [(s.steps, s.stopped_early) for s in result.history])
    return steps


def fit_with_checkpoints(
    base: Path, folder: Path, *, observer: Observer, stop_requested: Callable[[], bool], sharding: str = "none"
):
    """SFT that asks to be stopped at step 3, on rank 1 alone."""
    told = iter(range(100))
    ask = (lambda: next(told) >= 3) if world()[0] == 1 else (lambda: False)
    return train_sft(
        base, make_conversations(23), make_conversations(6, seed=9), folder / "stopped", spec=SFT, seed=1,
        observer=observer, stop_requested=ask, checkpoints=folder / "checkpoints", sharding=sharding,
    )  # fmt: skip


def fit_on(base: Path, folder: Path, *, observer: Observer, stop_requested: Any, sharding: str = "none"):
    """SFT that goes on from the checkpoint."""
    return train_sft(
        base, make_conversations(23), make_conversations(6, seed=9), folder / "resumed", spec=SFT, seed=1,
        observer=observer, checkpoints=folder / "checkpoints", sharding=sharding,
    )  # fmt: skip


def fail(*, observer: Observer, stop_requested: Any, sharding: str = "none"):
    """An error that a trainer foresees."""
    observer.note("about to fail")
    raise TrainingError("it went wrong", key="ppo.learning_rate", value=3, fix="lower it")


def crash(*, observer: Observer, stop_requested: Any, sharding: str = "none"):
    """An error that nobody foresees."""
    raise RuntimeError("out of memory, say")
