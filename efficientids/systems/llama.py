"""The Llama that a configuration asks for: its shape, where its weights are, how it computes and starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from core import sharding
from core.config import LLAMA_SIZES, LlamaConfig
from core.llama import Compute
from core.llama_loader import LlamaLoader
from core.weight_files import CheckpointError
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Recommender, in_llama


def llama_config(config: TrainConfig) -> LlamaConfig:
    """The Llama's shape: from the weights' config.json where a folder is given, else from the table of sizes."""
    if config.weights is None:
        return LLAMA_SIZES[config.llama_size].config
    if not config.weights.is_dir():
        raise UserError(f"--weights {config.weights}: no such folder; give one with config.json and weight files")
    try:
        found = LlamaConfig.from_hf(config.weights / "config.json")
    except (ValueError, OSError) as error:
        raise UserError(f"--weights {config.weights}: {error}") from error
    if config.llama_size != "tiny" and found != LLAMA_SIZES[config.llama_size].config:
        raise UserError(
            f"--llama_size {config.llama_size} and --weights {config.weights}: the weights' config.json is of another "
            "shape; leave --llama_size out"
        )
    return found


def starts_at_random(config: TrainConfig) -> bool:
    """True where the Llama has no pretrained weights to start from."""
    return config.weights is None and (config.llama_size == "tiny" or config.random_weights)


def described(config: TrainConfig, llama: LlamaConfig) -> str:
    """The Llama of a configuration in a few words."""
    start = "from --load_checkpoint" if config.load_checkpoint else (
        "at random (no published weights)" if config.llama_size == "tiny" and config.weights is None
        else "at random (--random_weights)" if config.random_weights else "pretrained"
    )  # fmt: skip
    size = config.weights.name if config.weights else config.llama_size
    return (
        f"Llama {size} (width {llama.hidden_size}, {llama.num_layers} layers, {start}, "
        f"{'frozen' if config.freeze_llama else 'trainable'}, {config.precision})"
    )


def compute(precision: str, remat: str = "none", chunk_elements: int | None = None) -> Compute:
    """How the Llama computes under `--precision` (resolved) and `--gradient_checkpointing`."""
    return Compute(jnp.bfloat16 if precision == "bfloat16" else jnp.float32, remat, chunk_elements)


def llama_param_dtype(config: TrainConfig) -> Any:
    """Trained parameters are float32 masters; a frozen Llama is kept in the precision it computes in."""
    return compute(config.precision).dtype if config.freeze_llama else jnp.float32


def weights_folder(config: TrainConfig) -> Path:
    """Where the pretrained Llama's files are: --weights, or the published ones of --llama_size (downloaded once)."""
    loader = LlamaLoader(path=config.weights) if config.weights else LlamaLoader(model_size=config.llama_size)
    try:
        return loader.folder()
    except CheckpointError as error:
        raise UserError(str(error)) from error


def load_llama(folder: Path, param_dtype: Any, mesh: Mesh | None = None) -> nnx.State:
    """The parameters of the Llama in `folder`, on `mesh` or one device; what is wrong with its files is a UserError."""
    try:
        _, params, _ = LlamaLoader(path=folder).load_model(param_dtype=param_dtype, mesh=mesh)
    except ValueError as error:
        raise UserError(str(error)) from error
    return params


def with_llama(
    recommender: Recommender, key: jax.Array, llama_params: nnx.State, mesh: Mesh | None = None
) -> nnx.Module:
    """A model at its random start whose Llama has the given parameters; the Llama is never in memory twice."""
    graphdef, state = nnx.split(nnx.eval_shape(recommender.init, key))
    laid = None if mesh is None else sharding.shardings(nnx.filter_state(state, nnx.Not(in_llama)), mesh)
    # Only what is not the Llama leaves this program, so XLA never makes a random Llama.
    own = jax.jit(lambda: nnx.state(recommender.init(key), nnx.Not(in_llama)), out_shardings=laid)()
    return nnx.merge(graphdef, own, nnx.State({"llama": llama_params}))
