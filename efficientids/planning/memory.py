"""Exact bytes of parameters, gradients and optimiser state, before anything runs.

From shapes alone (`jax.eval_shape`): no weight is read and no array is made. Activations are not in it: they belong to
the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from core.chunked import CHUNK_ELEMENTS
from core.config import LlamaConfig
from core.layers import Init
from efficientids import build
from efficientids.config import TrainConfig
from efficientids.recommenders.base import Batch, Phase, in_llama
from efficientids.recommenders.efficientids import EfficientIDS
from efficientids.resolve import Scale, resolve
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


def estimate(config: TrainConfig, llama: LlamaConfig, scale: Scale) -> Estimate:
    """Counts what the first phase of a configuration (not yet resolved) keeps in memory between steps.

    `--precision auto` is planned as bfloat16: the plan is for a GPU, whatever machine makes it.
    """
    if config.precision == "auto":
        config = dataclasses.replace(config, precision="bfloat16")
    config = resolve(config, llama, scale)
    program, _ = abstract_program(config, llama, scale.num_items)
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
    return Estimate(parts, count, trained_count, scale.num_items, config.precision)


def abstract_program(config: TrainConfig, llama: LlamaConfig, num_items: int) -> tuple[Program, Phase]:
    """The training step of a resolved configuration over shapes alone: to count, to lower, to compile.

    Clusters, where there are any, are those of --clustering, or taken to be balanced. The loss is cut into
    chunks of a GPU's size.
    """
    system = EfficientIDS(
        build.spec(config, llama, num_items, _cluster_shape(config, num_items)),
        compute=build.compute(config.precision, config.gradient_checkpointing, CHUNK_ELEMENTS),
        init=Init(param_dtype=build.llama_param_dtype(config)),
        training=build.training(config, 1.0, _no_data),
    )
    phase = system.plan()[0]
    model = nnx.eval_shape(system.init, jax.random.key(0))
    return build_program(model, phase, accumulation=config.gradient_accumulation, grad_clip=config.grad_clip), phase


def _cluster_shape(config: TrainConfig, num_items: int) -> tuple[int, int]:
    """Clusters, and members of the largest; (0, 0) for none."""
    if config.head == "full":
        return 0, 0
    if config.clustering is not None:
        num_clusters, slots = build.given_clusters(config.clustering, num_items).members_CM.shape
        return num_clusters, slots
    assert config.num_clusters is not None
    return config.num_clusters, math.ceil(num_items / config.num_clusters)


def _no_data(seed: int, start_step: int) -> Iterator[Batch]:
    raise ValueError("a plan has shapes, no data")


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
