"""Does the data starve the step? Batches a second made on the host, against what the training step takes.

`python benchmarks/batches.py --data_dir D [--recommender sasrec --seq_len 200 …]` (any flags of train_llama.py). Prints

    alone      batches a second of the pipeline with nothing else to do: its limit
    step       steps a second on batches that are in memory already: the device's limit
    together   steps a second of both at once, with the prefetch that training uses, and the share of time spent waiting

and positions saved: real items as a share of all positions, with length buckets and without.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from machine import header  # isort: skip  # sets jax up

import jax
import numpy as np

from efficientids import systems
from efficientids.config import parse
from efficientids.data.dataset import Dataset
from efficientids.recommenders.base import Batch
from efficientids.systems.base import Scale
from efficientids.training.step import build_program

STEPS = 60


def main() -> None:
    """Measures and prints; one JSON line at the end."""
    config = parse(sys.argv[1:])
    if config.data_dir is None:
        raise SystemExit("--data_dir is missing: give a prepared data set")
    dataset, system = Dataset.open(config.data_dir), systems.get(config.recommender)
    config = system.resolve(config, Scale.of(dataset))
    recommender = system.recommender(config, dataset, None)
    (phase,) = recommender.plan()
    program = build_program(
        system.start(recommender, config), phase, accumulation=config.gradient_accumulation, grad_clip=config.grad_clip
    )
    key, names = jax.random.key(0), phase.batch_specs[0]
    state = program.state

    def run(batches: Iterator[Batch], steps: int) -> tuple[float, float]:
        """Steps a second, and the share of time spent waiting for batches."""
        nonlocal state
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = {name: value for name, value in next(batches).items() if name in names}
            waited += time.perf_counter() - asked
            state, metrics = program.step(state, program.frozen, batch, key)
            jax.block_until_ready(metrics)
        seconds = time.perf_counter() - began
        return steps / seconds, waited / seconds

    kept = list(itertools.islice(phase.batches(0, 0), STEPS))
    run(iter(kept), STEPS)  # compiles the shapes of all buckets
    alone = pipeline(phase.batches(0, 0))
    step, _ = run(iter(kept), STEPS)
    together, waiting = run(phase.batches(0, 0), STEPS)
    flat = dataclasses.replace(config, length_buckets=1)
    (flat_phase,) = system.recommender(flat, dataset, None).plan()
    result: dict[str, Any] = {
        "alone_batches_per_s": alone, "step_per_s": step, "together_per_s": together, "waiting_share": waiting,
        "real_positions": real(kept), "real_positions_one_bucket": real(itertools.islice(flat_phase.batches(0, 0), 20)),
    }  # fmt: skip
    print(header())
    print(f"data {dataset.manifest['name']}, {config.recommender}, batch shapes {[b.shape for b in shapes(phase)]}")
    print(
        f"alone {alone:,.0f} batches/s; step {step:.2f}/s: the pipeline makes {alone / step:,.0f} × what a step takes"
    )
    print(f"together {together:.2f} steps/s ({together / step:.0%} of the step alone), waiting {waiting:.1%}")
    print(f"real positions {result['real_positions']:.1%}; one bucket {result['real_positions_one_bucket']:.1%}")
    print(json.dumps(result))


def pipeline(batches: Iterator[Batch], count: int = 300) -> float:
    """Batches a second, taken as fast as they come."""
    next(batches)
    began = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return count / (time.perf_counter() - began)


def real(batches: Any) -> float:
    """Items as a share of all positions."""
    sizes = [(int(np.sum(batch["lengths"])), batch["item_ids"].size) for batch in batches]
    return sum(items for items, _ in sizes) / sum(size for _, size in sizes)


def shapes(phase: Any) -> list[jax.ShapeDtypeStruct]:
    """Of the item ids of each bucket."""
    return [spec["item_ids"] for spec in phase.batch_specs]


if __name__ == "__main__":
    main()
