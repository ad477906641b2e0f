"""Numbers from TRL 1.12's own PPO code on small tensors, for Tunegate's tests to compare with.

    benchmarks/training/.peers/trl-1.12/bin/python benchmarks/training/trl_reference.py \
        tests/unit/training/trl_reference.json

TRL computes rewards, advantages and losses inside `PPOTrainer.train`, so the trainer is run as it is, in fp64 on a
random Llama of two layers, and what its helper functions are given and return is written down on the way. The file
holds numbers only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

VOCABULARY, PAD, EOS = 20, 0, 1
ROWS, PROMPT, RESPONSE, SEED = 8, 4, 9, 22
SETTINGS = {"kl_coef": 0.1, "cliprange": 0.2, "cliprange_value": 0.05, "vf_coef": 0.1, "gamma": 0.97, "lam": 0.9}


class Recorder:
    """Wraps functions of the trainer's module so that calls are kept."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def wrap(self, owner: Any, name: str) -> None:
        """Keep arguments and result of every call."""
        original = getattr(owner, name)

        def kept(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            self.calls[name].append((_copy(arguments), _copy(result)))
            return result

        setattr(owner, name, kept)


def _copy(value: Any) -> Any:
    """Tensors are changed in place later on, so they are copied; models stay what they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(_copy(item) for item in value)
    return value


def reference(kl_estimator: str, whiten_rewards: bool) -> dict[str, Any]:
    """One update of the trainer, as numbers."""
    set_seed(SEED)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t2")),
        pad_token="t0",
        eos_token="t1",
        padding_side="left",
    )
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
        initializer_range=0.6,
    )
    policy, other = LlamaForCausalLM(shape).double(), LlamaForCausalLM(shape).double()
    reward, value = LlamaForSequenceClassification(shape).double(), LlamaForSequenceClassification(shape).double()
    # A reference near the policy, but not the same: the KL is neither 0 nor enormous.
    mixed = {name: 0.95 * weight + 0.05 * other.state_dict()[name] for name, weight in policy.state_dict().items()}
    other.load_state_dict(mixed)
    prompts = torch.randint(2, VOCABULARY, (2 * ROWS, PROMPT)).tolist()  # the trainer behaves differently at their end
    with tempfile.TemporaryDirectory() as scratch:
        config = PPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_mini_batches=1,
            num_ppo_epochs=3,
            total_episodes=ROWS,
            local_rollout_forward_batch_size=ROWS,
            response_length=RESPONSE,
            stop_token="eos",
            missing_eos_penalty=0.5,
            temperature=0.7,
            kl_estimator=kl_estimator,
            whiten_rewards=whiten_rewards,
            learning_rate=1e-3,
            num_sample_generations=0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            seed=SEED,
            **SETTINGS,
        )
        rows = Dataset.from_list([{"input_ids": ids} for ids in prompts])
        recorder = Recorder()
        kept = {
            name: getattr(module, name)
            for name in ("selective_log_softmax", "masked_whiten", "masked_mean", "get_reward", "forward")
        }
        kept |= {"truncate_response": module.truncate_response, "first_true_indices": module.first_true_indices}
        permutation = np.random.permutation
        for name in kept:
            recorder.wrap(module, name)
        recorder.wrap(np.random, "permutation")
        try:
            PPOTrainer(
                args=config,
                processing_class=tokenizer,
                model=policy,
                ref_model=other,
                reward_model=reward,
                value_model=value,
                train_dataset=rows,
                eval_dataset=rows,
            ).train()
        finally:
            np.random.permutation = permutation
            for name, function in kept.items():
                setattr(module, name, function)
    return _numbers(recorder.calls, whiten_rewards)


def _numbers(calls: dict[str, list[tuple[Any, Any]]], whiten_rewards: bool) -> dict[str, Any]:
    logprobs = [result for _, result in calls["selective_log_softmax"]]
    (logits, tokens), first = calls["selective_log_softmax"][0]
    cut = calls["truncate_response"][0][1]
    # Index of the last token through the stop token, as the trainer finds it.
    last = calls["first_true_indices"][-1][1] - 1
    value = calls["get_reward"][0][1][0][:, PROMPT - 1 : -1].squeeze(-1)
    score = calls["get_reward"][1][1][1]
    score = torch.where((cut == EOS).any(1), score, score - 0.5)
    # `masked_whiten` calls `masked_mean` itself, so the advantages' call is found by its place.
    whitened = calls["masked_whiten"]
    (advantages, mask), white = whitened[-1]
    found = {
        "lengths": (last + 1).tolist(),
        "finished": (cut == EOS).any(1).tolist(),
        "tokens": tokens.tolist(),
        "logits_of_row_0": logits[0].tolist(),
        "logprobs": first.tolist(),
        "reference_logprobs": logprobs[1].tolist(),
        "values": value.tolist(),
        "scores": score.tolist(),
        "advantages": advantages.tolist(),
        "mask": mask.tolist(),
        "whitened_advantages": white.tolist(),
        "mean_advantage": float(module.masked_mean(advantages, mask)),
    }
    if whiten_rewards:
        arguments, result = whitened[0]
        found["rewards"] = arguments[0].tolist()
        found["whitened_rewards"] = result.tolist()
    # In every microbatch: value loss, its clipped share, policy loss, its clipped share, in this order, of which the
    # first four-row calls belong to the update.
    order = [int(row) for _, permuted in calls["permutation"] for row in permuted]
    means = [(arguments, result) for arguments, result in calls["masked_mean"] if arguments[0].shape[0] == 4]
    outputs = [result for _, result in calls["forward"] if isinstance(result, tuple)]
    micro = []
    for number, output in enumerate(outputs):
        four = means[4 * number : 4 * number + 4]
        micro.append(
            {
                "rows": order[4 * number : 4 * number + 4],
                "logprobs": logprobs[2 + number].tolist(),
                "values": output[1][:, PROMPT - 1 : -1].squeeze(-1).tolist(),
                "value_loss": 0.5 * float(four[0][1]),
                "policy_loss": float(four[2][1]),
                "clipped": float(four[3][1]),
            }
        )
    found["microbatches"] = micro
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    from importlib.metadata import version

    found = {
        "made_by": "benchmarks/training/trl_reference.py",
        "trl": version("trl"),
        "settings": SETTINGS | {"temperature": 0.7, "missing_eos_penalty": 0.5},
        "runs": {"k1": reference("k1", False), "k3": reference("k3", True)},
    }
    given.out.write_text(json.dumps(_rounded(found), indent=None, separators=(",", ":")) + "\n")


def _rounded(value: Any) -> Any:
    """Twelve digits are plenty for a tolerance of 1e-6."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value


if __name__ == "__main__":
    main()
