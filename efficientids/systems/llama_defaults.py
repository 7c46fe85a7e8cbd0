"""What all systems around a Llama settle alike: checks against its shape, defaults that follow from it, its start."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh

from core.config import LlamaConfig
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Recommender
from efficientids.systems import base
from efficientids.systems.base import Scale
from efficientids.systems.llama import llama_init, load_llama, starts_at_random, weights_folder, with_llama

# From this width on a layer's activations cost more memory than its recomputation costs time.
REMAT_FROM_WIDTH = 1024


def is_small(llama: LlamaConfig) -> bool:
    """Whether memory is no concern in its defaults."""
    return llama.hidden_size < REMAT_FROM_WIDTH


def from_scratch(config: TrainConfig) -> bool:
    """Whether its Llama has learnt nothing yet."""
    return starts_at_random(config) and config.load_checkpoint is None


def with_llama_defaults(config: TrainConfig, scale: Scale, llama: LlamaConfig) -> TrainConfig:
    """The batch size, and `None` and `auto` that the Llama's size and its start decide.

    Raises:
        UserError: a batch or a tensor axis that does not divide.
    """
    base.check_tensor(
        config, heads=llama.num_heads, key_value_heads=llama.num_kv_heads, mlp_columns=llama.intermediate_size
    )
    random, small, remat = starts_at_random(config), is_small(llama), config.gradient_checkpointing
    on_gpu = jax.default_backend() == "gpu"
    return dataclasses.replace(
        base.resolve_batch(config, scale, 32 if small else 8),
        precision=("bfloat16" if on_gpu else "float32") if config.precision == "auto" else config.precision,
        dropout=(0.2 if random and small else 0.0) if config.dropout is None else config.dropout,
        gradient_checkpointing=("dots" if small else "full") if remat == "auto" else remat,
        learning_rate=config.learning_rate or (1e-3 if from_scratch(config) else 5e-4),
    )


def check_positions(llama: LlamaConfig, positions: int, flag: str) -> None:
    """Refuses more positions than the Llama has; `flag`: what asked for them, in words.

    Raises:
        UserError: with the limit.
    """
    limit = llama.max_position_embeddings
    if positions > limit and (llama.rope_scaling is None or llama.rope_scaling.kind != "dynamic"):
        raise UserError(f"{flag}: the Llama has max_position_embeddings {limit}; give at most that")
    if llama.sliding_window is not None and positions > llama.sliding_window:
        raise UserError(
            f"{flag}: the Llama has a sliding_window of {llama.sliding_window} positions, and only full attention is "
            "computed here; give at most that"
        )


def start(recommender: Recommender, config: TrainConfig, llama: LlamaConfig, mesh: Mesh | None) -> nnx.Module:
    """The model at random, or with the pretrained Llama in its place.

    Raises:
        UserError: weights of another shape than `llama`.
    """
    if starts_at_random(config):
        return base.start_at_random(recommender, config, mesh)
    folder = weights_folder(config)
    differing = base.differing_fields(LlamaConfig.from_hf(folder), llama)
    if differing:
        listed = "\n  ".join(differing)
        raise UserError(f"{folder / 'config.json'} is not the shape of --llama_size {config.llama_size}:\n  {listed}")
    loaded = load_llama(folder, llama_init(config), mesh)
    return with_llama(recommender, jax.random.key(config.seed), loaded, mesh)
