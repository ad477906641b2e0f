from pathlib import Path

from tunegate.data import DataSpec, ingest, read_records, validate
from tunegate.observer import NullObserver


def test_starter_data_goes_through_the_gate(tmp_path: Path) -> None:
    spec = DataSpec(
        sft=["starter:sft.jsonl", "starter:safety.jsonl", "starter:lookalike.jsonl"],
        preferences=["starter:preferences.jsonl"],
        evaluation=["starter:evaluation.jsonl"],
    )
    raw, clean = tmp_path / "raw", tmp_path / "clean"
    ingest(spec, raw, base_dir=tmp_path, seed=1, observer=NullObserver())
    result = validate(
        raw,
        spec,
        tokenizer=None,
        clean=clean,
        quarantine=tmp_path / "quarantine",
        report=tmp_path / "report.html",
        seed=1,
        observer=NullObserver(),
    )
    assert result.verdict == "PROMOTE", result.reasons
    train, heldout = read_records(clean, "sft", "train"), read_records(clean, "sft", "heldout")
    assert len(train) > len(heldout) > 0
    assert {r.split for r in read_records(clean, "evaluation")} == {"heldout"}
    assert read_records(clean, "ratings") and read_records(clean, "prompts", "train")
