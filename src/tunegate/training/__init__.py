"""Training: supervised fine-tuning, the reward model, PPO, and what they share.

Nothing heavy is imported with the package; the names below load their module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DPOResult": "dpo_results",
    "DPOSpec": "dpo_config",
    "DistributedSpec": "config",
    "Generator": "rollout",
    "ModelFacts": "models",
    "ModelSpec": "config",
    "NLL": "results",
    "PPOResult": "ppo_results",
    "PPOSpec": "ppo_config",
    "RewardModel": "reward_model",
    "RewardResult": "results",
    "RewardSpec": "config",
    "SFTResult": "results",
    "SFTSpec": "config",
    "SamplingSpec": "ppo_config",
    "mean_answer_nll": "sft",
    "resolve_model": "models",
    "train_dpo": "dpo",
    "train_ppo": "ppo",
    "train_reward": "reward",
    "train_sft": "sft",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
