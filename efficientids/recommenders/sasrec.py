"""SASRec as a recommender: the strong baseline that everything else is measured against.

Legend: B rows, H history items.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from core.models.sasrec import SASRec, SASRecConfig
from efficientids.recommenders.base import Batch, Histories, LossSum, Phase, Ranked, Training
from efficientids.recommenders.shapes import ranked


@dataclasses.dataclass(frozen=True)
class SASRecSpec:
    """The model's own configuration is all that decides its shapes."""

    model: SASRecConfig

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `model.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> SASRecSpec:
        """The inverse of `to_json`; KeyError, TypeError where fields are missing or unknown."""
        return SASRecSpec(SASRecConfig(**values["model"]))


class SASRecRecommender:
    """See `efficientids.recommenders.base.Recommender`; `training` is None where nothing is to be trained."""

    def __init__(self, spec: SASRecSpec, training: Training | None = None) -> None:
        self.spec, self._training = spec, training

    @property
    def max_items(self) -> int:
        """The newest items of a history that the model looks at."""
        return self.spec.model.max_items

    @property
    def history(self) -> str:
        """The same in words."""
        return f"newest {self.max_items} items"

    def init(self, key: jax.Array) -> SASRec:
        """The whole system at its start."""
        return SASRec(self.spec.model, key)

    def plan(self) -> Sequence[Phase]:
        """One phase: everything."""
        if self._training is None:
            raise ValueError("this recommender was built without `training`")
        return [self._training.phase("sasrec", nnx.Param, self._loss)]

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        """The k most probable next items, exactly.

        Raises:
            ValueError: ids outside 0 … N.
        """
        return ranked(
            self._top_k, model, histories, k, exclude, max_items=self.max_items, num_items=self.spec.model.num_items
        )

    @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="k")
    def _top_k(
        self, graphdef: Any, state: nnx.State, ids: jax.Array, lengths: jax.Array, exclude: jax.Array, *, k: int
    ) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graphdef, state).top_k(ids, lengths, k, exclude)

    def _loss(self, model: SASRec, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        total, targets = model.loss(batch["item_ids"], batch["lengths"], key)
        return LossSum(total, targets, targets, {})
