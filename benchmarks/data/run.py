"""How fast the data gate is, what memory it takes, and how it compares with Great Expectations and datasketch.

    make bench-data

Every measurement runs in a process of its own; memory is the peak of its resident set. Peers get the rows already
flattened and run in a virtual environment of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 20261122
SIZES = (100_000, 1_000_000)
NEAR_ROWS = 50_000
RECALL_ROWS = 20_000
PEERS = (
    "great_expectations==1.24.1",
    "pandera[polars]==0.35.0",
    "datasketch==2.0.0",
    "polars>=2.1,<3",
    "pyarrow>=20",
    "scipy",
)


def _measured(work: Callable[[], dict[str, Any]], rows: int) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    extra = work()
    seconds = time.perf_counter() - wall
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "rows_per_second": int(rows / seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **extra,
    }


def make(folder: Path, rows: int) -> dict[str, Any]:
    """The dataset folder, and the same rows flattened for the peers."""
    import polars as pl
    from synthetic import write_dataset

    truth = write_dataset(folder, rows, SEED)
    turn = pl.col("prompt").list.first().struct
    (
        pl.scan_parquet(folder / "preferences.parquet")
        .with_row_index("row")
        .select(
            "row",
            "id",
            "chosen",
            "rejected",
            "margin",
            "split",
            "repeats",
            prompt_role=turn.field("role"),
            prompt_content=turn.field("content"),
            scale_low=pl.col("scale").list.get(0),
            scale_high=pl.col("scale").list.get(1),
        )
        .sink_parquet(folder / "flat.parquet")
    )
    return {"faults": truth.counts}


def mix(folder: Path, rows: int) -> dict[str, Any]:
    """Read, convert, split and write JSON lines."""
    from synthetic import write_jsonl

    from tunegate.data import DataSpec, ingest
    from tunegate.observer import NullObserver

    source = folder / "rows.jsonl"
    write_jsonl(source, rows, SEED)
    spec = DataSpec.model_validate({"preferences": [str(source)], "prompts": []})

    def work() -> dict[str, Any]:
        summary = ingest(spec, folder / "mixed", base_dir=folder, seed=SEED, observer=NullObserver())
        return {"refused": summary.quarantined, "derived_prompts": summary.rows["prompts"].total}

    return _measured(work, rows)


def gate(folder: Path, rows: int) -> dict[str, Any]:
    """The whole validation with its defaults, its outputs included."""
    from tunegate.data import DataSpec, validate
    from tunegate.observer import NullObserver

    def work() -> dict[str, Any]:
        report = validate(
            folder,
            DataSpec(),
            tokenizer=None,
            clean=folder / "out" / "clean",
            quarantine=folder / "out" / "quarantine",
            report=folder / "out" / "report.html",
            seed=SEED,
            observer=NullObserver(),
        )
        kind = report.rows["preferences"]
        assert kind.rows_in == rows == kind.clean + kind.quarantined
        return {
            "verdict": report.verdict,
            "quarantined": kind.quarantined,
            "redacted": kind.redacted,
            "findings": {check.check: check.codes for check in report.checks if check.codes},
        }

    return _measured(work, rows)


def schema(folder: Path, rows: int) -> dict[str, Any]:
    """The schema rules alone: fields, ids, and that no text is empty."""
    from tunegate.data.checks.base import RowCheck, batches
    from tunegate.data.checks.duplicates import Repeated
    from tunegate.data.checks.fields import check_fields
    from tunegate.data.checks.structure import check_structure
    from tunegate.data.config import StructureCheck, TypesCheck

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            checks = [
                RowCheck("fields", TypesCheck(), check_fields),
                Repeated("ids", TypesCheck(), by="id", folder=Path(scratch)),
                RowCheck("structure", StructureCheck(), check_structure),
            ]
            for batch in batches(folder, "preferences"):
                broken = checks[0].rows_found(batch)
                sound = batch.without(broken) if broken.len() else batch
                for check in checks[1:]:
                    check.observe(sound)
            for check in checks:
                check.finish()
            found = {row for check in checks for part in check.found("preferences") for row in part["row"]}
        return {"found": sorted(found)}

    return _measured(work, rows)


def near(folder: Path, rows: int) -> dict[str, Any]:
    """Exact and near-duplicates alone, among the first rows."""
    import pyarrow.parquet as pq

    from tunegate.data.checks.base import Batch
    from tunegate.data.checks.duplicates import NearDuplicates, Repeated, banding
    from tunegate.data.config import ExactDuplicatesCheck, NearDuplicatesCheck

    spec = NearDuplicatesCheck()

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            exact = Repeated("exact_duplicates", ExactDuplicatesCheck(), by="text", folder=Path(scratch))
            check = NearDuplicates(spec, exact=exact, folder=Path(scratch))
            first = 0
            for part in pq.ParquetFile(folder / "preferences.parquet").iter_batches(batch_size=4096):
                table = part.slice(0, min(part.num_rows, rows - first))
                import pyarrow as pa

                batch = Batch("preferences", pa.Table.from_batches([table]), first)
                missing = batch.frame.filter(batch.frame["chosen"].is_null())["row"]
                batch = batch.without(missing) if missing.len() else batch
                exact.observe(batch)
                check.observe(batch)
                first += table.num_rows
                if first == rows:
                    break
            exact.finish()
            check.finish()
            found = {row for one in (exact, check) for part in one.found("preferences") for row in part["row"]}
        bands, width = banding(spec.threshold, spec.recall)
        return {"found": sorted(found), "bands": bands, "rows_a_band": width, "threshold": spec.threshold}

    return _measured(work, rows)


def brute(folder: Path, rows: int) -> dict[str, Any]:
    """All near-duplicates among the first rows, by comparing all with all."""
    import numpy as np
    import polars as pl
    from bruteforce import near_rows

    frame = pl.scan_parquet(folder / "flat.parquet").head(rows).collect()
    frame = frame.filter(pl.col("chosen").is_not_null())
    texts = frame.select(
        pl.col(name).str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
        for name in ("prompt_content", "chosen", "rejected")
    )

    def work() -> dict[str, Any]:
        found = near_rows([texts[name].to_list() for name in texts.columns], 0.8)
        return {"found": frame["row"].to_numpy()[np.flatnonzero(found)].tolist()}

    return _measured(work, rows)


WORK = {work.__name__: work for work in (make, mix, gate, schema, near, brute)}


def _child(name: str, folder: Path, rows: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", name, "--folder", str(folder), "--rows", str(rows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peer(folder: Path, *arguments: Any) -> dict[str, Any]:
    python = folder / "peers" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "peers")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS], check=True)
    command = [str(python), str(HERE / "peers.py"), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _without_rows(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key != "found"} | {"found": len(figures["found"])}


def _agreement(ours: list[int], theirs: list[int]) -> dict[str, int]:
    mine, other = set(ours), set(theirs)
    return {"both": len(mine & other), "only_tunegate": len(mine - other), "only_peer": len(other - mine)}


def measure(folder: Path, steps: list[str]) -> dict[str, Any]:
    """Run the steps; results of earlier calls for other steps are kept."""
    path = HERE / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for size in SIZES:
        if not (folder / str(size) / "flat.parquet").exists():
            results.setdefault("faults", {})[str(size)] = _child("make", folder / str(size), size)["faults"]
    small, large = (folder / str(size) for size in SIZES)
    if "gate" in steps:
        results["gate"] = [_child("gate", folder / str(size), size) for size in SIZES]
    if "mix" in steps:
        results["mix"] = [_child("mix", folder / str(size), size) for size in SIZES]
    if "schema" in steps:
        pairs = []
        for size, place in zip(SIZES, (small, large), strict=True):
            ours = _child("schema", place, size)
            pair = {"tunegate": _without_rows(ours)}
            for peer, work in (("great_expectations", "schema"), ("pandera", "frame")):
                theirs = _peer(folder, work, place / "flat.parquet")
                pair[peer] = _without_rows(theirs) | _agreement(ours["found"], theirs["found"])
            pairs.append(pair)
        results["schema"] = pairs
    if "near" in steps:
        ours = _child("near", small, NEAR_ROWS)
        settings = (ours["bands"], ours["rows_a_band"], ours["threshold"])
        theirs = _peer(folder, "near", small / "flat.parquet", NEAR_ROWS, *settings)
        agreement = _agreement(ours["found"], theirs["found"])
        results["near"] = {"tunegate": _without_rows(ours), "datasketch": _without_rows(theirs) | agreement}
    if "recall" in steps:
        ours, all_pairs = _child("near", small, RECALL_ROWS), _child("brute", small, RECALL_ROWS)
        found = _agreement(ours["found"], all_pairs["found"])
        share = found["both"] / len(all_pairs["found"])
        results["recall"] = {"rows": RECALL_ROWS, "true": len(all_pairs["found"]), "recall": round(share, 4), **found}
    load = max(os.getloadavg()[2], results.get("machine", {}).get("load", 0.0) if steps == ["table"] else 0.0)
    results["machine"] = {
        "load": round(load, 1),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "seed": SEED,
    }
    path.write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results.md").write_text(table(results))
    return results


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# The data gate: speed, memory, peers",
        "",
        f"`make bench-data` on {results['machine']['cores']} cores, synthetic pairs with known faults "
        f"(`synthetic.py`, seed {SEED}). Every measurement in its own process; memory is its peak resident set.",
        "",
        "| what | rows | rows/s | seconds | CPU seconds | peak memory | found |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]

    def line(name: str, f: dict[str, Any], found: str) -> None:
        lines.append(
            f"| {name} | {f['rows']:,} | {f['rows_per_second']:,} | {f['seconds']:.1f} | {f['cpu_seconds']:.1f} "
            f"| {f['peak_mib']:,} MiB | {found} |"
        )

    for f in results.get("gate", []):
        line("**full default validation**", f, f"{f['quarantined']:,} quarantined, {f['redacted']:,} redacted")
    for f in results.get("mix", []):
        line("mixing (JSON lines, prompts derived)", f, f"{f['refused']:,} refused")

    def peer(name: str, f: dict[str, Any]) -> None:
        line(
            f"{name} {f['version']}",
            f,
            f"{f['both']:,} the same, {f['only_tunegate']} by Tunegate alone, {f['only_peer']} by the peer alone",
        )

    for pair in results.get("schema", []):
        line("**schema rules, Tunegate**", pair["tunegate"], f"{pair['tunegate']['found']:,}")
        peer("schema rules, Great Expectations", pair["great_expectations"])
        peer("schema rules, pandera (polars)", pair["pandera"])
    if "near" in results:
        pair = results["near"]
        line("**near-duplicates, Tunegate**", pair["tunegate"], f"{pair['tunegate']['found']:,}")
        peer("near-duplicates, datasketch", pair["datasketch"])
    if "recall" in results:
        r = results["recall"]
        lines += [
            "",
            f"Recall of near-duplicates against comparing all {r['rows']:,} rows with all: **{r['recall']:.4f}** "
            f"({r['both']} of {r['true']}; {r['only_tunegate']} found that are none).",
        ]
    lines += [
        "",
        f"The load of the machine was {results['machine']['load']} (15 minutes): above its number of cores, seconds "
        "and rows/s are those of a machine that others were using, and CPU seconds are what compares.",
        "",
        "The full validation is every check but the sampled ones on every row (2,000 rows a kind for language and "
        "toxicity), with 2,000 evaluation prompts to look for; clean set, quarantine and report are written. "
        "The peers get the rows flattened and name every row that they find: Great Expectations by fourteen "
        "expectations over pandas with Arrow columns, pandera over one polars frame, datasketch with the same shingles "
        "and bands and the same exact comparison of candidates. Tunegate reads the nested rows and streams them.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or be one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=sorted(WORK))
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tunegate-bench-data")
    parser.add_argument("--steps", default="gate,mix,schema,near,recall")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.work:
        json.dump(WORK[options.work](options.folder, options.rows), sys.stdout)
    else:
        measure(options.folder, options.steps.split(","))
        print((HERE / "results.md").read_text())


if __name__ == "__main__":
    main()
