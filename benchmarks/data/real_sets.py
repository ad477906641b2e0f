"""What the data gate finds in public sets: runs it on each and writes docs/data_findings.md.

    make data-findings

The sets are not part of the repository; `TUNEGATE_SHARED_DATA` names their folder (default: ../shared/data).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tunegate.data import DataSpec, IngestSummary, ValidationReport, ingest, validate
from tunegate.data.checks.base import wilson
from tunegate.observer import NullObserver

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TUNEGATE_SHARED_DATA", ROOT.parent / "shared" / "data"))
PAGE = ROOT / "docs" / "data_findings.md"
SEED = 0

PROMPT_SETS = [
    {"uri": "xstest/xstest_prompts.csv", "name": "XSTest", "tag": "lookalike"},
    {
        "uri": "jailbreakbench/jailbreakbench.csv",
        "name": "JailbreakBench",
        "fields": {"prompt": "Goal"},
        "tag": "harmful",
    },
    {"uri": "advbench/advbench.csv", "name": "AdvBench", "fields": {"prompt": "goal"}, "tag": "harmful"},
    {
        "uri": "bbq/*.jsonl",
        "name": "BBQ (age, religion)",
        "fields": {"instruction": "context", "input": "question"},
        "tag": "everyday",
    },
]

SPECS: dict[str, dict[str, Any]] = {
    "HH-RLHF": {
        "preferences": [
            {"uri": "hh-rlhf/helpful-base.test.jsonl.gz", "name": "hh-rlhf helpful-base (test)"},
            {"uri": "hh-rlhf/harmless-base.test.jsonl.gz", "name": "hh-rlhf harmless-base (test)"},
        ],
        "evaluation": PROMPT_SETS,
    },
    "the others": {
        "sft": [
            {"uri": "rasbt-instruct/instruction-data.json", "name": "rasbt instruction-data"},
            {
                "uri": "self-instruct/seed_tasks.jsonl",
                "name": "self-instruct seed tasks",
                "fields": {"input": "instances.0.input", "output": "instances.0.output"},
            },
        ],
        "preferences": [
            {"uri": "rasbt-instruct/instruction-data-with-preference.json", "name": "rasbt with preferences"}
        ],
        "ratings": [
            {
                "uri": "unieval-human-scores/topical_chat.json",
                "name": "UniEval Topical-Chat (overall)",
                "fields": {"prompt": "source", "response": "system_output", "score": "scores.overall"},
            }
        ],
        "prompts": [{"uri": "openai-moderation/samples-1680.jsonl.gz", "name": "OpenAI moderation"}],
        "evaluation": PROMPT_SETS,
    },
}


def run(spec: dict[str, Any], folder: Path) -> tuple[IngestSummary, ValidationReport, list[dict[str, Any]]]:
    """Mix and check; also the quarantined rows."""
    import pyarrow.parquet as pq

    checked = DataSpec.model_validate(spec)
    summary = ingest(checked, folder / "raw", base_dir=DATA, seed=SEED, observer=NullObserver())
    report = validate(
        folder / "raw",
        checked,
        tokenizer=None,
        clean=folder / "clean",
        quarantine=folder / "quarantine",
        report=folder / "report.html",
        seed=SEED,
        observer=NullObserver(),
    )
    return summary, report, pq.read_table(folder / "quarantine" / "quarantine.parquet").to_pylist()


def found_table(name: str, spec: dict[str, Any], folder: Path) -> list[str]:
    """A line for each source: rows, what was refused at reading, what the gate found."""
    summary, report, bad = run(spec, folder)
    by_source: dict[tuple[str, str], Counter[str]] = {}
    for row in bad:
        codes = {reason["code"] for reason in row["reasons"]}
        by_source.setdefault((row["kind"], row["source"]), Counter()).update(codes)
    lines = [
        f"### {name}: {report.verdict}",
        "",
        "| set | as | rows | refused when read | quarantined by the gate | longer answer chosen |",
        "|---|---|---:|---|---|---|",
    ]
    longer = report.check("length_bias").estimates
    for source in summary.sources:
        codes = by_source.get((source.kind, source.name), Counter())
        bias = longer.get(source.name) if source.kind == "preferences" else None
        share = f"{bias.estimate:.1%} [{bias.low:.1%}, {bias.high:.1%}]" if bias else ""
        lines.append(
            f"| {source.name} | {source.kind} | {source.rows_read:,} | {_counts(source.reasons)} | {_counts(codes)} "
            f"| {share} |"
        )
    if "prompts" in summary.derived:
        derived = Counter[str]()
        for (kind, _), codes in by_source.items():
            if kind == "prompts":
                derived.update(codes)
        lines.append(
            f"| (their prompts, for PPO) | prompts | {summary.rows['prompts'].total:,} | | {_counts(derived)} | |"
        )
    lines += ["", "Over all of them, reported or redacted, not quarantined: " + _reported(report) + ".", ""]
    return lines


def _counts(codes: Any) -> str:
    return ", ".join(f"{n} `{code}`" for code, n in sorted(codes.items(), key=lambda item: (-item[1], item[0]))) or "–"


def _reported(report: ValidationReport) -> str:
    privacy, toxic = report.check("privacy"), report.check("toxicity")
    languages = report.check("language").histograms["language"]
    shown = [f"{n} {label}" for label, n in zip(languages.labels, languages.counts, strict=True) if n]
    parts = [
        f"personal data in {privacy.flagged} of {privacy.seen:,} rows ({_counts(privacy.codes)})",
        f"{toxic.flagged} of a sample of {toxic.seen:,} responses probably toxic",
        f"languages of a sample: {', '.join(shown[:6])}" + (" and fewer of others" if len(shown) > 6 else ""),
    ]
    return "; ".join(parts)


def hh(name: str) -> list[dict[str, str]]:
    """The raw pairs."""
    with gzip.open(DATA / f"hh-rlhf/{name}-base.test.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def hh_facts() -> list[str]:
    """Figures of the raw files, by other means than the gate's."""

    def cut(transcript: str) -> tuple[str, str]:
        context, answer = transcript.rsplit("\n\nAssistant:", 1)
        return context, answer.strip()

    def letters(text: str) -> str:
        return re.sub(r"\W+", "", text.casefold())

    def pairs_of_words(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 2]) for i in range(len(words) - 1)}

    lines = [
        "| | helpful-base | harmless-base | both |",
        "|---|---:|---:|---:|",
    ]
    sets = {name: hh(name) for name in ("helpful", "harmless")}
    cuts = {name: [(cut(r["chosen"]), cut(r["rejected"])) for r in rows] for name, rows in sets.items()}
    rules = {
        "pairs": lambda c, r: True,
        "answers equal, character by character": lambda c, r: c[1] == r[1],
        "answers equal in their letters and digits": lambda c, r: letters(c[1]) == letters(r[1]),
        "answers of the same length": lambda c, r: len(c[1]) == len(r[1]),
        "one answer begins with the other, neither empty": lambda c, r: (
            bool(c[1] and r[1]) and (c[1].startswith(r[1]) or r[1].startswith(c[1]))
        ),
        "an answer is empty": lambda c, r: not c[1] or not r[1],
        "contexts differ, character by character": lambda c, r: c[0] != r[0],
        "contexts differ, case and white space aside": lambda c, r: _folded(c[0]) != _folded(r[0]),
    }
    for title, rule in rules.items():
        counts = [sum(rule(c, r) for c, r in cuts[name]) for name in sets]
        lines.append(f"| {title} | {counts[0]:,} | {counts[1]:,} | {sum(counts):,} |")
    alike = []
    for rows in sets.values():
        both = [(pairs_of_words(r["chosen"]), pairs_of_words(r["rejected"])) for r in rows]
        alike.append(sum(len(a & b) > 0.7 * len(a | b) for a, b in both))
    sizes = [len(rows) for rows in sets.values()]
    shares = [f"{n / size:.1%}" for n, size in zip([*alike, sum(alike)], [*sizes, sum(sizes)], strict=True)]
    lines.append(f"| transcripts more than 0.7 alike (Jaccard, pairs of words) | {' | '.join(shares)} |")
    longer = []
    for name in sets:
        lengths = [(len(c[1]), len(r[1])) for c, r in cuts[name]]
        w = wilson(sum(a > b for a, b in lengths), sum(a != b for a, b in lengths))
        longer.append(f"{w.estimate:.1%} [{w.low:.1%}, {w.high:.1%}]")
    lines.append(f"| longer answer chosen, of pairs of unequal length | {' | '.join(longer)} | |")
    return lines


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def main() -> int:
    """Write the page."""
    if not DATA.is_dir():
        print(f"the sets are not here: {DATA}; set TUNEGATE_SHARED_DATA to their folder", file=sys.stderr)
        return 2
    lines = [
        "# What the data gate finds in public sets",
        "",
        "Written by `make data-findings` (`benchmarks/data/real_sets.py`), which runs `mix` and `validate` with their",
        "defaults on the sets in `TUNEGATE_SHARED_DATA`. Codes are explained in [data](data.md).",
        "",
        "## By the gate",
        "",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, spec) in enumerate(SPECS.items()):
            lines += found_table(name, spec, Path(folder) / str(number))
    lines += [
        "## HH-RLHF, counted directly",
        "",
        "The same files by a few lines of plain Python, to check the gate against. A context is what stands before the",
        "last `Assistant:` of a transcript, an answer what follows it.",
        "",
        *hh_facts(),
        "",
        "Two figures that are told of these files, 36 pairs with equal answers and 17 with differing contexts, were",
        "not found again: not by stripped or folded text, letters alone, sets or n-grams of words and characters, last",
        "turns, or other ways to cut a transcript. The files show what the table says.",
        "",
    ]
    PAGE.write_text("\n".join(lines))
    print(PAGE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
