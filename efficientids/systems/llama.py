"""The Llama that a configuration asks for: its shape, where its weights are, how it computes and starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from core import sharding
from core.config import LLAMA_SIZES, LlamaConfig
from core.hf_names import num_parameters
from core.layers import Init
from core.llama import Compute
from core.llama_loader import LlamaLoader
from core.lora import LoRAConfig
from core.quantized import Format
from core.weight_files import CheckpointError
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Recommender, in_base

# From this size on training everything needs more than 60 GB (float32 master, gradient, two moments): adapters do.
LORA_FROM_PARAMETERS = 5_000_000_000
LORA_RANK, LORA_TARGETS = 64, "q,k,v,o"
_LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")


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
    if config.llama_size != TrainConfig.llama_size and found != LLAMA_SIZES[config.llama_size].config:
        raise UserError(
            f"--llama_size {config.llama_size} and --weights {config.weights}: the weights' config.json is of another "
            "shape; leave --llama_size out"
        )
    return found


def starts_at_random(config: TrainConfig) -> bool:
    """True where the Llama has no pretrained weights to start from."""
    return config.weights is None and (LLAMA_SIZES[config.llama_size].hf_id is None or config.random_weights)


def text_tokenizer_file(config: TrainConfig, what: str) -> Path | None:
    """The tokenizer.json to read texts with; None: the published one of --llama_size (`published_tokenizer`).

    Raises:
        UserError: there is none for `what`, a flag.
    """
    if config.tokenizer is not None:
        return config.tokenizer
    if config.weights is not None:
        return config.weights / "tokenizer.json"
    if starts_at_random(config):
        raise UserError(f"{what} needs a tokenizer: give --tokenizer FILE, or --weights with one beside them")
    return None


def training_mode(config: TrainConfig, llama: LlamaConfig) -> tuple[str, str]:
    """What `--train` comes to (frozen, lora or full), and why.

    Raises:
        UserError: flags that contradict it.
    """
    adapters = [name for name in _LORA_FLAGS if getattr(config, name) is not None]
    size = num_parameters(llama)
    shown = f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.2g} million"
    if config.train != "auto":
        mode, why = config.train, f"--train {config.train}"
        if config.freeze_llama and mode != "frozen":
            raise UserError(f"--freeze_llama and --train {mode} exclude each other; give one")
    elif config.freeze_llama:
        mode, why = "frozen", "--freeze_llama"
    elif config.lora_rank is not None:
        mode, why = "lora", "--lora_rank is given"
    elif size >= LORA_FROM_PARAMETERS:
        mode, why = "lora", f"{shown} parameters; --train full trains them all"
    else:
        mode, why = "full", f"{shown} parameters, fewer than {LORA_FROM_PARAMETERS / 1e9:g} billion"
    if adapters and mode != "lora":
        raise UserError(f"--{adapters[0]} needs --train lora; this run is --train {mode} ({why})")
    if config.quantize != "none" and mode == "full":
        raise UserError(
            f"--quantize {config.quantize}: quantised weights cannot be trained, and this run is --train full ({why}); "
            "add --train lora or --train frozen"
        )
    return mode, why


def resolve_mode(config: TrainConfig, llama: LlamaConfig, *, from_scratch: bool) -> TrainConfig:
    """`train`, the adapters' settings and the Llama's learning rate, settled; `learning_rate` is settled already."""
    mode, _ = training_mode(config, llama)
    own = config.learning_rate if from_scratch else 2e-4 if mode == "lora" else 5e-5
    settled: dict[str, Any] = {"train": mode, "freeze_llama": mode == "frozen"}
    if mode == "lora":
        rank = config.lora_rank or LORA_RANK
        settled |= {
            "lora_rank": rank,
            "lora_alpha": config.lora_alpha or 2.0 * rank,
            "lora_targets": LORA_TARGETS if config.lora_targets is None else config.lora_targets,
            "lora_dropout": config.lora_dropout or 0.0,
        }
    if mode == "frozen" and config.llama_learning_rate is not None:
        raise UserError(f"--llama_learning_rate {config.llama_learning_rate:g}: nothing of a frozen Llama trains")
    if mode != "frozen":
        settled["llama_learning_rate"] = config.llama_learning_rate or own
    config = dataclasses.replace(config, **settled)
    lora_config(config)
    return config


def mode_text(config: TrainConfig, why: str) -> str:
    """The training mode of a resolved configuration as a line."""
    what = {
        "frozen": "frozen Llama: item vectors, adapters to them and heads train",
        "lora": f"LoRA on {config.lora_targets}, r {config.lora_rank}, alpha {config.lora_alpha or 0:g}",
        "full": "everything trains",
    }[config.train]
    held = "" if config.quantize == "none" else f", base held in {config.quantize}"
    return f"--train {config.train}: {what}{held} ({why})"


def lora_config(config: TrainConfig) -> LoRAConfig | None:
    """The adapters of a resolved configuration; None without `--train lora`."""
    if config.train != "lora":
        return None
    assert config.lora_rank is not None and config.lora_alpha is not None and config.lora_targets is not None
    targets = tuple(name.strip() for name in config.lora_targets.split(","))
    try:
        return LoRAConfig(config.lora_rank, config.lora_alpha, targets, config.lora_dropout or 0.0)
    except ValueError as error:
        raise UserError(f"--lora_targets, --lora_rank, --lora_alpha, --lora_dropout: {error}") from error


def described(config: TrainConfig, llama: LlamaConfig) -> str:
    """The Llama of a configuration in a few words."""
    start = "from --load_checkpoint" if config.load_checkpoint else (
        "at random (no published weights)" if LLAMA_SIZES[config.llama_size].hf_id is None and config.weights is None
        else "at random (--random_weights)" if config.random_weights else "pretrained"
    )  # fmt: skip
    size = config.weights.name if config.weights else config.llama_size
    return f"Llama {size} (width {llama.hidden_size}, {llama.num_layers} layers, {start}, {config.precision})"


def compute(precision: str, remat: str = "none", **more: Any) -> Compute:
    """How the Llama computes under `--precision` (resolved) and `--gradient_checkpointing`; `more`: other fields."""
    return Compute(jnp.bfloat16 if precision == "bfloat16" else jnp.float32, remat, **more)


def restored_compute(config: TrainConfig, precision: str) -> Compute:
    """How a trained run's Llama computes: one that trained with cuDNN's attention is asked anywhere; XLA's stays."""
    return compute(precision, attention="xla" if config.attention == "xla" else "auto")


def checked_compute(config: TrainConfig, llama: LlamaConfig, **more: Any) -> Compute:
    """`compute` of a resolved configuration.

    Raises:
        UserError: the kernel of `--attention` cannot run there.
    """
    made = compute(config.precision, config.gradient_checkpointing, attention=config.attention, **more)
    try:
        made.attention_kernel(llama.head_dim, config.pack_sequences)
    except ValueError as error:
        raise UserError(f"--attention {config.attention}: {error}; or leave --attention out") from error
    return made


def attention_in_words(config: TrainConfig, llama: LlamaConfig) -> str:
    """The attention kernel, behind a comma, where there is a choice: on a GPU. Raises as `checked_compute`."""
    choice = checked_compute(config, llama).attention_kernel(llama.head_dim, config.pack_sequences)
    return f", attention {choice}" if jax.default_backend() == "gpu" else ""


def base_is_frozen(config: TrainConfig) -> bool:
    """True where a resolved configuration trains none of the Llama's own weights."""
    return config.freeze_llama or config.train in ("frozen", "lora")


def llama_init(config: TrainConfig) -> Init:
    """How the Llama's own parameters are held: trained ones as float32 masters, frozen ones as they compute.

    Quantised where `--quantize` says so. Adapters are no part of it: they are in the model's own configuration.
    """
    dtype = compute(config.precision).dtype if base_is_frozen(config) else jnp.float32
    known = {name: name for name in get_args(Format)}
    return Init(param_dtype=dtype, quantize=known.get(config.quantize))


def weights_folder(config: TrainConfig) -> Path:
    """Where the pretrained Llama's files are: --weights, or the published ones of --llama_size (downloaded once)."""
    try:
        return _loader(config).folder()
    except CheckpointError as error:
        raise UserError(str(error)) from error


def published_tokenizer(config: TrainConfig) -> Path:
    """The tokenizer.json beside the weights, without downloading those: a plan needs no more.

    Raises:
        UserError: it cannot be had.
    """
    try:
        return _loader(config).tokenizer_folder() / "tokenizer.json"
    except CheckpointError as error:
        raise UserError(f"{error}; or give --tokenizer FILE") from error


def _loader(config: TrainConfig) -> LlamaLoader:
    return LlamaLoader(path=config.weights) if config.weights else LlamaLoader(model_size=config.llama_size)


def load_llama(folder: Path, init: Init, mesh: Mesh | None = None) -> nnx.State:
    """The parameters of the Llama in `folder`, on `mesh` or one device; what is wrong with its files is a UserError."""
    try:
        loader = LlamaLoader(path=folder)
        _, params, _ = loader.load_model(param_dtype=init.param_dtype, quantize=init.quantize, mesh=mesh)
    except ValueError as error:
        raise UserError(str(error)) from error
    return params


def with_llama(
    recommender: Recommender, key: jax.Array, llama_params: nnx.State, mesh: Mesh | None = None
) -> nnx.Module:
    """A model at its random start whose Llama has the given parameters; the Llama is never in memory twice."""
    graphdef, state = nnx.split(nnx.eval_shape(recommender.init, key))
    laid = None if mesh is None else sharding.shardings(nnx.filter_state(state, nnx.Not(in_base)), mesh)
    # Only what no weight file holds leaves this program, so XLA never makes a random Llama.
    own = jax.jit(lambda: nnx.state(recommender.init(key), nnx.Not(in_base)), out_shardings=laid)()
    return nnx.merge(graphdef, own, nnx.State({"llama": llama_params}))
