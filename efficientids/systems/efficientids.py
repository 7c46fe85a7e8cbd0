"""From a configuration and a data set to a recommender and its model at the start."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core import clustering
from core.clustering import Clusters
from core.config import LlamaConfig
from core.layers import Init
from core.llama import Compute
from core.llama_loader import LlamaLoader
from core.models.efficientids import EfficientIDSConfig
from core.weight_files import CheckpointError
from efficientids.config import TrainConfig
from efficientids.data.batches import steps_per_epoch, training_batches
from efficientids.data.cooccurrence import cooccurrence_vectors
from efficientids.data.dataset import Dataset
from efficientids.data.titles import title_table
from efficientids.errors import UserError
from efficientids.recommenders.base import Batch, OptimizerConfig, in_llama
from efficientids.recommenders.efficientids import EfficientIDS, EfficientIDSSpec, Training
from efficientids.resolve import starts_at_random


def compute(precision: str, remat: str = "none", chunk_elements: int | None = None) -> Compute:
    """How the Llama computes under `--precision` (resolved) and `--gradient_checkpointing`."""
    return Compute(jnp.bfloat16 if precision == "bfloat16" else jnp.float32, remat, chunk_elements)


def llama_param_dtype(config: TrainConfig) -> Any:
    """Trained parameters are float32 masters; a frozen Llama is kept in the precision it computes in."""
    return compute(config.precision).dtype if config.freeze_llama else jnp.float32


def recommender(
    config: TrainConfig, llama: LlamaConfig, dataset: Dataset, clusters: Clusters | None = None
) -> EfficientIDS:
    """The system that a resolved configuration describes, ready to train on `dataset`.

    `clusters`: those of an earlier run whose parameters will be taken over; None: given or made anew.
    """
    titles, bos = None, 0
    if config.item_text == "title":
        tokenizer = config.tokenizer or weights_folder(config) / "tokenizer.json"
        if "title" not in dataset.items.columns:
            raise UserError(f"--item_text title: the items of {dataset.path} have no titles; leave the flag out")
        texts = dataset.items["title"].to_list()
        titles, bos = title_table(texts, tokenizer, config.title_tokens, llama.vocab_size)
    if config.head == "two_level" and clusters is None:
        clusters = _clusters(config, dataset)
    shape = (0, 0) if clusters is None else (clusters.num_clusters, clusters.members_CM.shape[1])
    return EfficientIDS(
        spec(config, llama, dataset.catalogue_size, shape, bos),
        compute=compute(config.precision, config.gradient_checkpointing),
        init=Init(param_dtype=llama_param_dtype(config)),
        clusters=clusters,
        titles=titles,
        training=_training(config, dataset, titles),
    )


def spec(
    config: TrainConfig, llama: LlamaConfig, num_items: int, cluster_shape: tuple[int, int], bos: int = 0
) -> EfficientIDSSpec:
    """The shapes of a resolved configuration; `cluster_shape`: clusters, members of the largest; (0, 0) for none."""
    assert config.item_dim is not None and config.max_seq_len is not None and config.dropout is not None
    return EfficientIDSSpec(
        model=EfficientIDSConfig(
            llama=llama,
            num_items=num_items,
            item_dim=config.item_dim,
            item_rank=config.item_rank,
            head="full" if config.head == "full" else "two_level",
            output_tying=config.output_tying,
            init_std=config.init_std,
            dropout=config.dropout,
        ),
        seq_len=config.seq_len,
        max_seq_len=config.max_seq_len,
        num_clusters=cluster_shape[0],
        cluster_slots=cluster_shape[1],
        title_tokens=config.title_tokens if config.item_text == "title" else 0,
        bos=bos,
        text_loss_weight=config.text_loss_weight,
    )


def start(system: EfficientIDS, config: TrainConfig) -> nnx.Module:
    """The model before its first step: at random, or with the pretrained Llama in its place."""
    key = jax.random.key(config.seed)
    if starts_at_random(config):
        return jax.jit(system.init)(key)
    folder = weights_folder(config)
    differing = differing_fields(LlamaConfig.from_hf(folder), system.spec.model.llama)
    if differing:
        listed = "\n  ".join(differing)
        raise UserError(f"{folder / 'config.json'} is not the shape of --llama_size {config.llama_size}:\n  {listed}")
    return with_llama(system, key, load_llama(folder, llama_param_dtype(config)))


def weights_folder(config: TrainConfig) -> Path:
    """Where the pretrained Llama's files are: --weights, or the published ones of --llama_size (downloaded once)."""
    loader = LlamaLoader(path=config.weights) if config.weights else LlamaLoader(model_size=config.llama_size)
    try:
        return loader.folder()
    except CheckpointError as error:
        raise UserError(str(error)) from error


def load_llama(folder: Path, param_dtype: Any) -> nnx.State:
    """The parameters of the Llama in `folder`; what is wrong with its files is a UserError."""
    try:
        _, params, _ = LlamaLoader(path=folder).load_model(param_dtype=param_dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    return params


def with_llama(system: EfficientIDS, key: jax.Array, llama_params: nnx.State) -> nnx.Module:
    """A model at its random start whose Llama has the given parameters; the Llama is never in memory twice."""
    graphdef, _ = nnx.split(nnx.eval_shape(system.init, key))
    # Only what is not the Llama leaves this program, so XLA never makes a random Llama.
    own = jax.jit(lambda k: nnx.state(system.init(k), nnx.Not(in_llama)))(key)
    return nnx.merge(graphdef, own, nnx.State({"llama": llama_params}))


def training(config: TrainConfig, steps_per_epoch: float, batches: Callable[[int, int], Iterator[Batch]]) -> Training:
    """How a resolved configuration trains; `batches` as in `Phase`."""
    assert config.num_steps is not None and config.batch_size is not None
    assert config.learning_rate is not None and config.warmup_steps is not None
    return Training(
        num_steps=config.num_steps,
        steps_per_epoch=steps_per_epoch,
        batch_rows=config.batch_size * config.gradient_accumulation,
        optimizer=OptimizerConfig(config.learning_rate, config.warmup_steps, config.weight_decay),
        freeze_llama=config.freeze_llama,
        batches=batches,
    )


def _training(config: TrainConfig, dataset: Dataset, titles: np.ndarray | None) -> Training:
    assert config.batch_size is not None and config.max_seq_len is not None
    rows, max_items = config.batch_size * config.gradient_accumulation, config.max_seq_len
    window = max_items if titles is None else min(max_items, titled_items(config.seq_len, titles, dataset))

    def batches(seed: int, start_step: int) -> Iterator[Batch]:
        return training_batches(
            dataset,
            batch_size=rows,
            max_items=max_items,
            window_items=window,
            seed=seed,
            start_step=start_step,
        )

    return training(config, steps_per_epoch(dataset, rows), batches)


def titled_items(seq_len: int, titles: np.ndarray, dataset: Dataset) -> int:
    """How many items fit with their titles into `seq_len` positions, on average over the interactions; at least 2."""
    width_N = 1 + (titles >= 0).sum(axis=1)
    return max(2, int((seq_len - 1) / width_N[dataset.item_ids].mean()))


def _clusters(config: TrainConfig, dataset: Dataset) -> Clusters:
    size = dataset.catalogue_size
    if config.clustering is not None:
        return given_clusters(config.clustering, size)
    count = config.num_clusters
    assert count is not None
    items, offsets = training_histories(dataset)
    vectors = cooccurrence_vectors(items, offsets, size, dim=64, window=10, seed=config.seed)
    # By direction alone: popular items have long vectors, which would make a cluster of their own kind.
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    assignment = clustering.kmeans(vectors, count, jax.random.key(config.seed), balanced=True)
    return clustering.from_assignment(np.asarray(assignment), count)


def given_clusters(file: Path, num_items: int) -> Clusters:
    """The clusters of `--clustering FILE`.

    Raises:
        UserError: no such file, or not one cluster id for each of `num_items` items, without a gap.
    """
    try:
        given = clustering.load_clustering(file, num_items)
        return clustering.from_assignment(given, int(given.max()) + 1)
    except (ValueError, OSError) as error:
        raise UserError(f"--clustering: {error}") from error


def training_histories(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """All users' training items, flat, and where each user's begin: nothing held out is among them."""
    lengths = dataset.split_lengths("train")
    kept = np.arange(len(dataset.item_ids)) - np.repeat(dataset.offsets[:-1], dataset.lengths)
    items = dataset.item_ids[kept < np.repeat(lengths, dataset.lengths)]
    return items, np.concatenate([[0], np.cumsum(lengths)])


def describe(
    system: EfficientIDS, config: TrainConfig, dataset: Dataset, weights: dict[str, str] | None, run: Path
) -> dict[str, Any]:
    """What `model.json` says: enough to rebuild the model and to find its data set and its weight file.

    Args:
        weights: path and sha256 of the frozen Llama's weight file; None where checkpoints hold every parameter.
        run: the run folder; a data set inside it is named relative to it, so that the folder can be moved.
    """
    data, home = Path(dataset.path).resolve(), run.resolve()
    return {
        "recommender": config.recommender,
        "spec": system.spec.to_json(),
        "precision": config.precision,
        "dataset": {
            "path": str(data.relative_to(home) if data.is_relative_to(home) else data),
            "fingerprint": dataset.fingerprint,
            "items_sha256": items_sha256(dataset),
        },
        "frozen_weights": weights,
    }


def items_sha256(dataset: Dataset) -> str:
    """Which item each index stands for: the sha256 of the external ids in order, a line each."""
    return hashlib.sha256("\n".join(dataset.items["item_id"].to_list()).encode()).hexdigest()


def abstract(spec: EfficientIDSSpec, precision: str, param_dtype: Any) -> tuple[EfficientIDS, nnx.GraphDef, nnx.State]:
    """The recommender of a run, its graph definition, and its state as shapes and dtypes."""
    system = EfficientIDS(spec, compute=compute(precision), init=Init(param_dtype=param_dtype))
    return system, *nnx.split(nnx.eval_shape(system.init, jax.random.key(0)))


def differing_fields(one: Any, other: Any, prefix: str = "") -> list[str]:
    """`name: a ≠ b` for each field in which two dataclasses differ."""
    lines: list[str] = []
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            lines += differing_fields(a, b, f"{prefix}{field.name}.")
        elif a != b:
            lines.append(f"{prefix}{field.name}: {a} ≠ {b}")
    return lines
