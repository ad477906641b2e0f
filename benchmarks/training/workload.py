"""The work that both sides of a comparison are given, written once as files: models, tokens, order, sizes.

Tunegate reads the records; the peers read the ids that Tunegate's encoding made of them, in the order in which Tunegate
takes them, so that step k of either side is the same rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunegate.data import ingest, read_records
from tunegate.data.config import DataSpec
from tunegate.data.records import Conversation, Messages, Preference, Prompt
from tunegate.observer import NullObserver
from tunegate.training.batching import shuffled
from tunegate.training.chat import Chat
from tunegate.training.config import ModelSpec, SFTSpec
from tunegate.training.sft import plan_steps

SEED = 1
BATCH = 16
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Sizes:
    """Of the work.

    Attributes:
        sft_steps: Optimizer steps of SFT, the first of which is not timed; 16 conversations each.
        reward_steps: Likewise of the reward model; 16 pairs each.
        ppo_updates: Likewise of PPO.
        ppo_batch: Prompts an update.
        ppo_micro: Rows that go through the peer's model at once.
        prompt: Longest prompt (tokens).
        response: Longest response (tokens).
        max_length: Longest conversation, or prompt and response of a pair (tokens).
    """

    sft_steps: int = 11
    reward_steps: int = 5
    ppo_updates: int = 3
    ppo_batch: int = 16
    ppo_micro: int = 4
    prompt: int = 64
    response: int = 48
    max_length: int = 512


RANDOM_MODELS = {
    # Llama shapes with random weights, for machines that no model can be brought to: heads of 64, tied embeddings.
    "random-tiny": {"hidden_size": 64, "intermediate_size": 176, "layers": 2, "heads": 4, "kv_heads": 2},
    "random-135m": {"hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "kv_heads": 3},
    "random-0.5b": {"hidden_size": 1024, "intermediate_size": 4096, "layers": 28, "heads": 16, "kv_heads": 4},
    "random-1b": {"hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "heads": 32, "kv_heads": 8},
}
_VOCABULARY = 49_152


def prepare(work: Path, model: str, sizes: Sizes, shared_data: Path | None) -> None:
    """Write models and data under `work`.

    Args:
        work: Folder; what is there already is kept.
        model: `smollm2-135m-instruct`, or one of `RANDOM_MODELS`.
        sizes: Of the work.
        shared_data: Folder that holds `hh-rlhf`; None takes the starter's preferences.
    """
    work.mkdir(parents=True, exist_ok=True)
    dataset = _dataset(work / "data", shared_data)
    for precision in PRECISIONS:
        _policy(work / f"policy-{precision}", model, precision, dataset)
        _reward(work / f"reward-{precision}", work / f"policy-{precision}")
    chat = Chat.load(work / "policy-fp32")
    _write_sft(work, chat, dataset, sizes)
    _write_pairs(work, chat, dataset, sizes)
    _write_prompts(work, chat, dataset, sizes)
    (work / "sizes.json").write_text(json.dumps({"model": model, **asdict(sizes)}, indent=1) + "\n")


def _dataset(out: Path, shared_data: Path | None) -> Path:
    if (out / "summary.json").is_file():
        return out
    preferences = ["starter:preferences.jsonl"]
    if shared_data is not None:
        preferences = [str(path) for path in sorted((shared_data / "hh-rlhf").glob("*.jsonl.gz"))]
    spec = DataSpec(sft=["starter:sft.jsonl"], preferences=preferences)
    ingest(spec, out, base_dir=Path(), seed=SEED, observer=NullObserver())
    return out


def _policy(out: Path, model: str, precision: str, dataset: Path) -> None:
    from tunegate.training.models import resolve_model

    if (out / "config.json").is_file():
        return
    source = str(_random_model(out.parent / model, model, dataset)) if model in RANDOM_MODELS else model
    resolve_model(ModelSpec(source=source, precision=precision, max_length=2048), out, seed=SEED)


def _random_model(out: Path, name: str, dataset: Path) -> Path:
    """A Llama with random weights and the tokenizer of `tiny-random`, whose vocabulary is padded to 49,152 rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tunegate.training.models import resolve_model

    if (out / "config.json").is_file():
        return out
    texts = [m["content"] for c in read_records(dataset, "sft", "train") for m in c.messages]
    tiny = out.with_name(f"{out.name}-tokenizer")
    resolve_model(ModelSpec(source="tiny-random"), tiny, texts=texts, seed=SEED)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny))
    shape = RANDOM_MODELS[name]
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    (out / "generation_config.json").write_text((tiny / "generation_config.json").read_text())
    return out


def _reward(out: Path, policy: Path) -> None:
    """A reward model whose head is drawn like that of any reward model before training."""
    import torch

    from tunegate.training.models import init_score_head, load_sequence_scorer
    from tunegate.training.reward_model import RewardHead, RewardModel

    if (out / "config.json").is_file():
        return
    scorer = load_sequence_scorer(policy, device=torch.device("cpu"))
    init_score_head(scorer, seed=SEED)
    RewardModel(scorer, Chat.load(policy), RewardHead(max_length=1024)).save(out, like=policy)


def _write_sft(work: Path, chat: Chat, dataset: Path, sizes: Sizes) -> None:
    """`sft-records.json` for us, `sft.json` with ids, masks and their order for the peers."""
    wanted = sizes.sft_steps * BATCH
    records, rows = [], []
    conversations: list[Conversation] = list(read_records(dataset, "sft"))
    for number, record in enumerate(itertools.islice(itertools.cycle(conversations), 2 * wanted)):
        encoded = chat.fit(record.messages, sizes.max_length)
        if encoded is None or encoded.cut or encoded.dropped_turns:
            continue
        records.append({"id": f"{record.id}-{number}", "messages": record.messages})
        rows.append({"ids": encoded.ids, "mask": [int(said) for said in encoded.answer_mask]})
        if len(rows) == wanted:
            break
    spec = sft_spec(sizes)
    plan, _ = plan_steps(spec, [len(row["ids"]) for row in rows], SEED)
    _dump(work / "sft-records.json", records)
    _dump(work / "sft.json", [rows[index] for step in plan for index in step])


def _write_pairs(work: Path, chat: Chat, dataset: Path, sizes: Sizes) -> None:
    """`pairs-records.json` for us, `pairs.json` with ids in our order for the peers."""
    wanted = sizes.reward_steps * BATCH
    records, rows = [], []
    pairs: list[Preference] = list(read_records(dataset, "preferences", "train"))
    for number in shuffled(len(pairs), seed=SEED, epoch=0):
        pair = pairs[number]
        fitted = chat.fit_exchange(pair.prompt, [pair.chosen, pair.rejected], sizes.max_length)
        if fitted is None or fitted.cut or fitted.dropped_turns:
            continue
        records.append({"id": pair.id, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
        rows.append([fitted.prompt_ids, *fitted.response_ids])
        if len(records) == wanted:
            break
    order = shuffled(len(rows), seed=SEED, epoch=0)
    _dump(work / "pairs-records.json", records)
    _dump(
        work / "pairs.json",
        [{"prompt": rows[i][0], "chosen": rows[i][1], "rejected": rows[i][2]} for i in order],
    )


def _write_prompts(work: Path, chat: Chat, dataset: Path, sizes: Sizes) -> None:
    """`prompts-records.json` for us, `prompts.json` with ids for the peers."""
    # Two are held out, which the library asks for. The peer must not reach the end of its prompts: accelerate then ends
    # the accumulation of gradients with every microbatch, and the peer would step the optimizer four times as often.
    wanted = (sizes.ppo_updates + 1) * sizes.ppo_batch + 2
    records, rows = [], []
    for number, messages in enumerate(_prompts(chat, list(read_records(dataset, "prompts")), sizes.prompt)):
        records.append({"id": f"prompt-{number}", "messages": messages})
        rows.append(chat.prompt_ids(messages))
        if len(records) == wanted:
            break
    if len(records) < wanted:
        raise SystemExit(f"only {len(records)} prompts have at most {sizes.prompt} tokens, {wanted} are needed")
    _dump(work / "prompts-records.json", records)
    _dump(work / "prompts.json", rows[: wanted - 2])


def _prompts(chat: Chat, prompts: Sequence[Prompt], limit: int) -> Iterator[Messages]:
    """Prompts as they are where they are to be short; for long ones several requests are put into one message."""
    seen: set[str] = set()
    if limit <= 128:
        for prompt in prompts:
            key = json.dumps(prompt.messages)
            if key not in seen and len(chat.prompt_ids(prompt.messages)) <= limit:
                seen.add(key)
                yield prompt.messages
        return
    texts = [prompt.messages[-1]["content"] for prompt in prompts]
    for start in itertools.count():
        kept: Messages = []
        for length in range(1, len(texts)):
            joined = "\n".join(texts[(start * 7 + place) % len(texts)] for place in range(length))
            messages: Messages = [{"role": "user", "content": joined}]
            if len(chat.prompt_ids(messages)) > limit:
                break
            kept = messages
        if kept:
            yield kept


def sft_spec(sizes: Sizes, *, packing: bool = False) -> SFTSpec:
    """The `sft` section of the comparison: full fine-tuning, 16 conversations a step."""
    return SFTSpec(
        epochs=1,
        batch_size=BATCH,
        max_steps=sizes.sft_steps,
        max_length=sizes.max_length,
        learning_rate=2e-5,
        warmup=0.0,
        packing=packing,
    )


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shared-data", type=Path)
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args())
    sizes = Sizes(**{name: given[name] for name in asdict(Sizes())})
    prepare(given["work"], given["model"], sizes, given["shared_data"])


if __name__ == "__main__":
    main()
