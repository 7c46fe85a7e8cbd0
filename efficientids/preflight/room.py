"""Whether a run's checkpoints fit on its disk, and what it holds on the host into the host's memory."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from efficientids.checkpoints import KEPT_AT_ONCE
from efficientids.errors import UserError
from efficientids.recommenders.base import Recommender, cycles
from efficientids.training.step import build_program


def check_room(recommender: Recommender, saved: Any, eval_every: int, folder: Path) -> None:
    """Refuses a run that is sure to end in a full disk or without host memory; from shapes, before weights load.

    A baseline that only counts needs no room worth a check.

    Args:
        saved: the NNX filter of the variables that checkpoints hold.
        eval_every: steps from one checkpoint to the next.
        folder: where they are written.

    Raises:
        UserError: names what there is, what is needed, and the remedy.
    """
    plan = cycles(recommender.plan())
    if not plan:
        return
    model = nnx.eval_shape(recommender.init, jax.random.key(0))
    optimizer = gradients = 0
    for cycle in plan:
        states = [build_program(model, phase, accumulation=1, grad_clip=0.0).state for phase in cycle.phases]
        # Between its turns a phase keeps its moments.
        optimizer = max(optimizer, sum(_bytes(state.opt_states) for state in states))
        gradients = max(gradients, *(_bytes(state.params) for state in states))
    checkpoint = _bytes(nnx.state(model, saved)) + optimizer
    saves = [math.ceil(cycle.repeats * phase.num_steps / eval_every) for cycle in plan for phase in cycle.phases]
    kept = min(KEPT_AT_ONCE, sum(saves))
    check_disk(folder, kept * checkpoint, f"{kept} checkpoints of {amount(checkpoint)}, one of them being written")
    # Of several processes each holds its part at least.
    if jax.default_backend() == "cpu":
        needed = (_bytes(nnx.state(model)) + optimizer + gradients) // jax.process_count()
        check_host_memory(needed, "parameters, gradients and optimiser on the CPU, without activations")
    else:
        check_host_memory(checkpoint // jax.process_count(), "the copy of a checkpoint on its way to the disk")


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Refuses a run whose checkpoints (`needed` bytes, `what` in words) do not fit where `folder` is.

    Raises:
        UserError: names both amounts.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {amount(free)} free, and {amount(needed)} is needed ({what}); free some space, or give a "
            "--checkpoint_dir on another disk"
        )


def check_host_memory(needed: int, what: str, available: int | None = None) -> None:
    """Refuses a run that needs more host memory (`needed` bytes, `what` in words) than is available.

    Args:
        available: bytes; None: of this machine or its container.

    Raises:
        UserError: names both amounts.
    """
    available = available_memory() if available is None else available
    if available is not None and available < needed:
        raise UserError(
            f"host memory: {amount(available)} available, and {amount(needed)} is needed ({what}); end other "
            "programs, take a machine with more, or train less of the model (--freeze_llama)"
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes to be had without swapping, within the container's limit (cgroup v2); None where Linux does not say."""
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if found is None:
        return None
    available = int(found[1]) * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        cached = re.search(r"^file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return available
    if limit == "max":
        return available
    # Files that were read count as used, and are dropped when memory is wanted.
    return min(available, int(limit) - used + (int(cached[1]) if cached else 0))


def amount(size: int) -> str:
    """Bytes in words: "1.5 GiB", "64 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
