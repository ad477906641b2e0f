"""`tunegate data mix|validate|stats|inspect`, and what they show."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import GOOD, jsonl, run_ingest
from typer.testing import CliRunner

from tunegate.cli import data as _  # noqa: F401  (registers its commands)
from tunegate.cli.app import app
from tunegate.data.overview import dataset_stats, sample_rows
from tunegate.errors import DataError, SpecError, TunegateError


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {n} squared?", "response": f"It is {n * n}."} for n in range(10, 50)]
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "t.jsonl").write_bytes(
        jsonl([{"prompt": f"What is {n} cubed?", "response": f"It is {n**3}."} for n in range(4)]) + b"{oops\n"
    )
    path = tmp_path / "spec.yaml"
    path.write_text("data:\n  sft: [s.jsonl, t.jsonl]\n  checks:\n    near_duplicates: {enabled: false}\n")
    return path


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(result.exception, TunegateError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_mix_writes_a_dataset_and_says_what_each_source_gives(spec: Path, tmp_path: Path) -> None:
    settings = ("--set", "data.mixture.strategy=fixed", "--set", "data.mixture.total=20")
    shown = call("mix", spec, *settings, "--out", tmp_path / "raw")
    assert "not_json 1" in shown and "prompts:" in shown
    summary = json.loads(call("mix", spec, *settings, "--out", tmp_path / "raw", "--json"))
    sources = {source["name"]: source for source in summary["sources"]}
    assert sources["t"]["quarantined"] == 1
    seen = sum(s["epochs"] * s["records"]["train"] for s in sources.values())
    assert seen == pytest.approx(20) and sources["t"]["epochs"] > sources["s"]["epochs"]
    assert {s.source: s.seen for s in dataset_stats(tmp_path / "raw") if s.kind == "sft"} == {
        name: round(s["epochs"] * s["records"]["train"]) for name, s in sources.items()
    }


def test_validate_mixes_and_checks(spec: Path, tmp_path: Path) -> None:
    shown = call("validate", spec, "--out", tmp_path / "out")
    assert "PROMOTE: training may start" in shown and "structure" in shown
    assert (tmp_path / "out" / "clean" / "sft.parquet").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_dataset_can_be_checked_by_other_rules_and_five_says_invalid(spec: Path, tmp_path: Path) -> None:
    call("mix", spec, "--out", tmp_path / "raw")
    rules = ("--set", "data.checks.near_duplicates.enabled=false", "--set", "data.checks.enough.min_rows={sft: 1000}")
    shown = call("validate", "--dataset", tmp_path / "raw", *rules, "--out", tmp_path / "out", code=5)
    assert "enough: 44 sft rows are left, at least 1000 are wanted" in shown
    report = json.loads(
        call("validate", "--dataset", tmp_path / "raw", *rules, "--out", tmp_path / "out", "--json", code=5)
    )
    assert report["verdict"] == "INVALID" and report["rows"]["sft"]["rows_in"] == 44


def test_validate_counts_tokens_when_it_is_given_a_tokenizer(spec: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "model").mkdir()
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    options = ("--tokenizer", tmp_path / "model", "--out", tmp_path / "out", "--json")
    report = json.loads(call("validate", spec, *options))
    lengths = next(check for check in report["checks"] if check["check"] == "lengths")
    assert lengths["verdict"] == "pass" and lengths["figures"]["longest sft response"] == 4


@pytest.mark.parametrize(
    ("text", "message", "error"),
    [
        ("data: {sft: [missing.jsonl]}", "no such file", DataError),
        ("data: {sfft: []}", "unknown key", SpecError),
        ("data: [", "YAML", SpecError),
        ("5", "mapping", SpecError),
    ],
)
def test_a_mistake_is_one_error_with_its_key(
    text: str, message: str, error: type[TunegateError], tmp_path: Path
) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(error, match=message) as caught:
        call("validate", tmp_path / "spec.yaml", "--out", tmp_path / "out")
    assert caught.value.key and caught.value.exit_code == 2


def test_stats_and_inspect_show_what_is_there(spec: Path, tmp_path: Path) -> None:
    call("mix", spec, "--out", tmp_path / "raw")
    assert "sft" in call("stats", tmp_path / "raw")
    stats = json.loads(call("stats", tmp_path / "raw", "--json"))
    assert {(s["kind"], s["source"]): s["rows"] for s in stats if s["kind"] == "sft"} == {
        ("sft", "s"): 40,
        ("sft", "t"): 4,
    }
    rows = [json.loads(line) for line in call("inspect", tmp_path / "raw", "--source", "t", "-n", 9).splitlines()]
    assert [row["source"] for row in rows] == ["t"] * 4
    bad = [json.loads(line) for line in call("inspect", tmp_path / "raw" / "quarantine.parquet").splitlines()]
    assert [row["line"] for row in bad] == [5]
    file = tmp_path / "raw" / "quarantine.parquet"
    assert call("inspect", file, "--reason", "not_json") and not call("inspect", file, "--reason", "toxic")
    assert len(call("inspect", tmp_path / "raw" / "sft.parquet", "-n", 2).splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stats", "{}"), r"no sft\.parquet"),
        (("inspect", "{}"), r"no sft\.parquet"),
        (("inspect", "{}", "--kind", "chats"), "no such kind"),
        (("inspect", "{}/none.parquet"), "cannot be read"),
    ],
)
def test_what_is_no_dataset_is_named(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(TunegateError, match=message):
        call(*(argument.format(tmp_path) for argument in arguments))


def test_stats_count_by_kind_and_source(tmp_path: Path) -> None:
    for kind, row in GOOD.items():
        (tmp_path / f"{kind}.jsonl").write_bytes(jsonl([row]))
    raw, summary = run_ingest(tmp_path, {kind: [f"{kind}.jsonl"] for kind in GOOD})
    stats = {s.kind: s for s in dataset_stats(raw)}
    assert {kind: (s.train, s.heldout) for kind, s in stats.items()} == {
        kind: (n.train, n.heldout) for kind, n in summary.rows.items()
    }
    pair = GOOD["preferences"]
    assert stats["preferences"].prompt_characters == len(pair["prompt"])
    assert stats["preferences"].response_characters == (len(pair["chosen"]) + len(pair["rejected"])) / 2
    assert stats["sft"].prompt_characters == len(GOOD["sft"]["messages"][0]["content"])
    assert stats["evaluation"].tags == {"everyday": 1} and stats["prompts"].tags == {"train": 1}
    assert [row["id"] for row in sample_rows(raw, "sft", 5)] == [sample_rows(raw, "sft", 1)[0]["id"]]
    with pytest.raises(DataError, match=r"no sft\.parquet"):
        sample_rows(tmp_path, "sft", 1)
