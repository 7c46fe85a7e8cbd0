"""Preparing a large table: seconds and peak memory of `python -m efficientids prepare` in a process of its own.

`python benchmarks/prepare.py [--interactions 50000000 --users 2000000 --items 500000]`. The CSV (about 36 bytes
a row, text ids) is made in a temporary folder on the disk of --folder and removed at the end, like the data set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from machine import header

_ROWS = 1_000_000  # made at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=50_000_000)
    parser.add_argument("--users", type=int, default=2_000_000)
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--core", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    print(header())
    print(f"polars {pl.__version__}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = Path(folder) / "log.csv"
        write_table(table, options.interactions, options.users, options.items)
        print(f"{options.interactions:,} interactions, {table.stat().st_size / 1e9:.2f} GB of CSV", flush=True)
        numbers = measure(table, Path(folder) / "data", options.core)
    print(json.dumps(numbers, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"machine": header(), **numbers}, indent=2))


def write_table(file: Path, interactions: int, users: int, items: int) -> None:
    """user_id, item_id, timestamp with a header; active users and popular items are chosen more often (∝ u³)."""
    rng = np.random.default_rng(0)
    with file.open("wb") as out:
        for start in range(0, interactions, _ROWS):
            rows = min(_ROWS, interactions - start)
            frame = pl.DataFrame(
                {
                    "user": (users * rng.random(rows) ** 1.5).astype(np.int64),
                    "item": (items * rng.random(rows) ** 3).astype(np.int64),
                    "timestamp": rng.integers(1_400_000_000, 1_700_000_000, rows),
                }
            )
            frame.select(
                pl.format("user-{}", "user").alias("user_id"),
                pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9)).alias("item_id"),
                "timestamp",
            ).write_csv(out, include_header=start == 0)


def measure(table: Path, output: Path, core: int) -> dict[str, float]:
    """Runs prepare and waits for it: seconds, peak resident memory in GB, and the counts that came out."""
    command = [sys.executable, "-m", "efficientids", "prepare", "--source", "table", "--input", str(table)]
    command += ["--output", str(output), "--core", str(core)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"prepare ended with exit code {os.waitstatus_to_exitcode(status)}")
    report = json.loads((output / "report.json").read_bytes())
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    counts = {name: report[name] for name in ("num_users", "num_items", "catalogue_size", "num_interactions")}
    return {"seconds": round(seconds, 1), "peak_rss_gb": round(usage.ru_maxrss * unit / 1e9, 2), **counts}


if __name__ == "__main__":
    main()
