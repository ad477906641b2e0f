"""Records that a tiny model can learn from, and the sizes of other tiny models."""

from __future__ import annotations

import random
from typing import Any

from tunegate.data.records import Conversation, Preference, Rating

TOPICS = ["bread", "rice", "a bicycle", "the moon", "tea", "a fence", "garlic", "a violin"]
GOOD = "Start with {0}. Then look at {0} again, and take your time."
BAD = "No idea about {0}, whatever."
SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_conversations(count: int, *, seed: int = 0, split: str = "train") -> list[Conversation]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        topic = draw.choice(TOPICS)
        messages = [{"role": "user", "content": f"What about {topic}?"}]
        if number % 3 == 2:
            messages += [
                {"role": "assistant", "content": f"Do you mean {topic}?"},
                {"role": "user", "content": "Yes, please " * draw.randint(1, 4)},
            ]
        messages.append({"role": "assistant", "content": GOOD.format(topic)})
        rows.append(Conversation(id=f"c{seed}-{number}", messages=messages, source="made", split=split))
    return rows


def make_preferences(count: int, *, seed: int = 0, split: str = "train") -> list[Preference]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        topic = draw.choice(TOPICS)
        rows.append(
            Preference(
                id=f"p{seed}-{number}",
                prompt=[{"role": "user", "content": f"What about {topic}?"}],
                chosen=GOOD.format(topic),
                rejected=BAD.format(topic),
                margin=0.5 if number % 2 else None,
                source="made" if number % 3 else "other",
                split=split,
            )
        )
    return rows


def make_ratings(count: int, *, seed: int = 0, split: str = "train") -> list[Rating]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        topic = draw.choice(TOPICS)
        good = draw.random() < 0.5
        rows.append(
            Rating(
                id=f"r{seed}-{number}",
                prompt=[{"role": "user", "content": f"What about {topic}?"}],
                response=(GOOD if good else BAD).format(topic),
                score=float(draw.choice([4, 5]) if good else draw.choice([1, 2])),
                source="made",
                split=split,
            )
        )
    return rows
