"""`--recommender efficientids`: from a configuration and a data set to EfficientIDS and its model at the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from core.chunked import CHUNK_ELEMENTS
from core.clustering import default_num_clusters
from core.config import LlamaConfig
from core.models.efficientids import EfficientIDSConfig
from core.packing import PackPlan
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Recommender
from efficientids.recommenders.efficientids import EfficientIDS, EfficientIDSSpec
from efficientids.systems import base
from efficientids.systems.base import Earlier, Packing, Record, Scale, unrecorded
from efficientids.systems.buffers import (
    check_same_buffers,
    cluster_shape,
    clusters_of,
    made_clusters,
    title_tokens,
    titled_items,
)  # fmt: skip
from efficientids.systems.llama import (
    attention_in_words,
    checked_compute,
    described,
    llama_config,
    llama_init,
    lora_config,
    mode_text,
    resolve_mode,
    restored_compute,
    starts_at_random,
    text_tokenizer_file,
    training_mode,
)  # fmt: skip
from efficientids.systems.llama_defaults import check_positions, from_scratch, start, with_llama_defaults

# The full softmax is the plainer model and needs no clusters; its cost decides against it only for large catalogues
# (benchmarks/softmax.py measures where: on a CPU the two-level head costs less at every size).
TWO_LEVEL_FROM = 100_000


class EfficientIDSSystem:
    """See `efficientids.systems.base.System`."""

    # How long sequences are and how text is weighed may change; what has parameters or buffers may not.
    may_change = frozenset({"seq_len", "max_seq_len", "text_loss_weight", "model.dropout", "model.init_std"})

    def resolve(self, config: TrainConfig, scale: Scale) -> TrainConfig:
        """See `System.resolve`."""
        llama = llama_config(config)
        _check_lengths(config, llama)
        item_dim = config.item_dim or min(384, llama.hidden_size)
        if config.item_rank is not None and config.item_rank > item_dim:
            raise UserError(
                f"--item_rank {config.item_rank}: item vectors have {item_dim} dimensions; give at most that"
            )
        titled = config.item_text == "title"
        one_shape = titled or config.pack_sequences  # a titled or packed row takes seq_len positions, whatever is in it
        if one_shape and config.length_buckets not in (1, TrainConfig.length_buckets):
            flag = "--pack_sequences" if config.pack_sequences else "--item_text title"
            raise UserError(f"--length_buckets {config.length_buckets}: rows of {flag} have one shape; leave it out")
        max_items = config.max_seq_len or (config.seq_len // 2 if titled else config.seq_len)
        config = dataclasses.replace(
            with_llama_defaults(config, scale, llama),
            max_seq_len=max_items,
            item_dim=item_dim,
            tokenizer=_tokenizer(config),
            length_buckets=1 if one_shape else config.length_buckets,
            **_head(config, scale.num_items),
        )
        config = resolve_mode(config, llama, from_scratch=from_scratch(config))
        buckets = base.buckets_of(config, max_items, _packing_at(config, scale, llama))
        return base.resolve_training(config, scale, buckets, max_warmup=100 if config.train == "frozen" else 500)

    def mode(self, config: TrainConfig, resolved: TrainConfig) -> str:
        """See `System.mode`."""
        return mode_text(resolved, training_mode(config, llama_config(config))[1])

    def headline(self, config: TrainConfig) -> str:
        """See `System.headline`."""
        llama = llama_config(config)
        words = f"{described(config, llama)}, {config.head} head, {config.seq_len} positions"
        return words + attention_in_words(config, llama)

    def recommender(
        self, config: TrainConfig, dataset: Dataset, earlier: Earlier | None, record: Record = unrecorded
    ) -> EfficientIDS:
        """See `System.recommender`."""
        llama = llama_config(config)
        titles, bos = title_tokens(config, llama, dataset) if config.item_text == "title" else (None, 0)
        clusters = None if earlier is None else clusters_of(earlier.model)
        if config.head == "two_level" and clusters is None:
            clusters = made_clusters(config, dataset)
        check_same_buffers(earlier, config, clusters, titles)
        max_items = config.max_seq_len
        assert max_items is not None
        window = max_items if titles is None else min(max_items, titled_items(config.seq_len, titles, dataset))
        shape = (0, 0) if clusters is None else (clusters.num_clusters, clusters.members_CM.shape[1])
        return EfficientIDS(
            spec(config, llama, dataset.catalogue_size, shape, bos),
            compute=checked_compute(config, llama),
            init=llama_init(config),
            clusters=clusters,
            titles=titles,
            training=base.training(
                config, max_items, dataset, window_items=window, packing=_packing(config, dataset, titles)
            ),
        )

    def pretrained(self, config: TrainConfig) -> bool:
        """See `System.pretrained`."""
        return not starts_at_random(config)

    def start(self, recommender: Recommender, config: TrainConfig, mesh: Mesh | None = None) -> nnx.Module:
        """At random, or with the pretrained Llama in its place."""
        return start(recommender, config, recommender.spec.model.llama, mesh)

    def planned(self, config: TrainConfig, scale: Scale) -> EfficientIDS:
        """Clusters, where there are any, are those of --clustering, or taken to be balanced.

        For a GPU: the loss is cut into chunks of its size, and attention is cuDNN's where that can be compiled here.
        """
        assert config.max_seq_len is not None
        llama = llama_config(config)
        return EfficientIDS(
            spec(config, llama, scale.num_items, cluster_shape(config, scale.num_items)),
            compute=checked_compute(config, llama, chunk_elements=CHUNK_ELEMENTS, platform="gpu"),
            init=llama_init(config),
            training=base.training(config, config.max_seq_len, None, packing=_planned_packing(config, scale)),
        )

    def restored(self, spec: Mapping[str, Any], config: TrainConfig, precision: str) -> EfficientIDS:
        """See `System.restored`."""
        known = EfficientIDSSpec.from_json(dict(spec))
        return EfficientIDS(known, compute=restored_compute(config, precision), init=llama_init(config))


SYSTEMS: dict[str, base.System] = {"efficientids": EfficientIDSSystem()}


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
            lora=lora_config(config),
        ),
        seq_len=config.seq_len,
        max_seq_len=config.max_seq_len,
        num_clusters=cluster_shape[0],
        cluster_slots=cluster_shape[1],
        title_tokens=config.title_tokens if config.item_text == "title" else 0,
        bos=bos,
        text_loss_weight=config.text_loss_weight,
    )


def _packing(config: TrainConfig, dataset: Dataset, titles: np.ndarray | None) -> Packing | None:
    """How `--pack_sequences` packs the training histories; None without it."""
    if not config.pack_sequences:
        return None
    size = dataset.catalogue_size + 1
    widths_N = np.ones(size, np.int64) if titles is None else 1 + (titles >= 0).sum(axis=1)
    items, offsets = dataset.training_histories()
    ends = np.concatenate([[0], np.cumsum(widths_N[items])])[offsets]
    return _packed(config, np.diff(ends), dataset.train_lengths, widths_N, bos=titles is not None)


def _packing_at(config: TrainConfig, scale: Scale, llama: LlamaConfig) -> Packing | None:
    """As `_packing`, as far as `scale` knows a data set."""
    if scale.dataset is None or not config.pack_sequences:
        return _planned_packing(config, scale)
    titles = title_tokens(config, llama, scale.dataset)[0] if config.item_text == "title" else None
    return _packing(config, scale.dataset, titles)


def _planned_packing(config: TrainConfig, scale: Scale) -> Packing | None:
    """The same without data: every text as long as it may be."""
    if not config.pack_sequences:
        return None
    titled = config.item_text == "title"
    widths_N = np.full(scale.num_items + 1, 1 + (config.title_tokens if titled else 0))
    return _packed(config, scale.train_lengths * widths_N[0], scale.train_lengths, widths_N, bos=titled)


def _packed(config: TrainConfig, sizes_U: np.ndarray, items_U: np.ndarray, widths_N: np.ndarray, bos: bool) -> Packing:
    assert config.batch_size is not None
    trains = items_U >= 2
    rows = config.batch_size * config.gradient_accumulation
    plan = PackPlan.of(sizes_U[trains], items_U[trains], rows=rows, positions=config.seq_len, bos=int(bos))
    return Packing(plan, widths_N)


def _head(config: TrainConfig, num_items: int) -> dict[str, Any]:
    """`head` and `num_clusters`, settled."""
    head, clusters = config.head, config.num_clusters
    if head == "auto":
        wants_clusters = config.clustering is not None or clusters is not None
        head = "two_level" if wants_clusters or num_items >= TWO_LEVEL_FROM else "full"
    if head == "two_level" and clusters is None and config.clustering is None:
        clusters = default_num_clusters(num_items)
    if clusters is not None and clusters > num_items:
        raise UserError(f"--num_clusters {clusters}: the catalogue has {num_items} items; give at most that many")
    return {"head": head, "num_clusters": clusters}


def _tokenizer(config: TrainConfig) -> Path | None:
    return config.tokenizer if config.item_text == "none" else text_tokenizer_file(config, "--item_text title")


def _check_lengths(config: TrainConfig, llama: LlamaConfig) -> None:
    check_positions(llama, config.seq_len, f"--seq_len {config.seq_len}")
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
