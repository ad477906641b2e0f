"""Characters that do not belong in text, and chat-template markers that would forge turns."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from tunegate.data.checks.base import Batch, findings, first_per_row

# Tab, line feed and carriage return are text; U+0085 is a line break of old mainframes and counts as a control.
_CONTROLS = "[\\x00-\\x08\\x0B\\x0C\\x0E-\\x1F\\x7F-\\x{9F}]"
# Bidirectional overrides and isolates can make text read differently from what the model sees (CVE-2021-42574);
# U+E0000 tags are invisible and carry whole hidden messages.
_BIDI = "[\\x{202A}-\\x{202E}\\x{2066}-\\x{2069}]"
_TAGS = "[\\x{E0000}-\\x{E007F}]"
_NONCHARACTERS = "[\\x{FDD0}-\\x{FDEF}\\x{FFFE}\\x{FFFF}]"
_ANY = f"{_CONTROLS}|{_BIDI}|{_TAGS}|{_NONCHARACTERS}|\ufffd"

TEMPLATE_MARKERS: tuple[str, ...] = (
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|endoftext|>",
    "<|endofprompt|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "\n\nHuman:",
    "\n\nAssistant:",
)
"""Markers of the chat templates in common use (ChatML, Llama 2 and 3, Gemma, Command R, Phi, harmony, HH-RLHF)."""


def check_characters(batch: Batch, *, max_replacement: int) -> pl.DataFrame:
    """Control, bidirectional-override, tag and non-characters, and many replacement characters."""
    turns = batch.turns.filter(pl.col("content").str.contains(_ANY))
    if turns.is_empty():
        return findings()
    rules = (
        (_CONTROLS, 0, "control_character", "{} has {} control characters"),
        (_BIDI, 0, "bidirectional_control", "{} has {} bidirectional controls"),
        (_TAGS, 0, "hidden_tag", "{} has {} invisible tag characters"),
        (_NONCHARACTERS, 0, "noncharacter", "{} has {} code points that are no characters"),
        ("\ufffd", max_replacement, "replacement_character", "{} has {} replacement characters: decoded wrongly"),
    )
    found = []
    for pattern, allowed, code, detail in rules:
        hits = turns.filter(pl.col("content").str.contains(pattern)).with_columns(
            n=pl.col("content").str.count_matches(pattern)
        )
        found.append(
            hits.filter(pl.col("n") > allowed).select("row", code=pl.lit(code), detail=pl.format(detail, "place", "n"))
        )
    return first_per_row(findings(pl.concat(found)))


def check_template_tokens(batch: Batch, *, markers: Sequence[str]) -> pl.DataFrame:
    """Content that holds a chat-template marker, of a known template or of the model's own tokenizer."""
    turns = batch.turns.filter(pl.col("content").str.contains_any(list(markers)))
    if turns.is_empty():
        return findings()
    hits = turns.with_columns(hit=pl.col("content").str.extract_many(list(markers)).list.first())
    return first_per_row(
        findings(
            hits.select(
                "row",
                code=pl.lit("template_token"),
                detail=pl.format("{} holds the marker {}", "place", pl.col("hit").str.strip_chars()),
            )
        )
    )
