"""The same rules in Great Expectations, pandera and datasketch; runs in a virtual environment of its own.

Nothing here imports Tunegate. `run.py` calls it and compares the findings.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

_TURN_RULES = ("prompt_role", "prompt_content")


def schema(flat: Path) -> dict:
    """Schema rules in Great Expectations, with the number of every row that breaks one."""
    import great_expectations as gx
    import pandas as pd
    from great_expectations import expectations as e

    started = time.perf_counter()
    frame = pd.read_parquet(flat, dtype_backend="pyarrow")
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    batch = context.data_sources.add_pandas("p").add_dataframe_asset("a").add_batch_definition_whole_dataframe("b")
    rules = [
        e.ExpectColumnValuesToNotBeNull(column="id"),
        e.ExpectColumnValuesToBeUnique(column="id"),
        *(e.ExpectColumnValuesToNotBeNull(column=name) for name in (*_TURN_RULES, "chosen", "rejected", "repeats")),
        e.ExpectColumnValuesToBeInSet(column="prompt_role", value_set=["system", "user", "assistant"]),
        *(e.ExpectColumnValuesToMatchRegex(column=name, regex=r"\S") for name in ("prompt_content", "chosen")),
        e.ExpectColumnValuesToMatchRegex(column="rejected", regex=r"\S"),
        e.ExpectColumnValuesToBeBetween(column="margin", min_value=-1e300, max_value=1e300),
        e.ExpectColumnValuesToBeInSet(column="split", value_set=["train", "heldout"]),
        e.ExpectColumnValuesToBeBetween(column="repeats", min_value=1),
        e.ExpectColumnPairValuesAToBeGreaterThanB(column_A="scale_high", column_B="scale_low"),
    ]
    suite = context.suites.add(gx.ExpectationSuite(name="s", expectations=rules))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="v", data=batch, suite=suite))
    # Rows must be named, since they are to be quarantined.
    result = definition.run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
    )
    found: set[int] = set()
    for rule in result.results:
        if rule.exception_info and rule.exception_info.get("raised_exception"):
            raise RuntimeError(str(rule.exception_info)[:500])
        found.update(int(place["row"]) for place in rule.result.get("unexpected_index_list") or ())
    return _figures(started, len(frame)) | {"found": sorted(found), "version": gx.__version__}


def frame(flat: Path) -> dict:
    """The same schema rules in pandera's polars backend, over the whole file at once."""
    import pandera
    import pandera.polars as pa
    import polars as pl

    started = time.perf_counter()
    rows = pl.read_parquet(flat)

    def rule(expression: pl.Expr) -> pa.Check:
        return pa.Check(lambda data: data.lazyframe.select(expression))

    text = [pa.Check.str_contains(r"\S")]
    schema = pa.DataFrameSchema(
        {
            "id": pa.Column(pl.String, unique=True),
            "prompt_role": pa.Column(pl.String, pa.Check.isin(["system", "user", "assistant"])),
            "prompt_content": pa.Column(pl.String, text),
            "chosen": pa.Column(pl.String, text),
            "rejected": pa.Column(pl.String, text),
            "margin": pa.Column(pl.Float64, rule(pl.col("margin").is_finite()), nullable=True),
            "split": pa.Column(pl.String, pa.Check.isin(["train", "heldout"])),
            "repeats": pa.Column(pl.Int32, pa.Check.ge(1)),
            "scale_low": pa.Column(pl.Float64, rule(pl.col("scale_low") < pl.col("scale_high"))),
        }
    )
    found: set[int] = set()
    try:
        schema.validate(rows, lazy=True)
    except pa.errors.SchemaErrors as error:
        found.update(rows["row"].gather(error.failure_cases["index"].drop_nulls()).to_list())
    return _figures(started, rows.height) | {"found": sorted(found), "version": pandera.__version__}


def near(flat: Path, rows: int, bands: int, width: int, limit: float) -> dict:
    """Near-duplicates by datasketch's MinHash LSH with the same bands; candidates are compared exactly."""
    import datasketch
    import pyarrow.parquet as pq

    started = time.perf_counter()
    lsh = datasketch.MinHashLSH(num_perm=bands * width, params=(bands, width))
    sets: list[list[frozenset[str]]] = []
    found = []
    fields = ["row", "prompt_content", "chosen", "rejected"]
    for number, *texts in _rows(pq, flat, fields, rows):
        mine = [_shingles(text) for text in texts]
        marked = [f"{field}{shingle}".encode() for field, shingles in enumerate(mine) for shingle in shingles]
        signature = datasketch.MinHash(num_perm=bands * width, hashfunc=zlib.crc32)
        signature.update_batch(marked)
        place = len(sets)
        if any(_similar(mine, sets[int(other)], limit) for other in lsh.query(signature)):
            found.append(number)
        lsh.insert(str(place), signature, check_duplication=False)
        sets.append(mine)
    return _figures(started, len(sets)) | {"found": found, "version": datasketch.__version__}


def _rows(pq: object, flat: Path, fields: list[str], rows: int) -> Iterator[tuple]:
    seen = 0
    for batch in pq.ParquetFile(flat).iter_batches(batch_size=4096, columns=fields):  # type: ignore[attr-defined]
        for row in zip(*(batch.column(name).to_pylist() for name in fields), strict=True):
            if None not in row:
                yield (row[0], *(" ".join(text.lower().split()) for text in row[1:]))
            seen += 1
            if seen == rows:
                return


def _shingles(text: str) -> frozenset[str]:
    padded = text.ljust(5)
    return frozenset(padded[i : i + 5] for i in range(len(padded) - 4))


def _similar(a: list[frozenset[str]], b: list[frozenset[str]], limit: float) -> bool:
    for one, other in zip(a, b, strict=True):
        common = len(one & other)
        if common < limit * (len(one) + len(other) - common):
            return False
    return True


def _figures(started: float, rows: int) -> dict:
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "rows_per_second": math.floor(rows / seconds),
        "peak_mib": round(peak),
    }


if __name__ == "__main__":
    what, path, *rest = sys.argv[1:]
    if what == "near":
        answer = near(Path(path), int(rest[0]), int(rest[1]), int(rest[2]), float(rest[3]))
    else:
        answer = {"schema": schema, "frame": frame}[what](Path(path))
    json.dump(answer, sys.stdout)
