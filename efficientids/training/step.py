"""One optimiser step of one phase, as a compiled program, on one device or on a mesh of them.

Legend: A micro-batches of the gradient accumulation, B rows of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from core import rows, sharding
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
        mesh: what the state and `frozen` lie on, as `core.sharding` lays them; batches come divided by rows. None: one
            device.
        filters: what of the model each group of the state is.
    """

    graphdef: nnx.GraphDef[Any]
    state: TrainState
    frozen: nnx.State
    step: jax.stages.Wrapped
    mesh: Mesh | None = None
    filters: tuple[Any, ...] = ()

    def on_devices(self, batch: Batch) -> Batch:
        """A batch of this process's rows (NumPy) as `step` takes it."""
        return batch if self.mesh is None else sharding.rows_of_process(batch, self.mesh)

    def key(self, seed: int, phase: int) -> jax.Array:
        """The key of the randomness in a phase's steps."""
        laid = None if self.mesh is None else sharding.whole(self.mesh)
        return jax.jit(lambda: jax.random.fold_in(jax.random.key(seed), phase), out_shardings=laid)()

    def model(self, state: TrainState) -> nnx.Module:
        """The model with the parameters of `state`."""
        return nnx.merge(self.graphdef, *state.params, self.frozen)

    def resumed(self, model: nnx.Module, state: TrainState) -> Program:
        """The same program after other phases changed the model: its parameters, with the optimiser's `state`."""
        _, *states = nnx.split(model, *self.filters, ...)
        params, frozen = tuple(states[:-1]), states[-1]
        if self.mesh is not None:
            params, frozen = sharding.place((params, frozen), self.mesh)
        return self._replace(state=state._replace(params=params), frozen=frozen)


def build_program(
    model: nnx.Module,
    phase: Phase,
    *,
    accumulation: int,
    grad_clip: float,
    donate: bool = True,
    mesh: Mesh | None = None,
    repeats: int = 1,
) -> Program:
    """Splits `model` into what `phase` trains and what it does not, and makes the step.

    Args:
        model: concrete, or abstract (`jax.ShapeDtypeStruct` leaves) for planning.
        accumulation: A; batches have A·B rows, of which B are in flight at a time.
        grad_clip: the gradient's largest global norm over all groups; 0 clips nothing.
        donate: let the step write over the state that it is given.
        mesh: where it runs, of devices that are there or of a topology's; None: one device.
        repeats: turns of the phase, over all of which the learning rate's schedule goes.

    Raises:
        ValueError: a group that matches no parameter, or rows of a batch that do not divide among the mesh's devices.
    """
    # A buffer is never trained, whatever a filter says.
    filters = tuple(nnx.All(nnx.Param, filter_) for filter_, _ in phase.groups)
    num_steps = phase.num_steps * repeats
    graphdef, *states = nnx.split(model, *filters, ...)
    groups, frozen = states[:-1], states[-1]
    for (filter_, _), group in zip(phase.groups, groups, strict=True):
        if not jax.tree.leaves(group):
            raise ValueError(f"phase {phase.name!r}: no parameter matches the group {filter_}")
    optimizers = [optimizer.build(config, num_steps) for _, config in phase.groups]

    def init(params: tuple[nnx.State, ...]) -> TrainState:
        opt_states = tuple(tx.init(group) for tx, group in zip(optimizers, params, strict=True))
        return TrainState(jnp.zeros((), jnp.int32), params, opt_states)

    params, options = tuple(groups), dict[str, Any]()
    if mesh is not None:
        _check_rows(phase, mesh, accumulation)
        params, frozen = sharding.place((params, frozen), mesh)
    state = _started(init, params, mesh)
    if mesh is not None:
        laid, other = sharding.shardings((state, frozen), mesh), sharding.whole(mesh)
        options = {"in_shardings": (*laid, sharding.rows(mesh), other), "out_shardings": (laid[0], other)}
    # Of the first group, for the log; where there are several, they share the schedule's form.
    rate = optimizer.learning_rate(phase.groups[0][1], num_steps)
    step = _make_step(graphdef, phase, optimizers, rate, accumulation, grad_clip, mesh)
    # What the step does not read (an LM head without text) is on the device all the same, so it is an argument.
    compiled = jax.jit(step, donate_argnums=0 if donate else (), keep_unused=True, **options)
    return Program(graphdef, state, frozen, compiled, mesh, filters)


def _started(
    init: Callable[[tuple[nnx.State, ...]], TrainState], params: tuple[nnx.State, ...], mesh: Mesh | None
) -> TrainState:
    """The state before the first step: shapes for shapes, and on a mesh every moment where its parameter lies."""
    shapes = jax.eval_shape(init, params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return shapes if mesh is None else sharding.place(shapes, mesh)
    if mesh is None:
        return init(params)
    # Compiled without its shardings named, this would come back whole on every device.
    laid = sharding.shardings(shapes, mesh)
    started = jax.jit(lambda p: init(p)._replace(params=()), out_shardings=laid._replace(params=()))(params)
    return started._replace(params=params)


def _check_rows(phase: Phase, mesh: Mesh, accumulation: int) -> None:
    parts = accumulation * mesh.shape["data"] * mesh.shape["fsdp"]
    for spec in phase.batch_specs:
        for name, shape in spec.items():
            if shape.shape[0] % parts:
                raise ValueError(
                    f"phase {phase.name!r}: {name} has {shape.shape[0]} rows, which do not divide among "
                    f"{accumulation} micro-batches on data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']} devices"
                )


def make_mean_gradient(
    graphdef: nnx.GraphDef[Any], loss_of: Callable[..., LossSum], accumulation: int, mesh: Mesh | None
) -> Callable[[tuple[nnx.State, ...], nnx.State, Batch, jax.Array, jax.Array], tuple[Any, LossSum]]:
    """(params, frozen, batch, key, step) → the gradient of the mean loss over A micro-batches, and the sums; to be
    compiled."""

    def sums(params: Any, frozen: nnx.State, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[Any, LossSum]:
        loss = loss_of(nnx.merge(graphdef, *params, frozen), batch, key, step)
        return loss.total, loss

    def gradient(params: Any, frozen: nnx.State, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[Any, LossSum]:
        if accumulation == 1:
            grads, loss = jax.grad(sums, has_aux=True)(params, frozen, batch, key, step)
            return grads, loss
        micro = jax.tree.map(lambda x: _strided(x, accumulation), batch)

        def add(carry: Any, inputs: Any) -> tuple[Any, None]:
            index, rows = inputs
            one = jax.grad(sums, has_aux=True)(params, frozen, rows, jax.random.fold_in(key, index), step)
            return jax.tree.map(jnp.add, carry, one), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(lambda p: jax.grad(sums, has_aux=True)(p, frozen, first, key, step), params)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation), micro))[0]

    def mean(params: Any, frozen: nnx.State, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[Any, LossSum]:
        with rows.on(mesh):
            grads, loss = gradient(params, frozen, batch, key, step)
        weight = jnp.maximum(loss.weight, 1e-9)
        return jax.tree.map(lambda g: g / weight.astype(g.dtype), grads), loss

    return mean


def _make_step(
    graphdef: Any,
    phase: Phase,
    optimizers: list[optax.GradientTransformation],
    rate: optax.Schedule,
    accumulation: int,
    grad_clip: float,
    mesh: Mesh | None,
) -> Callable[..., Any]:
    mean_gradient = make_mean_gradient(graphdef, phase.loss, accumulation, mesh)

    def train_step(
        state: TrainState, frozen: nnx.State, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        grads, loss = mean_gradient(state.params, frozen, batch, key, state.step)
        norm = optax.tree.norm(grads)
        if grad_clip:
            scale = jnp.minimum(1.0, grad_clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        params, opt_states = [], []
        for tx, p, g, o in zip(optimizers, state.params, grads, state.opt_states, strict=True):
            updates, o = tx.update(g, o, p)
            params.append(optax.apply_updates(p, updates))
            opt_states.append(o)
        metrics = {"loss": loss.total / jnp.maximum(loss.weight, 1e-9), "targets": loss.items, "grad_norm": norm}
        metrics["learning_rate"] = rate(state.step)
        metrics |= {name: value / jnp.maximum(w, 1e-9) for name, (value, w) in loss.metrics.items()}
        return TrainState(state.step + 1, tuple(params), tuple(opt_states)), metrics

    return train_step


def _strided(x: jax.Array, parts: int) -> jax.Array:
    """[A·B, ...] → [A, B, ...]: rows a, A + a, 2A + a, … go to part a.

    Each device has a run of rows: a run of them to each part would put a micro-batch on a few devices and move rows.
    """
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
