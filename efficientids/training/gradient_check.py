"""`--check_gradients`: what each phase's loss gives to each part of the model, before anything is trained.

A part that should learn and gets nothing is a bug that no loss curve shows. Every part is listed, with the norm of its
gradient in the first batch, or with the reason why it has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from core import sharding
from core.lora import is_adapter
from efficientids.recommenders.base import Phase, Recommender, turns
from efficientids.training.step import make_mean_gradient
from efficientids.training.trainer import TrainerOptions

FROZEN = "no gradient: frozen in this phase"
STARTS_AT_ZERO = "zero: B, which it is multiplied by, starts at zero"
NOT_READ = "zero: the loss of this batch does not depend on it"


class Part(NamedTuple):
    """A part of the model in a phase: its path, numbers in it, and its gradient's norm, or why there is none."""

    phase: str
    path: str
    size: int
    norm: float | None
    reason: str | None


def check_gradients(recommender: Recommender, model: nnx.Module, options: TrainerOptions) -> list[Part]:
    """The parts of a model at its start, in each phase of its plan.

    The loss is that of the phase's last step, when all its terms are on, in the first batch of the run, taken in the
    micro-batches of a step and on its mesh: what fits to train fits to check.
    """
    plan = turns(recommender.plan())
    return [part for phase, repeats in plan for part in _parts(phase, repeats, model, options)]


def _parts(phase: Phase, repeats: int, model: nnx.Module, options: TrainerOptions) -> list[Part]:
    seed, mesh = options.seed, options.mesh
    trained = nnx.All(nnx.Param, nnx.Any(*(filter_ for filter_, _ in phase.groups)))
    graphdef, *states = nnx.split(model, trained, nnx.Param, ...)
    params, other, rest = states
    batch = {name: value for name, value in next(phase.batches(seed, 0)).items() if name in phase.batch_specs[0]}
    if mesh is not None:
        batch = sharding.rows_of_process(batch, mesh)
    # All by argument: what a program closes over becomes constants in it, a frozen 7B too.
    gradient = jax.jit(make_mean_gradient(graphdef, phase.loss, options.accumulation, mesh))
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=None if mesh is None else sharding.whole(mesh))()
    last = np.int32(phase.num_steps * repeats - 1)
    (grads,), _ = gradient((params,), nnx.merge_state(other, rest), batch, key, last)
    adapters = set(_by_part(nnx.filter_state(params, is_adapter)))
    off = {path: why for filter_, why in phase.switched_off for path in _by_part(nnx.filter_state(params, filter_))}
    parts = []
    for path, leaves in _by_part(grads).items():
        norm = float(sharding.to_host(optax.tree.norm(leaves)))
        half = path.endswith(".a") and path in adapters
        reason = None if norm else off.get(path, STARTS_AT_ZERO if half else NOT_READ)
        parts.append(Part(phase.name, path, _size(leaves), norm, reason))
    parts += [Part(phase.name, path, _size(leaves), None, FROZEN) for path, leaves in _by_part(other).items()]
    return parts


def _by_part(state: nnx.State) -> Mapping[str, Sequence[Any]]:
    """Arrays by the part that they belong to: a path without the name of a weight or bias."""
    found: dict[str, list[Any]] = {}
    for path, leaf in nnx.to_flat_state(state):
        names = [str(name) for name in path]
        if names[-1] in ("weight", "bias", "scale") and len(names) > 1:
            names.pop()
        found.setdefault(".".join(names), []).append(leaf[...])
    return found


def _size(leaves: Sequence[Any]) -> int:
    return sum(leaf.size for leaf in leaves)


def as_text(parts: Sequence[Part]) -> str:
    """A table, a phase after the other; a frozen Llama's parts, which are many, in a line."""
    lines = []
    for phase in dict.fromkeys(part.phase for part in parts):
        lines.append(f"gradients of phase {phase!r}:")
        mine = [part for part in parts if part.phase == phase]
        for part in (part for part in mine if part.norm is not None):
            shown = f"{part.norm:12.4g}" if part.norm else f"{'0':>12}  {part.reason}"
            lines.append(f"  {part.path:<48}{part.size:>14,}{shown}")
        frozen: dict[str, int] = {}
        for part in (part for part in mine if part.norm is None):
            name = "llama" if part.path.startswith("llama.") else part.path
            frozen[name] = frozen.get(name, 0) + part.size
        lines += [f"  {name:<48}{size:>14,}              {FROZEN}" for name, size in frozen.items()]
    return "\n".join(lines)
