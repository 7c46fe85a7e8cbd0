"""Exact bytes of parameters, gradients and optimiser state, before anything runs.

From shapes alone (`jax.eval_shape`): no weight is read and no array is made. Activations are estimated from the traced
program (`planning.traced`), until the compiler says (`planning.gpu`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from core import sharding
from core.lora import is_adapter
from core.quantized import QuantizedParam
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Phase, cycles, in_llama
from efficientids.systems.base import Scale, System, mesh_shape, precision_of
from efficientids.training.step import Program, build_program

ACTIVATIONS = "activations, estimated"
IDLE = "optimiser of phases that wait"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each device, by part; and the numbers of parameters behind them.

    Attributes:
        parts: exact, but for activations.
    """

    parts: dict[str, int]
    parameters: int
    trained_parameters: int
    num_items: int
    precision: str

    @property
    def exact(self) -> int:
        """Bytes of everything but activations."""
        return self.total - self.parts[ACTIVATIONS]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes."""
        return {**dataclasses.asdict(self), "total": self.total, "unit": "bytes"}


def account(config: TrainConfig, program: Program, scale: Scale, activations: int, idle: Any = ()) -> Estimate:
    """What the step of a resolved configuration keeps in memory on each device of its mesh.

    `program` is of one device: where its arrays would lie on the mesh is looked up in the table (`core.sharding`).

    Args:
        activations: bytes that the program makes on all devices together, gradients among them (`planning.traced`).
        idle: optimiser states of phases that wait for their turn.
    """
    shape = mesh_shape(config)
    mesh = AbstractMesh(dataclasses.astuple(shape), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
    state, frozen, idle = sharding.place((program.state, program.frozen, idle), mesh)
    trained = nnx.merge_state(*state.params)
    lora, trained_llama, trained_items = nnx.split_state(trained, is_adapter, in_llama, ...)
    frozen_llama, frozen_rest = nnx.split_state(frozen, in_llama, ...)
    quantized = nnx.filter_state(frozen, QuantizedParam)
    gradients = bytes_of(trained)
    parts = {
        "Llama, trained": bytes_of(trained_llama),
        "Llama, frozen": bytes_of(frozen_llama),
        "LoRA": bytes_of(lora),
        "items, adapters, heads": bytes_of(trained_items),
        "buffers": bytes_of(frozen_rest),
        "gradients": gradients,
        "optimiser": bytes_of(state.opt_states),
        **({IDLE: waiting} if (waiting := bytes_of(idle)) else {}),
        ACTIVATIONS: max(0, activations - _whole_bytes(trained)) // shape.size,
    }
    count = _size((trained, nnx.filter_state(frozen, nnx.Param))) + _quantized_size(quantized)
    return Estimate(parts, count, _size(trained), scale.num_items, precision_of(config))


def abstract_program(
    config: TrainConfig, system: System, scale: Scale, mesh: Mesh | None = None
) -> tuple[Program, Phase, Any]:
    """The training step of a resolved configuration over shapes alone, to count, to lower, to compile; on `mesh`.

    Of several phases it is the one that keeps most; and the optimiser states that others of its cycle
    keep meanwhile.
    """
    recommender = system.planned(config, scale)
    model = nnx.eval_shape(recommender.init, jax.random.key(0))
    accumulation, clip = config.gradient_accumulation, config.grad_clip
    found: list[tuple[Program, Phase, Any]] = []
    for cycle in cycles(recommender.plan()):
        programs = [
            build_program(model, phase, accumulation=accumulation, grad_clip=clip, mesh=mesh) for phase in cycle.phases
        ]
        for program, phase in zip(programs, cycle.phases, strict=True):
            found.append((program, phase, [other.state.opt_states for other in programs if other is not program]))
    if not found:
        raise UserError(f"--recommender {config.recommender} trains nothing: there is no memory to plan")
    return max(found, key=lambda one: bytes_of(one[0].state))


def kept_between_steps(config: TrainConfig, system: System, scale: Scale) -> dict[str, int]:
    """Bytes by part that one device keeps if it keeps everything, for an unresolved configuration; no activations."""
    config = system.resolve(config, scale)
    program, _, idle = abstract_program(config, system, scale)
    return account(config, program, scale, activations=0, idle=idle).parts


def _size(tree: Any) -> int:
    """The number of numbers in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _quantized_size(state: nnx.State) -> int:
    """The number of quantised weights: an int8 code is one, a uint8 code two; scales are none (`core.quantized`)."""
    weights = {np.dtype(np.int8): 1, np.dtype(np.uint8): 2}
    return sum(weights.get(np.dtype(leaf.dtype), 0) * math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def bytes_of(tree: Any) -> int:
    """Of all arrays of a tree, concrete or abstract; of those on a mesh, what each of its devices has."""
    return sum(math.prod(_part(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> tuple[int, ...]:
    """The shape of a device's part."""
    laid = getattr(leaf, "sharding", None)
    return leaf.shape if laid is None else laid.shard_shape(leaf.shape)


def _whole_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
