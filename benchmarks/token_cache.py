"""The token cache: seconds and peak memory for a catalogue's titles, tokenised (cold) and from the cache (warm).

`python benchmarks/token_cache.py --tokenizer PATH/tokenizer.json [--items 1000000 --title_tokens 16]`. Invented product
titles. The peer is the tokenizer alone: one call over all titles. Each case runs in a process of its own, in an empty
temporary cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import header  # isort: skip  # sets jax up

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from efficientids.data.texts.cache import VARIABLE
from efficientids.data.texts.templates import load
from efficientids.data.texts.tokens import title_table

CASES = ("titles alone", "tokenizer alone", "cold", "warm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--title_tokens", type=int, default=16)
    parser.add_argument(
        "--case", choices=CASES, help="run this case alone, in this process (used by the program itself)"
    )
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case, options.items, options.tokenizer, options.title_tokens)))
        return
    print(header())
    print(f"{options.items:,} titles, {options.title_tokens} tokens kept of each; peak RSS of a process of its own")
    print(f"{'case':<18}{'seconds':>9}{'CPU s':>9}{'titles/s':>12}{'peak RSS':>11}")
    seconds, cpu = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        for case in CASES:
            command = [sys.executable, *sys.argv, "--case", case]
            done = subprocess.run(command, env={**os.environ, VARIABLE: cache}, stdout=subprocess.PIPE, check=True)
            row = json.loads(done.stdout)
            seconds[case], cpu[case] = row["seconds"], row["cpu_seconds"]
            rate = f"{options.items / row['seconds']:,.0f}" if row["seconds"] else "–"
            print(
                f"{case:<18}{row['seconds']:>9.2f}{row['cpu_seconds']:>9.2f}{rate:>12}{row['rss_mib']:>7,.0f} MiB",
                flush=True,
            )
        size = sum(file.stat().st_size for file in Path(cache).rglob("*.*") if file.is_file())
    print(f"cache entry: {size / 2**20:.0f} MiB")
    print(f"cold / tokenizer alone: {seconds['cold'] / seconds['tokenizer alone']:.2f}")
    print(f"cold / warm: {seconds['cold'] / seconds['warm']:.1f}, in CPU time {cpu['cold'] / cpu['warm']:.1f}")


def run(case: str, count: int, tokenizer: Path, kept: int) -> dict[str, float]:
    """Seconds and CPU seconds of one case, and the peak resident memory of the process, titles included."""
    items = pl.DataFrame({"title": titles(count)})
    began, cpu_began = time.perf_counter(), time.process_time()
    if case == "tokenizer alone":
        encoder = Tokenizer.from_file(str(tokenizer))
        encoder.encode_batch_fast(items["title"].to_list(), add_special_tokens=False)
    elif case != "titles alone":
        title_table(items, load("title"), tokenizer, kept, vocab_size=2**31)
    took = 0.0 if case == "titles alone" else time.perf_counter() - began
    cpu = time.process_time() - cpu_began  # of all threads; on a busy machine the one to compare
    return {"seconds": took, "cpu_seconds": cpu, "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def titles(count: int) -> pl.Series:
    """Invented titles of 4 to 12 words, the same ones every time."""
    rng = np.random.default_rng(0)
    syllables = np.array(["ka", "ro", "mi", "ten", "sol", "ber", "lu", "fa", "dis", "gan", "por", "ve"])
    words = ["".join(syllables[rng.integers(0, 12, rng.integers(1, 4))]) for _ in range(20_000)]
    table = pl.Series(words)
    # Column by column, so that no Python text is made: twelve words, of which the last few stay away.
    lengths = pl.Series(rng.integers(4, 13, count))
    columns = {f"w{n}": table.gather(pl.Series((20_000 * rng.random(count) ** 2).astype(np.int64))) for n in range(12)}
    frame = pl.DataFrame({"length": lengths, **columns})
    shown = [pl.when(pl.col("length") > n).then(pl.col(f"w{n}")) for n in range(12)]
    return frame.select(pl.concat_str(shown, separator=" ", ignore_nulls=True).alias("title")).to_series()


if __name__ == "__main__":
    main()
