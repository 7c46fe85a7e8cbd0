"""One optimiser step of one phase, as a compiled program.

Legend: A micro-batches of the gradient accumulation, B rows of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from efficientids.recommenders.base import Batch, LossSum, Phase
from efficientids.training import optimizer


class TrainState(NamedTuple):
    """What a step changes: a state and an optimiser state for each group of the phase."""

    step: jax.Array
    params: tuple[nnx.State, ...]
    opt_states: tuple[Any, ...]


class Program(NamedTuple):
    """A phase ready to run.

    Attributes:
        graphdef: merges with (*state.params, frozen) to the model.
        frozen: every other parameter and every buffer: an argument of the step, never an output.
        step: (state, frozen, batch, key) → (state, metrics); donates the state.
    """

    graphdef: nnx.GraphDef[Any]
    state: TrainState
    frozen: nnx.State
    step: jax.stages.Wrapped

    def model(self, state: TrainState) -> nnx.Module:
        """The model with the parameters of `state`."""
        return nnx.merge(self.graphdef, *state.params, self.frozen)


def build_program(
    model: nnx.Module, phase: Phase, *, accumulation: int, grad_clip: float, donate: bool = True
) -> Program:
    """Splits `model` into what `phase` trains and what it does not, and makes the step.

    Args:
        model: concrete, or abstract (`jax.ShapeDtypeStruct` leaves) for planning.
        accumulation: A; batches have A·B rows, of which B are in flight at a time.
        grad_clip: the gradient's largest global norm over all groups; 0 clips nothing.
        donate: let the step write over the state that it is given.

    Raises:
        ValueError: a group that matches no parameter.
    """
    # A buffer is never trained, whatever a filter says.
    filters = [nnx.All(nnx.Param, filter_) for filter_, _ in phase.groups]
    graphdef, *states = nnx.split(model, *filters, ...)
    groups, frozen = states[:-1], states[-1]
    for (filter_, _), group in zip(phase.groups, groups, strict=True):
        if not jax.tree.leaves(group):
            raise ValueError(f"phase {phase.name!r}: no parameter matches the group {filter_}")
    optimizers = [optimizer.build(config, phase.num_steps) for _, config in phase.groups]
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(groups))
    init = [(lambda g, tx=tx: jax.eval_shape(tx.init, g) if abstract else tx.init(g)) for tx in optimizers]
    opt_states = tuple(make(group) for make, group in zip(init, groups, strict=True))
    zero: Any = jax.ShapeDtypeStruct((), jnp.int32) if abstract else jnp.zeros((), jnp.int32)
    step = _make_step(graphdef, phase, optimizers, accumulation, grad_clip)
    # What the step does not read (an LM head without text) is on the device all the same, so it is an argument.
    compiled = jax.jit(step, donate_argnums=0 if donate else (), keep_unused=True)
    return Program(graphdef, TrainState(zero, tuple(groups), opt_states), frozen, compiled)


def _make_step(
    graphdef: Any, phase: Phase, optimizers: list[optax.GradientTransformation], accumulation: int, grad_clip: float
) -> Callable[..., Any]:
    def sums(params: Any, frozen: nnx.State, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[Any, LossSum]:
        loss = phase.loss(nnx.merge(graphdef, *params, frozen), batch, key, step)
        return loss.total, loss

    def gradient(params: Any, frozen: nnx.State, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[Any, LossSum]:
        if accumulation == 1:
            grads, loss = jax.grad(sums, has_aux=True)(params, frozen, batch, key, step)
            return grads, loss
        micro = jax.tree.map(lambda x: x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:]), batch)

        def add(carry: Any, inputs: Any) -> tuple[Any, None]:
            index, rows = inputs
            one = jax.grad(sums, has_aux=True)(params, frozen, rows, jax.random.fold_in(key, index), step)
            return jax.tree.map(jnp.add, carry, one), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(lambda p: jax.grad(sums, has_aux=True)(p, frozen, first, key, step), params)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation), micro))[0]

    # Of the first group, for the log; where there are several, they share the schedule's form.
    rate = optimizer.learning_rate(phase.groups[0][1], phase.num_steps)

    def train_step(
        state: TrainState, frozen: nnx.State, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, loss = gradient(state.params, frozen, batch, jax.random.fold_in(key, state.step), state.step)
        weight = jnp.maximum(loss.weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        if grad_clip:
            scale = jnp.minimum(1.0, grad_clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        params, opt_states = [], []
        for tx, p, g, o in zip(optimizers, state.params, grads, state.opt_states, strict=True):
            updates, o = tx.update(g, o, p)
            params.append(optax.apply_updates(p, updates))
            opt_states.append(o)
        metrics = {"loss": loss.total / weight, "targets": loss.items, "grad_norm": norm}
        metrics["learning_rate"] = rate(state.step)
        metrics |= {name: value / jnp.maximum(w, 1e-9) for name, (value, w) in loss.metrics.items()}
        return TrainState(state.step + 1, tuple(params), tuple(opt_states)), metrics

    return train_step
