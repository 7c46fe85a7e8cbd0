"""The contract between a system and everything that trains, evaluates, plans and serves it.

The trainer knows phases, not systems; the evaluator knows `recommend`, not models. Keep this small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from core.lora import is_adapter

Batch = Mapping[str, Any]
# An NNX filter: (path, variable) → bool, a variable type, or a combination of these (`nnx.All`, `nnx.Not`, …).
Filter = Any


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine down to `final_fraction` of the peak; plain data.

    Weight decay is decoupled and never touches norms, biases or other vectors.
    """

    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    final_fraction: float = 0.1


class LossSum(NamedTuple):
    """A loss as sums, so that micro-batches of unequal weight accumulate to exactly the large batch's mean.

    Attributes:
        total: Σ of the loss over targets, float32; what is minimised is total / weight.
        weight: the number (or weight) of targets in the batch.
        items: how many items were predicted: what a run's items/s counts.
        metrics: further sums by name, each with its own weight: reported as Σ value / Σ weight.
    """

    total: jax.Array
    weight: jax.Array
    items: jax.Array
    metrics: Mapping[str, tuple[jax.Array, jax.Array]]


class Ended(NamedTuple):
    """What the end of a turn made of the model, and what there is to tell of it.

    Attributes:
        model: with buffers of the same shapes as before.
        row: for `metrics.jsonl`: plain values, `event` among them.
        said: the same in a line to be printed.
    """

    model: nnx.Module
    row: Mapping[str, Any]
    said: str


@dataclass(frozen=True)
class Phase:
    """One optimisation with one loss.

    Attributes:
        name: the compiled step and its optimiser state belong to it.
        groups: (filter, optimiser) pairs; the first filter that matches a parameter owns it, and a parameter in no
            group is frozen: never differentiated, returned, decayed or checkpointed twice.
        batch_specs: shape and dtype of each array of a batch, one mapping a length bucket, the longest rows first:
            enough to compile and plan without data.
        batches: (seed, start_step) → endless iterator over batches (NumPy, fixed shapes), a pure function of
            its arguments: the batch of step s is the same wherever the iteration started.
        loss: (model, batch, key, step) → LossSum; traced, so loss weights may follow `step`.
        num_steps: optimiser steps; in a `Cycle` of each turn.
        steps_per_epoch: for reports only.
        start_from: "best": the parameters and buffers of the checkpoint that validated best so far.
        on_end: (model) → `Ended`, after the last step of each turn and wherever the model is about to be validated and
            saved: may replace buffers by others of the same shapes.
        switched_off: (filter, why) of parameters in `groups` that the configuration keeps from any gradient: what
            `--check_gradients` says of them.
        validated: whether it is validated and saved on its way and at its end; a phase after which the model cannot be
            better yet need not be.
    """

    name: str
    groups: Sequence[tuple[Filter, OptimizerConfig]]
    batch_specs: Sequence[Mapping[str, jax.ShapeDtypeStruct]]
    batches: Callable[[int, int], Iterator[Batch]]
    loss: Callable[[Any, Batch, jax.Array, jax.Array], LossSum]
    num_steps: int
    steps_per_epoch: float
    start_from: Literal["previous", "best"] = "previous"
    on_end: Callable[[Any], Ended] | None = None
    validated: bool = True
    switched_off: Sequence[tuple[Filter, str]] = ()


@dataclass(frozen=True)
class Cycle:
    """Phases in turn, again and again.

    Each goes on where its last turn ended: in its data, its learning rate's schedule (which spans all turns) and its
    optimiser's state; it is compiled once.

    Attributes:
        phases: of one round; at least one is `validated`.
        repeats: rounds.
    """

    phases: Sequence[Phase]
    repeats: int


@dataclass(frozen=True)
class Training:
    """What a phase needs beside its loss; made by `efficientids.systems`, the same for every system.

    Attributes:
        num_steps, steps_per_epoch, batch_specs, batches: as in `Phase`.
        optimizer: of items, heads and whatever else is not pretrained.
        llama_optimizer: of what trains of a pretrained Llama; None where there is none.
    """

    num_steps: int
    steps_per_epoch: float
    batch_specs: Sequence[Mapping[str, jax.ShapeDtypeStruct]]
    optimizer: OptimizerConfig
    batches: Callable[[int, int], Iterator[Batch]]
    llama_optimizer: OptimizerConfig | None = None

    def phase(
        self, name: str, trained: Filter, loss: Callable[..., LossSum], llama_trained: Filter | None = None
    ) -> Phase:
        """The phase that trains what matches `trained`, and `llama_trained` at its own rate."""
        groups = [(trained, self.optimizer)]
        if llama_trained is not None:
            assert self.llama_optimizer is not None
            groups.append((llama_trained, self.llama_optimizer))
        return Phase(
            name=name,
            groups=groups,
            batch_specs=self.batch_specs,
            batches=self.batches,
            loss=loss,
            num_steps=self.num_steps,
            steps_per_epoch=self.steps_per_epoch,
        )


class Histories(NamedTuple):
    """What is known of some users: item_ids int32 [B, H], right-padded, oldest first; lengths int32 [B].

    The last `padding` rows are of nobody: they fill a batch up, and what is ranked for them means nothing.
    """

    item_ids: np.ndarray
    lengths: np.ndarray
    padding: int = 0


class Ranked(NamedTuple):
    """Recommendations, best first: item_ids int32 [B, k], scores float32 [B, k]; (0, −∞) where none are left."""

    item_ids: np.ndarray
    scores: np.ndarray


class Recommender(Protocol):
    """One system. Instances are small: they describe, and hold no parameters.

    Attributes:
        max_items: the newest items of a history that it looks at.
        history: the same in words, part of the evaluation protocol.
        spec: its shapes: a frozen dataclass whose `to_json` stands in the run's `model.json`.
    """

    @property
    def spec(self) -> Any: ...

    @property
    def max_items(self) -> int: ...

    @property
    def history(self) -> str: ...

    def init(self, key: jax.Array) -> nnx.Module:
        """All parameters and buffers of the system at their start; callers may use `jax.eval_shape`."""

    def plan(self) -> Sequence[Phase | Cycle]:
        """The phases of training, in order; none for a baseline that `init` has counted already."""

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        """The k best items after each history, without those in `exclude` (int32 [B, X], padded with 0).

        Raises:
            ValueError: ids outside 0 … N; or, of a system that cannot answer it, a history without items that is no
                padding.
        """


def cycles(plan: Sequence[Phase | Cycle]) -> list[Cycle]:
    """A plan whose every phase is in a cycle: one alone has a single turn."""
    return [part if isinstance(part, Cycle) else Cycle([part], 1) for part in plan]


def turns(plan: Sequence[Phase | Cycle]) -> list[tuple[Phase, int]]:
    """Every phase of a plan once, with the number of its turns."""
    return [(phase, cycle.repeats) for cycle in cycles(plan) for phase in cycle.phases]


def in_base(path: tuple[Any, ...], variable: Any) -> bool:
    """The filter for the pretrained part without adapters: what a weight file holds."""
    return in_llama(path, variable) and not is_adapter(path, variable)


def in_llama(path: tuple[Any, ...], _: Any) -> bool:
    """The filter for the pretrained part: by convention a system keeps it in its attribute `llama`."""
    return bool(path) and path[0] == "llama"
