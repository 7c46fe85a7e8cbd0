"""Exact bytes of parameters, gradients and optimiser state, before anything runs.

From shapes alone (`jax.eval_shape`): no weight is read and no array is made. Activations are not in it: they belong to
the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from efficientids.errors import UserError
from efficientids.options import READS, TrainConfig
from efficientids.recommenders.base import Phase, in_llama
from efficientids.systems.base import Scale, System, precision_of
from efficientids.training.step import Program, build_program


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device that holds everything, by part; and the numbers of parameters behind them."""

    parts: dict[str, int]
    parameters: int
    trained_parameters: int
    num_items: int
    precision: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes."""
        return {**dataclasses.asdict(self), "total": self.total, "unit": "bytes", "activations": "not included"}

    def as_text(self) -> str:
        """A table in GiB."""
        rows = [f"  {name:<22}{size / 2**30:>10.3f} GiB{size:>20,} bytes" for name, size in self.parts.items()]
        rows.append(f"  {'total':<22}{self.total / 2**30:>10.3f} GiB{self.total:>20,} bytes")
        return (
            f"{self.parameters:,} parameters, {self.trained_parameters:,} of them trained; "
            f"{self.precision}, {self.num_items:,} items\n"
            + "\n".join(rows)
            + "\nexact for parameters, gradients and optimiser; activations and the program's temporaries come on top"
        )


def estimate(config: TrainConfig, system: System, scale: Scale) -> Estimate:
    """Counts what the first phase of a configuration (not yet resolved) keeps in memory between steps.

    `--precision auto` is planned as bfloat16: the plan is for a GPU, whatever machine makes it.

    Raises:
        UserError: the recommender has nothing to train.
    """
    if config.precision == "auto" and "precision" in READS[config.recommender]:
        config = dataclasses.replace(config, precision="bfloat16")
    config = system.resolve(config, scale)
    program, _ = abstract_program(config, system, scale)
    trained, frozen = nnx.merge_state(*program.state.params), program.frozen
    trained_llama, trained_items = nnx.split_state(trained, in_llama, ...)
    frozen_llama, frozen_rest = nnx.split_state(frozen, in_llama, ...)
    parts = {
        "Llama, trained": _bytes(trained_llama),
        "Llama, frozen": _bytes(frozen_llama),
        "items, adapters, heads": _bytes(trained_items),
        "buffers": _bytes(frozen_rest),
        "gradients": _bytes(trained),
        "optimiser": _bytes(program.state.opt_states),
    }
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((trained, nnx.filter_state(frozen, nnx.Param))))
    trained_count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
    return Estimate(parts, count, trained_count, scale.num_items, precision_of(config))


def abstract_program(config: TrainConfig, system: System, scale: Scale) -> tuple[Program, Phase]:
    """The training step of a resolved configuration over shapes alone: to count, to lower, to compile."""
    recommender = system.planned(config, scale)
    phases = recommender.plan()
    if not phases:
        raise UserError(f"--recommender {config.recommender} trains nothing: there is no memory to plan")
    model = nnx.eval_shape(recommender.init, jax.random.key(0))
    program = build_program(model, phases[0], accumulation=config.gradient_accumulation, grad_clip=config.grad_clip)
    return program, phases[0]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
