"""Fills in what the configuration leaves open, from the data set and the Llama at hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax

from core.clustering import default_num_clusters
from core.config import LLAMA_SIZES, LlamaConfig
from efficientids.config import TrainConfig
from efficientids.data.batches import training_users
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError

# The full softmax is the plainer model and needs no clusters; its cost decides against it only for large catalogues
# (benchmarks/softmax.py measures where: on a CPU the two-level head costs less at every size).
TWO_LEVEL_FROM = 100_000
# From this width on a layer's activations cost more memory than its recomputation costs time.
REMAT_FROM_WIDTH = 1024
DEFAULT_EPOCHS = 10.0


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


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the defaults need to know of a data set. Without one, planning assumes MovieLens 1M, 5-core."""

    num_items: int = 3416
    training_users: int = 6040
    path: Path | None = None

    @staticmethod
    def of(dataset: Dataset) -> Scale:
        """The scale of a prepared data set.

        Raises:
            UserError: nobody to train on, or nobody to evaluate on: better now than after the first steps.
        """
        users = len(training_users(dataset))
        if not users:
            raise UserError(f"{dataset.path}: no user has 2 items to train on; prepare a data set with more")
        if not (dataset.targets("validation") > 0).any():
            raise UserError(f"{dataset.path}: no user has 3 interactions, which leave-one-out needs; prepare more")
        return Scale(dataset.catalogue_size, users, dataset.path)


def resolve(config: TrainConfig, llama: LlamaConfig, scale: Scale) -> TrainConfig:
    """The configuration with every `None` and `auto` that has a default replaced by it."""
    _check_lengths(config, llama)
    random = starts_at_random(config)
    small = llama.hidden_size < REMAT_FROM_WIDTH
    on_gpu = jax.default_backend() == "gpu"
    batch = config.batch_size or config.batch_size_per_device or (64 if small else 8)
    # One device for now: a batch on one device is the batch.
    rows = batch * config.gradient_accumulation
    epoch = math.ceil(scale.training_users / rows)
    num_steps = config.num_steps or max(1, math.ceil((config.epochs or DEFAULT_EPOCHS) * epoch))
    head = config.head
    if head == "auto":
        wants_clusters = config.clustering is not None or config.num_clusters is not None
        head = "two_level" if wants_clusters or scale.num_items >= TWO_LEVEL_FROM else "full"
    clusters = config.num_clusters
    if head == "two_level" and clusters is None and config.clustering is None:
        clusters = default_num_clusters(scale.num_items)
    from_scratch = random and config.load_checkpoint is None
    rate = 1e-3 if from_scratch else 5e-4 if config.freeze_llama else 5e-5
    warmup = config.warmup_steps
    if warmup is None:
        warmup = min(100 if config.freeze_llama else 500, num_steps // 10)
    if clusters is not None and clusters > scale.num_items:
        raise UserError(f"--num_clusters {clusters}: the catalogue has {scale.num_items} items; give at most that many")
    item_dim = config.item_dim or min(384, llama.hidden_size)
    if config.item_rank is not None and config.item_rank > item_dim:
        raise UserError(f"--item_rank {config.item_rank}: item vectors have {item_dim} dimensions; give at most that")
    remat = config.gradient_checkpointing
    return dataclasses.replace(
        config,
        data_dir=scale.path,
        batch_size=batch,
        batch_size_per_device=None,
        num_steps=num_steps,
        epochs=None,
        eval_every=config.eval_every or max(1, min(epoch, 1000)),
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        warmup_steps=warmup,
        dropout=(0.2 if random and small else 0.0) if config.dropout is None else config.dropout,
        precision=("bfloat16" if on_gpu else "float32") if config.precision == "auto" else config.precision,
        gradient_checkpointing=("dots" if small else "full") if remat == "auto" else remat,
        max_seq_len=config.max_seq_len or (config.seq_len if config.item_text == "none" else config.seq_len // 2),
        item_dim=item_dim,
        head=head,
        num_clusters=clusters,
        tokenizer=_tokenizer(config),
    )


def _tokenizer(config: TrainConfig) -> Path | None:
    """The file to read titles with; None: none is needed, or the one that comes with the weights of --llama_size."""
    if config.item_text == "none" or config.tokenizer is not None:
        return config.tokenizer
    if config.weights is not None:
        return config.weights / "tokenizer.json"
    if starts_at_random(config):
        raise UserError("--item_text title needs a tokenizer: give --tokenizer FILE, or --weights with one beside them")
    return None


def _check_lengths(config: TrainConfig, llama: LlamaConfig) -> None:
    limit = llama.max_position_embeddings
    if config.seq_len > limit and (llama.rope_scaling is None or llama.rope_scaling.kind != "dynamic"):
        raise UserError(f"--seq_len {config.seq_len}: the Llama has max_position_embeddings {limit}; give at most that")
    if config.max_seq_len is not None and config.max_seq_len > config.seq_len:
        raise UserError(
            f"--max_seq_len {config.max_seq_len}: an item takes a position, and --seq_len is {config.seq_len}; "
            "raise --seq_len, or leave --max_seq_len out"
        )
    titled = 1 + 2 * (1 + config.title_tokens)
    if config.item_text == "title" and config.seq_len < titled:
        raise UserError(
            f"--seq_len {config.seq_len}: BOS and two items with titles of --title_tokens {config.title_tokens} need "
            f"{titled} positions; raise --seq_len or lower --title_tokens"
        )
