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
from efficientids.recommenders.base import Phase, in_llama
from efficientids.systems.base import Scale, System, mesh_shape, precision_of
from efficientids.training.step import Program, build_program

ACTIVATIONS = "activations, estimated"


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


def account(config: TrainConfig, program: Program, scale: Scale, activations: int) -> Estimate:
    """What the step of a resolved configuration keeps in memory on each device of its mesh.

    `program` is of one device: where its arrays would lie on the mesh is looked up in the table (`core.sharding`).

    Args:
        activations: bytes that the program makes on all devices together, gradients among them (`planning.traced`).
    """
    shape = mesh_shape(config)
    mesh = AbstractMesh(dataclasses.astuple(shape), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
    state, frozen = sharding.place((program.state, program.frozen), mesh)
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
        ACTIVATIONS: max(0, activations - _whole_bytes(trained)) // shape.size,
    }
    count = _size((trained, nnx.filter_state(frozen, nnx.Param))) + _quantized_size(quantized)
    return Estimate(parts, count, _size(trained), scale.num_items, precision_of(config))


def abstract_program(
    config: TrainConfig, system: System, scale: Scale, mesh: Mesh | None = None
) -> tuple[Program, Phase]:
    """The training step of a resolved configuration over shapes alone, to count, to lower, to compile; on `mesh`."""
    recommender = system.planned(config, scale)
    phases = recommender.plan()
    if not phases:
        raise UserError(f"--recommender {config.recommender} trains nothing: there is no memory to plan")
    model = nnx.eval_shape(recommender.init, jax.random.key(0))
    accumulation, clip = config.gradient_accumulation, config.grad_clip
    return build_program(model, phases[0], accumulation=accumulation, grad_clip=clip, mesh=mesh), phases[0]


def kept_between_steps(config: TrainConfig, system: System, scale: Scale) -> dict[str, int]:
    """Bytes by part that one device keeps if it keeps everything, for an unresolved configuration; no activations."""
    config = system.resolve(config, scale)
    return account(config, abstract_program(config, system, scale)[0], scale, activations=0).parts


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
