"""`python -m efficientids export`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from core.platform import start_devices
from efficientids.errors import UserError
from efficientids.exporting.export import Dtype, Format, Job, export
from efficientids.flags import command_line
from efficientids.log import duration, progress

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A run as files for other programs, read back and compared before they appear."""

    run: Path
    """The run folder R, R/STEP or R/checkpoints/STEP."""
    output: Path
    """The folder to make; new or empty."""
    format: Format
    """hf: the Llama as a whole Hugging Face checkpoint, adapters merged. peft: the LoRA adapters alone. Both with the
    rest of the recommender beside it. safetensors: all parameters and buffers by our own names."""
    step: int | None = None
    """Which checkpoint. Default: the best by validation NDCG@10 (of equals the later)."""
    dtype: Dtype | None = None
    """Of the whole checkpoint (hf). Default: what each tensor has in the weights that it started from; float32 where
    all of the Llama trained."""
    max_shard_size: str = "5GB"
    """Of one weight file, such as 500MB or 2GiB; a tensor is never split."""
    json: bool = False
    """Print the summary as JSON."""


def main(arguments: Sequence[str]) -> int:
    """Exports; returns the exit code."""
    config = command_line(ExportConfig, arguments, prog="efficientids export")
    if config.dtype is not None and config.format != "hf":
        raise UserError(
            f"--dtype {config.dtype} goes with --format hf; {config.format} holds every tensor as the run does"
        )
    job = Job(config.run, config.step, config.format, config.output, config.dtype, _bytes(config.max_shard_size))
    start_devices()
    began = time.perf_counter()
    facts = export(job, progress("wrote", "tensors", sys.stderr), lambda text: print(text, file=sys.stderr, flush=True))
    seconds = time.perf_counter() - began
    if config.json:
        print(json.dumps({**facts, "output": str(config.output), "seconds": seconds}))
        return 0
    check = facts["read_back"]
    apart = "equal" if not check["tolerance"] else f"{check['error']:.1e} apart (at most {check['tolerance']:.0e})"
    size = sum((config.output / name).stat().st_size for name in facts["files"])
    print(
        f"{config.format}: step {facts['step']} of {config.run}, {size:,} bytes in {len(facts['files'])} weight "
        f"files, {check['compared']} read back {apart}, in {duration(seconds)}: {config.output}"
    )
    return 0


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2] or ""])
    if size < 1:
        raise UserError(f"--max_shard_size {text}: give a size such as 5GB, 500MB or 2GiB")
    return size
