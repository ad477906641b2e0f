"""Token counts under the model's own tokenizer and chat template."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from tunegate.data.checks.base import Batch, Check, findings
from tunegate.data.config import LengthsCheck
from tunegate.data.records import Kind
from tunegate.data.results import Histogram
from tunegate.errors import ModelError

# Without a readable template: a role, two markers and a line break around a turn.
_FALLBACK_PER_TURN = 5
_ENCODE_ROWS = 512
_BINS = 40
# Steps of a tokenizer that leave at most one token a byte, and (NFC) at most three.
_HARMLESS = {"Prepend": 1, "Replace": 1, "Lowercase": 2, "NFC": 3}


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens of chats: those of the contents exactly, those of the template as measured on a sample chat."""

    tokenizer: Tokenizer
    digest: str
    special_tokens: tuple[str, ...]
    fixed: int
    """Tokens of the template that every chat has."""
    per_turn: int
    """Tokens of the template that every turn adds."""
    tokens_per_byte: int | None
    """No text has more tokens than this times its bytes, plus one; None when nothing is known."""

    @classmethod
    def load(cls, folder: Path) -> TokenCounter:
        """Read `tokenizer.json` and the chat template of a model or tokenizer folder.

        Raises:
            ModelError: There is no `tokenizer.json`, or it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                "the folder has no tokenizer.json",
                key=str(folder),
                fix="give the folder of a model saved by transformers with its fast tokenizer",
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"tokenizer.json cannot be read: {error}", key=str(path)) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        special = _turn_tokens(folder, tokenizer)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        fixed, per_turn = _template_cost(folder, tokenizer)
        return cls(tokenizer, digest, special, fixed, per_turn, _tokens_per_byte(path))

    def count(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text, without special tokens; shape [N], int64."""
        counts: list[int] = []
        for start in range(0, len(texts), _ENCODE_ROWS):
            encoded = self.tokenizer.encode_batch_fast(texts[start : start + _ENCODE_ROWS], add_special_tokens=False)
            counts.extend(len(e.ids) for e in encoded)
        return np.asarray(counts, dtype=np.int64)


def _turn_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens that can forge a turn: those of the chat template, and the beginning and end of text.

    Others (`<filename>` of code models, say) are words of instructions, too.
    """
    template = _chat_template(folder)
    named = set(_named_tokens(folder).values())
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    return tuple(sorted(t for t in special if template is None or t in template or t in named))


def _named_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like."""
    config = folder / "tokenizer_config.json"
    values: dict[str, Any] = json.loads(config.read_text()) if config.is_file() else {}
    return {name: value for name, value in values.items() if name.endswith("_token") and isinstance(value, str)}


def _tokens_per_byte(path: Path) -> int | None:
    """The bound of a tokenizer, from its normalizer: one that rewrites text may lengthen it without limit."""
    normalizer = json.loads(path.read_text()).get("normalizer")
    if normalizer is None:
        return 1
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if any(step["type"] not in _HARMLESS for step in steps):
        return None
    # A replacement by at most one character cannot add tokens.
    if any(step["type"] == "Replace" and len(step["content"]) > 1 for step in steps):
        return None
    return int(np.prod([_HARMLESS[step["type"]] for step in steps]))


def _template_cost(folder: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """(tokens a chat, tokens a turn) that the chat template adds, from rendering chats of one and two exchanges."""
    template = _chat_template(folder)
    if template is None:
        return 0, _FALLBACK_PER_TURN
    costs = []
    word = "word"
    for exchanges in (1, 2):
        turns = [{"role": role, "content": word} for _ in range(exchanges) for role in ("user", "assistant")]
        rendered = _render(template, turns, folder)
        if rendered is None:
            return 0, _FALLBACK_PER_TURN
        content = len(turns) * len(tokenizer.encode(word, add_special_tokens=False).ids)
        costs.append(len(tokenizer.encode(rendered, add_special_tokens=False).ids) - content)
    per_turn = max(0, round((costs[1] - costs[0]) / 2))
    return max(0, costs[0] - 2 * per_turn), per_turn


def _chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def _render(template: str, turns: list[dict[str, str]], folder: Path) -> str | None:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: ""
    try:
        return environment.from_string(template).render(
            messages=turns, add_generation_prompt=False, **_named_tokens(folder)
        )
    except TemplateError:
        return None


def _raise_template_error(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def tokens_of(batch: Batch, counter: TokenCounter) -> pl.DataFrame:
    """Tokens of each row: `row`, `prompt`, `response` (the longer one of a pair), `total` with the template."""
    turns = batch.turns.select("row", "part", tokens=pl.Series(counter.count(batch.turns["content"].to_list())))
    is_prompt = pl.col("part") == "prompt"
    return (
        turns.group_by("row", maintain_order=True)
        .agg(
            prompt=pl.col("tokens").filter(is_prompt).sum(),
            response=pl.col("tokens").filter(~is_prompt).max().fill_null(0),
            turns=is_prompt.sum() + (~is_prompt).any(),
        )
        .with_columns(total=pl.col("prompt") + pl.col("response") + counter.fixed + counter.per_turn * pl.col("turns"))
    )


def check_lengths(tokens: pl.DataFrame, *, max_tokens: int, max_response_tokens: int | None) -> pl.DataFrame:
    """Rows whose rendered chat, or whose response, is too long."""
    found = [
        tokens.filter(pl.col("total") > max_tokens).select(
            "row",
            code=pl.lit("too_many_tokens"),
            detail=pl.format("{} tokens, allowed are {}", "total", pl.lit(max_tokens)),
        )
    ]
    if max_response_tokens is not None:
        found.append(
            tokens.filter(pl.col("response") > max_response_tokens).select(
                "row",
                code=pl.lit("response_too_long"),
                detail=pl.format("the response has {} tokens, allowed are {}", "response", pl.lit(max_response_tokens)),
            )
        )
    return findings(pl.concat(found))


class Lengths(Check):
    """Rows with too many tokens, and the distribution of token counts.

    Counting is the dear part. A text has at most as many tokens as bytes (with the tokenizers for which that holds),
    so outside of an evenly spaced sample only rows whose bytes do not rule out that they are too long are counted.

    Args:
        spec: The limits.
        counter: The tokenizer; None: the check is skipped.
        rows: Rows of each kind, to space the sample.
    """

    own = ("_counter",)

    def __init__(self, spec: LengthsCheck, *, counter: TokenCounter | None, rows: Mapping[Kind, int]) -> None:
        super().__init__("lengths", spec)
        self._spec = spec
        self._counter = counter
        self._step = {kind: max(1, -(-n // spec.sample)) for kind, n in rows.items()}
        self._counts: dict[str, Counter[int]] = {}
        self._longest: dict[str, int] = {}
        if counter is None:
            self.skipped = "no tokenizer was given"
        else:
            self.figures["template_tokens_a_chat"] = counter.fixed
            self.figures["template_tokens_a_turn"] = counter.per_turn

    def observe(self, batch: Batch) -> None:
        """Count tokens."""
        if self._counter is None:
            return
        self.seen += batch.frame.height
        step = self._step[batch.kind]
        in_sample = pl.col("row") % step == 0
        must_count = batch.frame.select("row")
        if step > 1 and self._counter.tokens_per_byte is not None:
            limit = min(self._spec.max_tokens, self._spec.max_response_tokens or self._spec.max_tokens)
            bound = (
                pl.col("content").str.len_bytes().sum() * self._counter.tokens_per_byte
                + self._counter.fixed
                + (self._counter.per_turn + 1) * pl.len()
            )
            bounds = batch.turns.group_by("row").agg(bound=bound)
            must_count = bounds.filter(in_sample | (pl.col("bound") > limit)).select("row")
        part = batch.without(batch.frame["row"].filter(~batch.frame["row"].is_in(must_count["row"].implode())))
        tokens = tokens_of(part, self._counter)
        limits = {"max_tokens": self._spec.max_tokens, "max_response_tokens": self._spec.max_response_tokens}
        self.add(batch.kind, check_lengths(tokens, **limits))  # type: ignore[arg-type]
        for name in ("prompt", "response", "total"):
            sample = tokens.filter(in_sample & (pl.col(name) > 0))[name]
            self._counts.setdefault(f"{batch.kind} {name} tokens", Counter()).update(sample.to_list())
            longest = tokens[name].max()
            if isinstance(longest, int) and longest:
                key = f"longest {batch.kind} {name}"
                self._longest[key] = max(longest, self._longest.get(key, 0))

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        super().merge(other)
        for name, counts in other._counts.items():
            self._counts.setdefault(name, Counter()).update(counts)
        for name, longest in other._longest.items():
            self._longest[name] = max(longest, self._longest.get(name, 0))

    def finish(self) -> None:
        """Report the distributions."""
        self.figures.update(self._longest)
        for name, counts in self._counts.items():
            if counts:
                self.histograms[name] = _histogram(counts)
                self.figures[f"median {name}"] = float(np.median(np.fromiter(counts.elements(), np.int64)))


def _histogram(counts: Counter[int]) -> Histogram:
    width = max(1, -(-max(counts) // _BINS))
    bins = [0] * (max(counts) // width + 1)
    for tokens, n in counts.items():
        bins[tokens // width] += n
    return Histogram(edges=[float(i * width) for i in range(len(bins) + 1)], counts=bins)
