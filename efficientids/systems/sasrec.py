"""`--recommender sasrec`: from a configuration and a data set to SASRec at its start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from core.models.sasrec import SASRecConfig
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Recommender
from efficientids.recommenders.sasrec import SASRecRecommender, SASRecSpec
from efficientids.systems import base
from efficientids.systems.base import Earlier, Record, Scale, unrecorded

_B2 = 0.98  # as in the original


class SASRecSystem:
    """See `efficientids.systems.base.System`."""

    may_change = frozenset({"model.dropout", "model.init_std"})

    def resolve(self, config: TrainConfig, scale: Scale) -> TrainConfig:
        """See `System.resolve`."""
        if config.width % config.num_heads:
            raise UserError(f"--width {config.width}: does not divide among --num_heads {config.num_heads}")
        if config.positions == "rotary" and config.width // config.num_heads % 2:
            raise UserError(f"--positions rotary: heads of {config.width // config.num_heads} are odd; raise --width")
        base.check_tensor(config, heads=config.num_heads)
        config = dataclasses.replace(
            base.resolve_batch(config, scale, 32),
            dropout=0.5 if config.dropout is None else config.dropout,
            init_std=config.init_std or 0.02,
            learning_rate=config.learning_rate or 1e-3,
        )
        buckets = base.buckets_of(config, config.seq_len)
        return base.resolve_training(config, scale, buckets, max_warmup=500)

    def headline(self, config: TrainConfig) -> str:
        """See `System.headline`."""
        return f"SASRec, width {config.width}, {config.num_layers} layers, {config.seq_len} positions, full softmax"

    def mode(self, config: TrainConfig, resolved: TrainConfig) -> str | None:
        """None: everything trains."""
        return None

    def recommender(
        self, config: TrainConfig, dataset: Dataset, earlier: Earlier | None, record: Record = unrecorded
    ) -> SASRecRecommender:
        """See `System.recommender`."""
        return SASRecRecommender(
            _spec(config, dataset.catalogue_size), base.training(config, config.seq_len, dataset, b2=_B2)
        )

    def pretrained(self, config: TrainConfig) -> bool:
        """False: there are no published weights."""
        return False

    def start(self, recommender: Recommender, config: TrainConfig, mesh: Mesh | None = None) -> nnx.Module:
        """At random."""
        return base.start_at_random(recommender, config, mesh)

    def planned(self, config: TrainConfig, scale: Scale) -> SASRecRecommender:
        """See `System.planned`."""
        return SASRecRecommender(_spec(config, scale.num_items), base.training(config, config.seq_len, None, b2=_B2))

    def restored(self, spec: Mapping[str, Any], config: TrainConfig, precision: str) -> SASRecRecommender:
        """See `System.restored`."""
        return SASRecRecommender(SASRecSpec.from_json(spec))


def _spec(config: TrainConfig, num_items: int) -> SASRecSpec:
    assert config.dropout is not None and config.init_std is not None
    return SASRecSpec(
        SASRecConfig(
            num_items, config.seq_len, config.width, config.num_layers, config.num_heads,
            config.dropout, config.positions, config.temperature, config.init_std,
        )
    )  # fmt: skip


SYSTEMS: dict[str, base.System] = {"sasrec": SASRecSystem()}
