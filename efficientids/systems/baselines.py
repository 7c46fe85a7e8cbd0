"""`--recommender item_knn` and `popularity`: from a configuration and a data set to what is counted in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Recommender
from efficientids.recommenders.item_knn import ItemKNN, ItemKNNSpec
from efficientids.recommenders.popularity import Popularity, PopularitySpec
from efficientids.systems import base
from efficientids.systems.base import Earlier, Record, Scale, unrecorded


class CountedSystem:
    """What the systems have in common whose model is made by counting (see `efficientids.systems.base.System`)."""

    may_change: frozenset[str] = frozenset()

    def resolve(self, config: TrainConfig, scale: Scale) -> TrainConfig:
        """Nothing is open but where the data are."""
        return dataclasses.replace(config, data_dir=None if scale.dataset is None else Path(scale.dataset.path))

    def mode(self, config: TrainConfig, resolved: TrainConfig) -> str | None:
        """None: nothing trains."""
        return None

    def pretrained(self, config: TrainConfig) -> bool:
        """False: there are no published weights."""
        return False

    def start(self, recommender: Recommender, config: TrainConfig, mesh: Mesh | None = None) -> nnx.Module:
        """The counted model."""
        return recommender.init(jax.random.key(0))


class ItemKNNSystem(CountedSystem):
    """Item-to-item nearest neighbours."""

    def headline(self, config: TrainConfig) -> str:
        """See `System.headline`."""
        return f"item-kNN, {config.neighbours} neighbours, the newest {config.seq_len} items, nothing to train"

    def recommender(
        self, config: TrainConfig, dataset: Dataset, earlier: Earlier | None, record: Record = unrecorded
    ) -> ItemKNN:
        """See `System.recommender`."""
        return ItemKNN(_knn_spec(config, dataset.catalogue_size), dataset.training_histories())

    def planned(self, config: TrainConfig, scale: Scale) -> ItemKNN:
        """See `System.planned`."""
        return ItemKNN(_knn_spec(config, scale.num_items))

    def restored(self, spec: Mapping[str, Any], config: TrainConfig, precision: str) -> ItemKNN:
        """See `System.restored`."""
        return ItemKNN(ItemKNNSpec.from_json(dict(spec)))


class PopularitySystem(CountedSystem):
    """The same items for everyone."""

    def headline(self, config: TrainConfig) -> str:
        """See `System.headline`."""
        return "popularity, the same items for everyone, nothing to train"

    def recommender(
        self, config: TrainConfig, dataset: Dataset, earlier: Earlier | None, record: Record = unrecorded
    ) -> Popularity:
        """See `System.recommender`."""
        items, _ = dataset.training_histories()
        return Popularity(PopularitySpec(dataset.catalogue_size), items)

    def planned(self, config: TrainConfig, scale: Scale) -> Popularity:
        """See `System.planned`."""
        return Popularity(PopularitySpec(scale.num_items))

    def restored(self, spec: Mapping[str, Any], config: TrainConfig, precision: str) -> Popularity:
        """See `System.restored`."""
        return Popularity(PopularitySpec.from_json(dict(spec)))


def _knn_spec(config: TrainConfig, num_items: int) -> ItemKNNSpec:
    try:
        return ItemKNNSpec(
            num_items,
            neighbours=min(config.neighbours, num_items),
            max_items=config.seq_len,
            window=config.pair_window,
            distance_power=config.distance_power,
            backward=config.backward,
            source_power=config.source_power,
            target_power=config.target_power,
            recency=config.recency,
            popularity_weight=config.popularity_weight,
        )
    except ValueError as error:
        raise UserError(f"--recommender item_knn: {error}") from error


SYSTEMS: dict[str, base.System] = {"item_knn": ItemKNNSystem(), "popularity": PopularitySystem()}
