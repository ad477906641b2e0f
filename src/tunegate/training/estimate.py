"""How long the training stages take and what memory and disk they need, before anything is started.

Time follows from floating-point operations: a forward pass costs about 2 N a token for N parameters, a training step
(forward and backward) 6 N (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); a backward pass that needs no weight
gradients costs 2 N instead of 4 N. Generation a token at a time is limited by memory, not arithmetic, and has a rate of
its own. The rates of CPUs were measured with SmolLM2-135M; those of GPUs are deliberately cautious.

Only the standard library and the spec are imported, so that a plan is made at once.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from tunegate.training.config import BUNDLED_MODEL, TINY_MODEL, ModelSpec, RewardSpec, SFTSpec, Trunk
from tunegate.training.dpo_config import DPOSpec
from tunegate.training.ppo_config import PPOSpec

_PROCESS_BYTES = 800 << 20  # Python with torch and transformers, and freed memory that is kept for the next step
_LOADING_SECONDS = 6.0  # imports, reading weights, saving
# A token, layer and unit of hidden width, kept for the backward pass of a Llama layer in bf16: by autograd, and where
# the gradient is in closed form (see `layer`).
_ACTIVATION_BYTES, _CLOSED_FORM_BYTES = 54, 24
_SCORING_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What of a model determines time and memory."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelSize | None:
        """The size of the spec's model; None if it is neither here nor known (a Hub id, S3)."""
        if spec.source == BUNDLED_MODEL:
            return cls(134_515_008, 30, 576, 49_152)
        if spec.source == TINY_MODEL:
            return cls(130_000, 2, 64, 600)
        file = Path(spec.source).expanduser() / "config.json"
        return cls.of_config(json.loads(file.read_text())) if file.is_file() else None

    @classmethod
    def of_config(cls, config: dict[str, int]) -> ModelSize:
        """From a Hugging Face `config.json` of a Llama-like model: attention, gated MLP, embeddings."""
        layers, hidden, vocabulary = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or hidden // heads
        groups = config.get("num_key_value_heads") or heads
        attention = hidden * width * (2 * heads + 2 * groups)
        mlp = 3 * hidden * (config.get("intermediate_size") or 4 * hidden)
        embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return cls(layers * (attention + mlp + 2 * hidden) + embeddings + hidden, layers, hidden, vocabulary)

    @property
    def trunk_parameters(self) -> int:
        """Without the embeddings."""
        return max(0, self.parameters - self.vocabulary * self.hidden)


@dataclass(frozen=True, slots=True)
class Hardware:
    """Rates of the machine that a stage runs on.

    Attributes:
        name: For display.
        training_flops: Floating-point operations a second in training and scoring.
        generated_bytes: Bytes of weights times rows that decoding gets through a second: parameters x 2 bytes x tokens.
        bf16: Whether weights are stored in two bytes.
        gpu: Whether activations and weights live on a GPU.
    """

    name: str
    training_flops: float
    generated_bytes: float
    bf16: bool
    gpu: bool = False

    @classmethod
    def cpu(cls, cores: int, *, bf16: bool) -> Hardware:
        """A CPU; measured on two cores: 360 bf16 (AMX) or 200 fp32 training tokens/s, 220 generated tokens/s, of 135M.

        More cores help less than proportionally: memory is shared.
        """
        scale = (cores / 2) ** 0.8
        tokens = 360 if bf16 else 200
        rate = 2 * 134_515_008 * (220 if bf16 else 120)
        return cls(f"{cores} CPU cores", 6 * 134_515_008 * tokens * scale, rate * scale, bf16)

    @classmethod
    def nvidia(cls, count: int = 1) -> Hardware:
        """Data-centre GPUs, cautiously: 60 TFLOP/s in training and 3,000 generated tokens/s of a 1B model, each."""
        return cls(f"{count} GPU", 60e12 * count, 2e9 * 3000 * count, bf16=True, gpu=True)

    @classmethod
    def here(cls) -> Hardware:
        """This machine's CPU, by its core count and the flags that Linux lists."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        flags = ""
        if platform.system() == "Linux":
            flags = Path("/proc/cpuinfo").read_text(errors="replace")
        return cls.cpu(cores, bf16="amx_bf16" in flags or "avx512_bf16" in flags)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a stage needs.

    Attributes:
        seconds: Wall-clock time.
        memory_bytes: Largest resident memory (of the GPU, on one).
        disk_bytes: Model and checkpoints.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate_sft(
    size: ModelSize, spec: SFTSpec, hardware: Hardware, *, rows: int, mean_tokens: float, heldout_rows: int = 0
) -> Estimate:
    """Supervised fine-tuning.

    Args:
        size: Of the model.
        spec: The `sft` section.
        hardware: Rates.
        rows: Training conversations.
        mean_tokens: Their mean length.
        heldout_rows: Conversations that the held-out loss is measured on.
    """
    tokens = mean_tokens * rows * spec.epochs
    steps = tokens / (spec.batch_tokens or spec.batch_size * mean_tokens) if mean_tokens else 0.0
    if spec.max_steps is not None and steps > spec.max_steps:
        tokens, steps = tokens * spec.max_steps / steps, float(spec.max_steps)
    measured = min(heldout_rows, spec.evaluate_rows)
    measurements = steps / spec.evaluate_every if spec.evaluate_every else float(spec.epochs)
    scored = (2 * heldout_rows + measurements * measured) * mean_tokens
    if not spec.enabled:
        tokens, scored = 0.0, heldout_rows * mean_tokens
    cost = _training_cost(size, "lora" if spec.method == "lora" else "full", spec.gradient_checkpointing)
    return Estimate(
        _LOADING_SECONDS + (tokens * cost + scored * 2 * size.parameters) / hardware.training_flops,
        _training_memory(
            size, hardware, "lora" if spec.method == "lora" else "full", spec.lora.rank,
            _microbatch(spec.microbatch_tokens, hardware), spec.gradient_checkpointing,
        ),
        _disk(size, hardware, spec.method == "full", spec.keep_checkpoints),
    )  # fmt: skip


def estimate_reward(
    size: ModelSize,
    spec: RewardSpec,
    hardware: Hardware,
    *,
    pairs: int,
    ratings: int,
    mean_tokens: float,
    heldout_pairs: int = 0,
) -> Estimate:
    """Reward model, and the judge if there is one.

    Args:
        size: Of the model.
        spec: The `reward` section.
        hardware: Rates.
        pairs: Training preferences.
        ratings: Training ratings of responses that are in no pair.
        mean_tokens: Mean length of a prompt with one response.
        heldout_pairs: Preferences to measure on.
    """
    shared = 1.7  # a pair's prompt goes through the model once
    used_pairs = 0 if spec.objective == "pointwise" else pairs
    used_ratings = 0 if spec.objective == "pairwise" else ratings
    items = used_pairs + used_ratings
    tokens = (used_pairs * shared + used_ratings) * mean_tokens
    share = 1.0
    if spec.max_steps is not None and items:
        share = min(1.0, spec.max_steps * spec.batch_pairs / (items * spec.epochs))

    def seconds(trunk: Trunk, probe: bool) -> float:
        forward = 2 * size.parameters
        work = heldout_pairs * shared * mean_tokens * forward
        if trunk == "frozen":
            work += tokens * forward
        else:
            work += tokens * spec.epochs * share * _training_cost(size, trunk, spec.gradient_checkpointing)
            work += min(1.0, 512 / max(1, items)) * tokens * forward  # scores for the normalisation
            work += tokens * forward if probe else 0.0
        return _LOADING_SECONDS + work / hardware.training_flops

    total = spec.ensemble * seconds(spec.trunk, spec.probe_first) + (
        seconds(spec.judge.trunk, spec.probe_first) if spec.judge.enabled else 0.0
    )
    budget = _microbatch(spec.microbatch_tokens, hardware)
    trunks = [spec.trunk, *([spec.judge.trunk] if spec.judge.enabled else [])]
    memory = max(
        _training_memory(size, hardware, trunk, spec.lora.rank, budget, spec.gradient_checkpointing) for trunk in trunks
    )
    return Estimate(total, memory, len(trunks) * _disk(size, hardware, spec.trunk == "full", spec.keep_checkpoints))


def estimate_ppo(
    size: ModelSize,
    spec: PPOSpec,
    hardware: Hardware,
    *,
    mean_prompt_tokens: float,
    mean_response_tokens: float | None = None,
    heldout_prompts: int = 0,
) -> Estimate:
    """PPO: generation, scoring, update, and evaluations on held-out prompts.

    Args:
        size: Of the policy; the reward model has the same.
        spec: The `ppo` section.
        hardware: Rates.
        mean_prompt_tokens: Mean length of a prompt.
        mean_response_tokens: Mean length of a response; unset means 0.6 of the limit.
        heldout_prompts: Prompts to evaluate on.
    """
    if not spec.enabled:
        return Estimate(_LOADING_SECONDS, _PROCESS_BYTES, _disk(size, hardware, False, 0))
    response = mean_response_tokens or 0.6 * spec.max_new_tokens
    row = mean_prompt_tokens + response
    forward = 2 * size.parameters
    evaluations = 1 + spec.steps / spec.evaluate_every
    evaluated = evaluations * min(heldout_prompts, spec.evaluate_prompts)
    rollouts = spec.steps * spec.responses_per_update + spec.shaping.standardise_prompts
    generated = (rollouts + evaluated) * response * size.parameters * 2 / hardware.generated_bytes
    # Reference (with the stem) and reward model read every row; evaluations need policy, reference and reward.
    scored = (rollouts * 2 + evaluated * 3) * row * forward
    # Adapters: forward and backward (without weight gradients) through the layers that have some.
    update = (spec.adapted_layers * 2 if spec.method == "lora" else 3) * forward
    separate = spec.critic == "separate" and not spec.grouped
    critic = 3 * forward if separate else 0.0
    updated = spec.steps * spec.responses_per_update * row * spec.epochs * (update + critic)
    if separate:
        updated += spec.critic_warmup_epochs * spec.shaping.standardise_prompts * row * critic
    full = spec.method == "full"
    memory = _training_memory(
        size, hardware, "full" if full else "lora", spec.lora.rank, spec.microbatch_tokens, spec.gradient_checkpointing,
        adapted_share=1.0 if full else spec.adapted_layers,
    )  # fmt: skip
    memory += size.parameters * _weight_bytes(hardware) * (2 if full else 1)  # reward model, reference
    if separate:
        memory += size.parameters * 18
        whole = spec.responses_per_update * row
        if spec.minibatches == 1 and whole <= spec.microbatch_tokens:  # the critic's first pass waits for the policy's
            memory += _activations(size, hardware, "full", int(whole), spec.gradient_checkpointing)
    return Estimate(
        2 * _LOADING_SECONDS + generated + (scored + updated) / hardware.training_flops,
        memory,
        _disk(size, hardware, full, spec.keep_checkpoints),
    )


def estimate_dpo(
    size: ModelSize,
    spec: DPOSpec,
    hardware: Hardware,
    *,
    pairs: int,
    mean_tokens: float,
    mean_prompt_tokens: float,
    heldout_pairs: int = 0,
    heldout_prompts: int = 0,
) -> Estimate:
    """DPO: the reference once, training, and held-out answers before and after.

    Args:
        size: Of the policy; the reward model has the same.
        spec: The `dpo` section.
        hardware: Rates.
        pairs: Training preferences.
        mean_tokens: Mean length of a prompt with one response.
        mean_prompt_tokens: Mean length of a held-out prompt.
        heldout_pairs: Preferences to measure on.
        heldout_prompts: Prompts to answer.
    """
    forward = 2 * size.parameters
    steps = pairs * spec.epochs / spec.batch_pairs
    share = min(1.0, spec.max_steps / steps) if spec.max_steps is not None and steps else 1.0
    trained = 2 * pairs * spec.epochs * share * mean_tokens * int(spec.enabled)
    measured = min(heldout_pairs, spec.evaluate_pairs) * (spec.epochs + 2)
    scored = 2 * (pairs + measured) * mean_tokens * forward
    answers = 2 * min(heldout_prompts, spec.evaluate_prompts)
    response = 0.6 * spec.max_new_tokens
    generated = answers * response * size.parameters * 2 / hardware.generated_bytes
    scored += answers * 3 * (mean_prompt_tokens + response) * forward
    full = spec.method == "full"
    trunk: Trunk = "full" if full else "lora"
    work = trained * _training_cost(size, trunk, spec.gradient_checkpointing) + scored
    budget = _microbatch(spec.microbatch_tokens, hardware)
    memory = _training_memory(size, hardware, trunk, spec.lora.rank, budget, spec.gradient_checkpointing)
    memory += size.parameters * _weight_bytes(hardware) * (2 if full else 1)  # reward model, reference
    return Estimate(
        2 * _LOADING_SECONDS + generated + work / hardware.training_flops,
        memory,
        _disk(size, hardware, full, spec.keep_checkpoints),
    )


def _weight_bytes(hardware: Hardware) -> int:
    return 2 if hardware.bf16 else 4


def _microbatch(asked: int | None, hardware: Hardware) -> int:
    return asked or (16_384 if hardware.gpu else 1024)


def _training_cost(size: ModelSize, trunk: Trunk, recompute: bool) -> float:
    """Floating-point operations a token of a training step."""
    forward = 2.0 * size.parameters
    backward = forward if trunk == "lora" else 2 * forward
    return forward + backward + (forward if recompute else 0.0)


def _training_memory(
    size: ModelSize,
    hardware: Hardware,
    trunk: Trunk,
    rank: int,
    microbatch: int,
    recompute: bool,
    *,
    adapted_share: float = 1.0,
) -> int:
    """Bytes at the peak of a step: weights, fp32 masters, gradients and moments, activations.

    `adapted_share` is the share of the layers, from the top, that gradients flow through.
    """
    base = 0 if hardware.gpu else _PROCESS_BYTES
    weights = size.parameters * _weight_bytes(hardware)
    if trunk == "frozen":
        transient = _SCORING_TOKENS * size.hidden * 16
        return base + weights + transient
    # An adapter of a square matrix has 2 r h numbers; a layer has about eight matrices, the MLP's being wider.
    trained = size.parameters if trunk == "full" else size.layers * 24 * rank * size.hidden
    # In bf16: master, two moments, gradient; in fp32 the weight is its own master.
    optimizer = trained * (16 if hardware.bf16 else 12)
    activations = _activations(size, hardware, trunk, microbatch, recompute, adapted_share)
    head = size.vocabulary * size.hidden * 8 + (64 << 20)
    return base + weights + optimizer + activations + head


def _activations(
    size: ModelSize, hardware: Hardware, trunk: Trunk, tokens: int, recompute: bool, adapted_share: float = 1.0
) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    layers = 2 if recompute else adapted_share * size.layers
    kept = _CLOSED_FORM_BYTES if trunk == "full" and not hardware.gpu else _ACTIVATION_BYTES
    each = layers * kept + (size.layers * 2 if recompute else 0)
    return int(tokens * size.hidden * each) * (1 if hardware.bf16 else 2)


def _disk(size: ModelSize, hardware: Hardware, full: bool, checkpoints: int) -> int:
    """The saved model and its checkpoints (fp32 masters and two moments)."""
    one = size.parameters * 12 if full else size.parameters // 10
    return size.parameters * _weight_bytes(hardware) + checkpoints * one
