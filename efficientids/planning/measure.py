"""Three real steps of a configuration on the GPU at hand, in a process of their own: what the plan is checked against.

A process of its own, because the memory that JAX has taken stays taken, and running out of it ends a process badly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.platform import has_nvidia_device, prefer_memory_fraction
from efficientids import systems
from efficientids.config import from_mapping, to_mapping
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.planning.memory import abstract_program
from efficientids.systems.base import Scale
from efficientids.training.step import build_program

STEPS = 3
_TIMEOUT_S = 900


def peak_bytes(device: Any) -> int | None:
    """The most bytes of its pool that a device has held at a time in this process; None where it has no count (CPU)."""
    stats = device.memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def scale_of(config: TrainConfig) -> Scale:
    """The data set's scale; without one MovieLens 1M's."""
    return Scale() if config.data_dir is None else Scale.of(Dataset.open(config.data_dir))


def three_steps(config: TrainConfig) -> dict[str, Any]:
    """Runs three steps of a configuration on one GPU: `device`, `steps`, `peak_bytes`, `limit_bytes`, `step_seconds`.

    Raises:
        UserError: no NVIDIA GPU here, or the steps failed (out of memory, most likely): with the process's last lines.
    """
    if not has_nvidia_device():
        raise UserError("--plan_by run takes three real steps, and this machine has no NVIDIA GPU; leave it out")
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "efficientids.planning.measure"], input=json.dumps(to_mapping(config)), text=True,
            capture_output=True, env=environment, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the three steps took longer than {_TIMEOUT_S} s; leave --plan_by run out") from error
    if done.returncode:
        last = "\n  ".join(done.stderr.strip().splitlines()[-5:])
        raise UserError(f"the three steps ended with exit code {done.returncode}:\n  {last}")
    return json.loads(done.stdout.splitlines()[-1])


def run_steps(config: TrainConfig, device: Any) -> dict[str, Any]:
    """What `three_steps` reports, in this process. Parameters are constants: a random start would need memory, too."""
    system, scale = systems.get(config.recommender), scale_of(config)
    resolved = system.resolve(config, scale)
    recommender = system.planned(resolved, scale)
    phase = abstract_program(resolved, system, scale)[1]
    with jax.default_device(device):
        model = jax.tree.map(_filled, nnx.eval_shape(recommender.init, jax.random.key(0)))
        program = build_program(
            model, phase, accumulation=resolved.gradient_accumulation, grad_clip=resolved.grad_clip
        )  # fmt: skip
        batch = _full_batch(phase.batch_specs[0], scale.num_items)
        state, key = program.state, jax.random.key(0)
        del model
        for _ in range(STEPS):
            began = time.perf_counter()
            state, _ = program.step(state, program.frozen, batch, key)
            jax.block_until_ready(state)
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "steps": STEPS,
        "peak_bytes": peak_bytes(device),
        "limit_bytes": stats.get("bytes_limit"),
        "step_seconds": time.perf_counter() - began,
    }


def _filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
    return jnp.full(leaf.shape, value, leaf.dtype)


def _full_batch(specs: Mapping[str, jax.ShapeDtypeStruct], num_items: int) -> dict[str, np.ndarray]:
    """A batch (see `systems.base.history_spec`) whose rows are all full, of items at random."""
    ids = np.random.default_rng(0).integers(1, num_items + 1, specs["item_ids"].shape, np.int32)
    values = {"item_ids": ids, "lengths": ids.shape[1], "segments": 1}
    return {name: np.broadcast_to(np.int32(values[name]), spec.shape) for name, spec in specs.items()}


if __name__ == "__main__":
    prefer_memory_fraction()
    asked = from_mapping(json.load(sys.stdin), Path("the plan's configuration"))
    print(json.dumps(run_steps(asked, jax.devices("gpu")[0])))
