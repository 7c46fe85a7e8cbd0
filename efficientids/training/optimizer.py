"""Optimiser settings → optax. Only this room builds optimisers."""

from __future__ import annotations

import jax
import optax
from flax import nnx

from efficientids.recommenders.base import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Steps done → learning rate of the next: linear over `warmup_steps`, then a cosine to `final_fraction`.

    The first step has 1/`warmup_steps` of the peak, not zero: it would do nothing.
    """
    warmup = min(config.warmup_steps, num_steps)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(num_steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    return lambda count: schedule(count + 1)


def build(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW as `config` says. Gradients are clipped by the step, over all groups together, before they come here."""
    return optax.adamw(
        learning_rate(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )


def _decayed(params: nnx.State) -> nnx.State:
    """True for weight matrices and tables. Norm scales and biases, stacked over layers or not, are exempt by name."""

    def is_matrix(path: tuple[object, ...], _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path)
        return not ("bias" in name or "scale" in name)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
