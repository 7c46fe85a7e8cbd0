"""`python -m efficientids evaluate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from efficientids.data.process import Oracle, has_oracle
from efficientids.evaluation.evaluate import as_text, evaluate
from efficientids.loading import open_run
from efficientids.log import progress


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Ranking metrics of a run: leave-one-out, over the full catalogue."""

    run: Path
    """The run folder R, R/STEP or R/checkpoints/STEP."""
    step: int | None = None
    """Which checkpoint. Default: the best by validation NDCG@10."""
    data_dir: Path | None = None
    """Where the run's data set is now. Default: where it was."""
    split: Literal["validation", "test"] = "test"
    """Which held-out item is the target."""
    seen: Literal["mask", "keep"] = "mask"
    """Whether items of the user's history may be recommended."""
    batch_size: int = 256
    """Users at a time."""
    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str]) -> int:
    """Evaluates; returns the exit code."""
    config = tyro.cli(EvaluateConfig, args=arguments, prog="efficientids evaluate", use_underscores=True)
    loaded = open_run(config.run, config.step)
    dataset = loaded.dataset(config.data_dir)
    result = evaluate(
        loaded.system,
        loaded.model,
        dataset,
        config.split,
        seen=config.seen,
        max_items=loaded.system.spec.max_seq_len,
        batch_size=config.batch_size,
        history=loaded.system.spec.history,
        progress=progress("evaluated", sys.stderr),
    )
    result |= {"run": str(loaded.run.path), "step": loaded.step, "dataset": dataset.manifest["name"]}
    if has_oracle(dataset):
        best = Oracle.open(dataset).best_hit_rate(config.split, 10)
        result["best_possible"] = {"hr@10": best.realised, "hr@10 expected": best.expected}
    if config.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{result['run']}, step {result['step']}, data {result['dataset']}")
    print(as_text(result))
    for name, value in result.get("best_possible", {}).items():
        print(f"best possible {name}: {value:.4f}")
    return 0
