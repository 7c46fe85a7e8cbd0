"""Frozen against LoRA against full, with a whole and with a quantised base: speed, memory, quality at equal steps.

`python benchmarks/training_modes.py --weights stories260K/hf --data_dir data/ml-1m
  --config configs/ml1m_stories260k.yaml --num_steps 300 --out runs/modes`

Each mode is one run of `train_llama.py`, in a process of its own, with the flags below beside those of --config. Speed
is the median over the logged intervals after the first; memory is XLA's own account of the compiled step (arguments +
outputs − aliased + temporaries) on this machine; quality is the test metrics of the best checkpoint. Runs that are
there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import header  # isort: skip  # sets jax up

import jax
from flax import nnx

from efficientids import systems
from efficientids.config import parse
from efficientids.data.dataset import Dataset
from efficientids.planning.memory import abstract_program
from efficientids.systems.base import Scale

LORA = ("--lora_rank=8", "--lora_targets=q,k,v,o")
RATE = ("--llama_learning_rate=1e-3",)
MODES = {
    "frozen": ("--train=frozen",),
    "lora": (*LORA, *RATE),
    "lora, int8 base": (*LORA, *RATE, "--quantize=int8"),
    "lora, nf4 base": (*LORA, *RATE, "--quantize=nf4"),
    "full": ("--train=full", *RATE),
}
TRAIN = Path(__file__).resolve().parent.parent / "train_llama.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    print(header())
    print(f"{'mode':<17}{'trained':>12}{'items/s':>9}{'memory MiB':>12}{'HR@10':>9}{'NDCG@10':>9}{'val NDCG@10':>13}")
    for mode in options.modes:
        flags = [
            f"--config={options.config}", f"--weights={options.weights}", f"--data_dir={options.data_dir}",
            f"--num_steps={options.num_steps}", *MODES[mode],
        ]  # fmt: skip
        row = {**compiled(flags), **trained(flags, options.out / mode.replace(", ", "-").replace(" ", "-"))}
        print(
            f"{mode:<17}{row['trained']:>12,}{row['items_per_s']:>9,.0f}{row['bytes'] / 2**20:>12.1f}"
            f"{row['hr@10']:>9.4f}{row['ndcg@10']:>9.4f}{row['validation']:>13.4f}",
            flush=True,
        )


def compiled(flags: list[str]) -> dict[str, Any]:
    """What XLA says of the step's memory, and how many parameters it trains."""
    asked = parse(flags)
    system, scale = systems.get(asked.recommender), Scale.of(Dataset.open(asked.data_dir or Path()))
    program, phase, _ = abstract_program(system.resolve(asked, scale), system, scale)
    key = jax.eval_shape(lambda: jax.random.key(0))
    memory = program.step.lower(program.state, program.frozen, dict(phase.batch_specs[0]), key).compile()
    found = memory.memory_analysis()
    peak = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.merge_state(*program.state.params)))
    return {"bytes": peak + found.temp_size_in_bytes, "trained": count}


def trained(flags: list[str], run: Path) -> dict[str, Any]:
    """Trains, unless the run is there, and reads its `metrics.jsonl`."""
    if not (run / "metrics.jsonl").is_file():
        subprocess.run([sys.executable, str(TRAIN), *flags, f"--checkpoint_dir={run}"], check=True, capture_output=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    best = max((line for line in lines if line["event"] == "validation"), key=lambda line: line["ndcg@10"])
    test = next(line for line in lines if line["event"] == "test")
    return {
        "items_per_s": statistics.median(line["items_per_s"] for line in steps[1:]),
        "validation": best["ndcg@10"],
        **test,
    }


if __name__ == "__main__":
    main()
