"""What EfficientIDS is given beside its parameters: clusters of the items, and their texts as tokens."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from core import clustering
from core.clustering import Clusters
from core.config import LlamaConfig
from efficientids.data import layout
from efficientids.data.cooccurrence import cooccurrence_vectors
from efficientids.data.dataset import Dataset
from efficientids.data.texts import templates
from efficientids.data.texts.tokens import title_table
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.systems.base import Earlier
from efficientids.systems.llama import published_tokenizer


def titled_items(seq_len: int, titles: np.ndarray, dataset: Dataset) -> int:
    """How many items fit with their titles into `seq_len` positions, on average over the interactions; at least 2."""
    width_N = 1 + (titles >= 0).sum(axis=1)
    return max(2, int((seq_len - 1) / width_N[dataset.item_ids].mean()))


def clusters_of(model: nnx.Module) -> Clusters | None:
    """The clusters that a model's parameters belong to; None with the full head."""
    buffers = getattr(model, "clusters", None)
    return None if buffers is None else Clusters(**{name: buffer[...] for name, buffer in buffers.items()})


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


def title_tokens(config: TrainConfig, llama: LlamaConfig, dataset: Dataset) -> tuple[np.ndarray, int]:
    """Token ids of every item's text, and BOS."""
    if config.item_template is None and "title" not in dataset.items.columns:
        raise UserError(
            f"--item_text title: the items of {dataset.path} have no titles; leave the flag out, or name other "
            "columns with --item_template"
        )
    template = templates.load(config.item_template or "title")
    tokenizer = config.tokenizer or published_tokenizer(config)
    source = str(dataset.path / layout.ITEMS)
    return title_table(dataset.items, template, tokenizer, config.title_tokens, llama.vocab_size, source=source)


def made_clusters(config: TrainConfig, dataset: Dataset) -> Clusters:
    size = dataset.catalogue_size
    if config.clustering is not None:
        return given_clusters(config.clustering, size)
    count = config.num_clusters
    assert count is not None
    items, offsets = dataset.training_histories()
    vectors = cooccurrence_vectors(items, offsets, size, dim=64, window=10, seed=config.seed)
    # By direction alone: popular items have long vectors, which would make a cluster of their own kind.
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    assignment = clustering.kmeans(vectors, count, jax.random.key(config.seed), balanced=True)
    return clustering.from_assignment(np.asarray(assignment), count)


def cluster_shape(config: TrainConfig, num_items: int) -> tuple[int, int]:
    """Clusters, and members of the largest; (0, 0) for none."""
    if config.head == "full":
        return 0, 0
    if config.clustering is not None:
        num_clusters, slots = given_clusters(config.clustering, num_items).members_CM.shape
        return num_clusters, slots
    assert config.num_clusters is not None
    return config.num_clusters, math.ceil(num_items / config.num_clusters)


def check_same_buffers(
    earlier: Earlier | None, config: TrainConfig, clusters: Clusters | None, titles: np.ndarray | None
) -> None:
    """Refuses to go on from parameters that belong to other clusters or titles."""
    if earlier is None:
        return
    if config.clustering is not None and clusters is not None:
        given = given_clusters(config.clustering, clusters.num_items)
        if not np.array_equal(given.cluster_of_item_N1, clusters.cluster_of_item_N1):
            raise UserError(
                f"--clustering {config.clustering} is not the clustering that {earlier.where} was trained with; "
                "leave it out to keep the run's"
            )
    trained_with = getattr(earlier.model, "titles_NK", None)
    if trained_with is not None and titles is not None and not np.array_equal(trained_with[...], titles):
        raise UserError(
            f"the titles' tokens differ from those that {earlier.where} was trained with; give the same --tokenizer, "
            "--item_template and data set"
        )
