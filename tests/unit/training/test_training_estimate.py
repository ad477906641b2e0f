from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunegate.training.config import JudgeSpec, ModelSpec, RewardSpec, SFTSpec
from tunegate.training.estimate import Hardware, ModelSize, estimate_ppo, estimate_reward, estimate_sft
from tunegate.training.ppo_config import PPOSpec

SMOL = ModelSize.of(ModelSpec())
TWO_CORES = Hardware.cpu(2, bf16=True)


def test_size_from_a_config_is_exact(tiny_model):
    from tunegate.training.models import load_causal_lm

    size = ModelSize.of(ModelSpec(source=str(tiny_model)))
    assert size.parameters == sum(parameter.numel() for parameter in load_causal_lm(tiny_model).parameters())
    config = {
        "num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49152, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True,
    }  # fmt: skip
    assert ModelSize.of_config(config) == SMOL
    assert ModelSize.of(ModelSpec(source="someone/somewhere")) is None


def test_sft_follows_the_measured_rate():
    """10,000 tokens at 360 tokens/s on two cores."""
    spec = SFTSpec(epochs=1)
    less = estimate_sft(SMOL, spec, TWO_CORES, rows=0, mean_tokens=100)
    more = estimate_sft(SMOL, spec, TWO_CORES, rows=100, mean_tokens=100)
    assert more.seconds - less.seconds == pytest.approx(10_000 / 360)
    assert estimate_sft(SMOL, SFTSpec(epochs=3), TWO_CORES, rows=100, mean_tokens=100).seconds > more.seconds
    capped = estimate_sft(SMOL, SFTSpec(epochs=3, max_steps=1), TWO_CORES, rows=100, mean_tokens=100)
    assert capped.seconds - less.seconds == pytest.approx(1600 / 360)


def test_memory_of_full_training_is_what_was_measured():
    """SmolLM2-135M, microbatches of 1024 tokens: 3.9 GB; LoRA and a frozen trunk need far less."""
    memory = {
        method: estimate_sft(SMOL, SFTSpec(method=method), TWO_CORES, rows=1, mean_tokens=100).memory_bytes
        for method in ("full", "lora")
    }
    assert 3.5e9 < memory["full"] < 4.3e9 and memory["lora"] < 0.65 * memory["full"]
    recomputed = estimate_sft(SMOL, SFTSpec(gradient_checkpointing=True), TWO_CORES, rows=1, mean_tokens=100)
    assert recomputed.memory_bytes < memory["full"] - 3e8
    judge = JudgeSpec(enabled=False)
    frozen = estimate_reward(
        SMOL, RewardSpec(trunk="frozen", judge=judge), TWO_CORES, pairs=10, ratings=0, mean_tokens=200
    )
    assert frozen.memory_bytes < 1.2e9


def test_reward_counts_what_the_objective_reads():
    def seconds(**options):
        spec = RewardSpec(**{"judge": JudgeSpec(enabled=False), **options})
        return estimate_reward(SMOL, spec, TWO_CORES, pairs=400, ratings=200, mean_tokens=100).seconds

    assert seconds(objective="pointwise") < seconds(objective="pairwise") < seconds(objective="joint")
    assert seconds(trunk="frozen") < seconds(trunk="lora") < seconds(trunk="full")
    assert seconds(judge=JudgeSpec()) > seconds() and seconds(probe_first=True) > seconds()
    # About 2 pairs/s at 200 tokens a pair (100 a response, the prompt shared).
    assert 400 / seconds() == pytest.approx(2, rel=0.3)


def test_ppo_grows_with_what_it_does():
    def seconds(**options):
        return estimate_ppo(SMOL, PPOSpec(**options), TWO_CORES, mean_prompt_tokens=60, heldout_prompts=100).seconds

    assert seconds(steps=80) > 1.8 * seconds(steps=40)
    assert seconds(adapted_layers=1.0) > seconds() and seconds(method="full") > seconds()
    assert seconds(critic="separate") > seconds() > seconds(enabled=False)


def test_hardware_scales():
    assert Hardware.cpu(8, bf16=True).training_flops > 2.5 * TWO_CORES.training_flops
    assert Hardware.cpu(2, bf16=False).training_flops < TWO_CORES.training_flops
    assert Hardware.nvidia(2).training_flops == 2 * Hardware.nvidia().training_flops
    assert Hardware.here().training_flops > 0


def test_estimating_needs_no_torch():
    code = (
        "import sys, json; from tunegate.training.estimate import *; from tunegate.training.config import *;"
        "s = ModelSize.of(ModelSpec()); estimate_sft(s, SFTSpec(), Hardware.here(), rows=9, mean_tokens=9);"
        "print(json.dumps([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]))"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []


def test_the_plan_follows_the_last_stage_and_the_processes():
    from tunegate.config import build_spec, profile_mapping
    from tunegate.stages.plan import make_plan

    def ppo(**layer):
        plan = make_plan(build_spec(profile_mapping("demo"), layer))
        return next(stage for stage in plan.stages if stage.stage == "ppo")

    alone, grpo, dpo = ppo(), ppo(last_stage="grpo", ppo={"group_size": 4}), ppo(last_stage="dpo")
    assert grpo.seconds > 2 * alone.seconds  # four responses to each prompt
    assert grpo.what.startswith("GRPO: ") and dpo.what.startswith("DPO: ")
    assert ppo(distributed={"processes": 3}).memory_bytes == 3 * alone.memory_bytes


def test_memory_is_within_a_fifth_of_what_every_method_took():
    """Peaks that `benchmarks/training/memory.py` measured (SmolLM2-135M, bf16, two cores)."""
    folder = Path(__file__).parents[3] / "benchmarks" / "training"
    place = importlib.util.spec_from_file_location("memory_benchmark", folder / "memory.py")
    assert place is not None and place.loader is not None
    benchmark = importlib.util.module_from_spec(place)
    place.loader.exec_module(benchmark)
    measured = json.loads((folder / "results" / "memory.json").read_text())["cases"]
    assert set(measured) == set(benchmark.CASES)
    ratios = {case: benchmark.estimated(case, SMOL, TWO_CORES) / measured[case]["measured"] for case in measured}
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios
