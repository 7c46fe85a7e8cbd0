"""Popularity as a recommender: everyone is shown what is consumed most. The floor that any model must beat.

Legend: B rows, H history items, N items.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.functional import Buffer
from core.softmax import top_k_of
from efficientids.recommenders.base import Histories, Phase, Ranked
from efficientids.recommenders.shapes import ranked

_CHUNK_ELEMENTS = 1 << 25
"""Scores held at a time: 128 MB."""


@dataclasses.dataclass(frozen=True)
class PopularitySpec:
    """The shape of the system: N items."""

    num_items: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `model.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> PopularitySpec:
        """The inverse of `to_json`. Raises TypeError for missing or unknown fields."""
        return PopularitySpec(**values)


class PopularityModel(nnx.Module):
    """scores_N1: Buffer, float32 [N + 1]; see `popularity_scores`."""

    def __init__(self, scores_N1: np.ndarray) -> None:
        self.scores_N1 = Buffer(jnp.asarray(scores_N1))

    def __call__(self, item_ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """The scores of all items, float32 [B, N + 1], the same for every history."""
        return jnp.broadcast_to(self.scores_N1[...], (lengths.shape[0], self.scores_N1.shape[0]))


def item_counts(items: np.ndarray, num_items: int) -> np.ndarray:
    """How often each item occurs in the training histories `items` (flat, ids 1 … N), int64 [N + 1].

    Raises:
        ValueError: ids outside 1 … N.
    """
    if items.size and (items.min() < 1 or items.max() > num_items):
        raise ValueError(f"training histories: item ids {items.min()} … {items.max()}, expected 1 … {num_items}")
    return np.bincount(items, minlength=num_items + 1)


def popularity_scores(items: np.ndarray, num_items: int) -> np.ndarray:
    """float32 [N + 1] that order items by their count in the training histories `items`; −∞ at 0.

    The score of an item is 1 − place / N, so that it is in (0, 1] and no two items tie: counts do, often, and a tie
    counts against a model. Items of equal count stand in the order of their index.
    """
    counts_N = item_counts(items, num_items)[1:]
    scores_N1 = np.full(num_items + 1, -np.inf, np.float32)
    scores_N1[1 + np.argsort(-counts_N, kind="stable")] = 1 - np.arange(num_items) / max(num_items, 1)
    return scores_N1


class Popularity:
    """See `efficientids.recommenders.base.Recommender`.

    Args:
        spec: its shape.
        items: all training interactions, int [E], values 1 … N; None leaves the scores empty, for a checkpoint to fill.
    """

    history = "nothing"
    max_items = 1

    def __init__(self, spec: PopularitySpec, items: np.ndarray | None = None) -> None:
        self.spec, self._items = spec, items

    def init(self, key: jax.Array) -> PopularityModel:
        """The counted model; nothing in it is random."""
        size = self.spec.num_items
        if self._items is None:
            return PopularityModel(np.zeros(size + 1, np.float32))
        return PopularityModel(popularity_scores(self._items, size))

    def plan(self) -> Sequence[Phase]:
        """Nothing to train."""
        return []

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        """The k most popular items that are not excluded.

        Raises:
            ValueError: ids outside 0 … N.
        """
        return ranked(
            _top_k, model, histories, k, exclude, max_items=self.max_items, num_items=self.spec.num_items,
            needs_items=False,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0, static_argnames="k")
def _top_k(
    graphdef: Any, state: nnx.State, ids_BH: jax.Array, lengths_B: jax.Array, exclude_BX: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)
    chunk = max(1, _CHUNK_ELEMENTS // model.scores_N1.shape[0])
    return top_k_of(lambda h: model(h, h[:, 0]), ids_BH, k, exclude_BX, chunk_size=chunk)
