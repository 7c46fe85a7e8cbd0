"""Item-to-item nearest neighbours as a recommender: what followed the items of a history in other people's histories.

A count, nothing is trained. Its kind is known to be hard to beat (Ludewig and Jannach, 2018; Ferrari Dacrema et al.,
2019), so it is here to be compared with in earnest: pairs count more the nearer they stand, what came after an item
counts more than what came before, and the newest items of a history weigh most.

    c_ij  = Σ over pairs of i and j in one history, d ≤ window places apart, of d^−distance_power
            (times `backward` where j came before i)
    s_ij  = c_ij / (n_i^source_power · n_j^target_power), n the number of training interactions of an item
    score = Σ over the history's items, age 0 the newest, of recency^age · s_ij, + popularity_weight · popularity_j

source_power = target_power = ½ with flat weights is the cosine, source_power = 1 and target_power = 0 the conditional
probability; between them is better than either.

Legend: B rows, H history items, N items, M neighbours, E training interactions, P pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from flax import nnx

from core.functional import Buffer
from core.softmax import top_k_of
from efficientids.recommenders.base import Histories, Phase, Ranked
from efficientids.recommenders.popularity import item_counts, popularity_scores
from efficientids.recommenders.shapes import ranked

_CHUNK_ELEMENTS = 1 << 25
"""Scores and neighbours' weights held at a time when ranking: 128 MB of each."""
_BLOCK_PAIRS = 1 << 23
"""Pairs held at a time when counting: some 300 MB."""


@dataclasses.dataclass(frozen=True)
class ItemKNNSpec:
    """Everything that decides the counts and the ranking; the formulas are at the top of this file.

    The defaults were chosen on the validation targets of Beauty'14, MovieLens 1M, Yelp and Instruments'18 together.

    Attributes:
        num_items: N.
        neighbours: M, the most similar items kept of each item.
        max_items: H, the newest items of a history that are looked at.
        window: places between two items of a history that still make a pair.
        distance_power: how fast a pair's weight falls with its distance; 0: not at all.
        backward: weight of what came before an item against what came after it; 1: the order does not matter.
        source_power, target_power: how far the popularity of the history's item and of the candidate is divided out.
        recency: weight of a history item against the next newer one.
        popularity_weight: weight of popularity in [0, 1]; so small, it only orders items that are nobody's neighbour.
    """

    num_items: int
    neighbours: int = 100
    max_items: int = 50
    window: int = 10
    distance_power: float = 0.5
    backward: float = 0.3
    source_power: float = 0.5
    target_power: float = 0.1
    recency: float = 0.7
    popularity_weight: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("num_items", "neighbours", "max_items", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("distance_power", "backward", "source_power", "target_power", "popularity_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more, and finite")
        if not 0 < self.recency <= 1:
            raise ValueError(f"recency is {self.recency}; expected above 0 and at most 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `model.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ItemKNNSpec:
        """The inverse of `to_json`. Raises TypeError for missing or unknown fields, ValueError out of range."""
        return ItemKNNSpec(**values)


class Neighbours(NamedTuple):
    """The M most similar items of each item: item_ids int32 [N + 1, M], weights float32 [N + 1, M]; (0, 0) for none."""

    item_ids: np.ndarray
    weights: np.ndarray


def neighbour_table(spec: ItemKNNSpec, items: np.ndarray, offsets: np.ndarray) -> Neighbours:
    """Counts the pairs of the training histories, in blocks of items so that memory does not grow with the pairs.

    Args:
        items: int [E], the training histories one after another, values 1 … N. Nothing held out may be among them.
        offsets: int [U + 1], where each history starts; the last is E.

    Raises:
        ValueError: ids outside 1 … N, or offsets that do not fit.
    """
    if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must ascend from 0 to the {len(items)} interactions")
    size = spec.num_items
    counts_N1 = item_counts(items, size)
    target_N1 = np.maximum(counts_N1, 1.0) ** -spec.target_power
    table = Neighbours(
        np.zeros((size + 1, spec.neighbours), np.int32), np.zeros((size + 1, spec.neighbours), np.float32)
    )
    for first, last, pairs in _pairs(spec, items, offsets, counts_N1):
        block = pairs.tocsr()
        row_P = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        source_P = np.maximum(counts_N1[first:last], 1.0)[row_P] ** -spec.source_power
        weight_P = block.data * source_P * target_N1[block.indices]
        order_P = np.lexsort((block.indices, -weight_P, row_P))  # of equal weights the smaller id
        place_P = np.arange(block.nnz) - block.indptr[row_P]  # rows keep their place under the sort
        kept_P = (place_P < spec.neighbours) & (weight_P[order_P] > 0)
        best = order_P[kept_P]
        places = (first + row_P[kept_P], place_P[kept_P])
        table.item_ids[places] = block.indices[best]
        table.weights[places] = weight_P[best]
    return table


def _pairs(
    spec: ItemKNNSpec, items: np.ndarray, offsets: np.ndarray, counts_N1: np.ndarray
) -> Iterator[tuple[int, int, scipy.sparse.coo_array]]:
    """(first, last, c_ij of the items first … last − 1 as a sparse matrix [last − first, N + 1]), block by block."""
    lengths = np.diff(offsets)
    start_E, end_E = np.repeat(offsets[:-1], lengths), np.repeat(offsets[1:], lengths)
    of_item_E = np.argsort(items, kind="stable")  # where item 1 stands, then item 2, …
    begin_N2 = np.concatenate([[0], np.cumsum(counts_N1)])
    block = max(1, _BLOCK_PAIRS // (2 * spec.window))
    first = 0
    while first <= spec.num_items:
        last = max(first + 1, int(np.searchsorted(begin_N2, begin_N2[first] + block, side="right")) - 1)
        last = min(last, spec.num_items + 1)
        place_P = of_item_E[begin_N2[first] : begin_N2[last]]
        rows, columns, weights = [], [], []
        for distance in range(1, spec.window + 1):
            for other_P, factor in ((place_P + distance, 1.0), (place_P - distance, spec.backward)):
                inside = (other_P >= start_E[place_P]) & (other_P < end_E[place_P]) & (factor > 0)
                rows.append(items[place_P[inside]] - first)
                columns.append(items[other_P[inside]])
                weights.append(np.full(len(rows[-1]), factor * distance**-spec.distance_power))
        coordinates = (np.concatenate(rows), np.concatenate(columns))
        shape = (last - first, spec.num_items + 1)
        yield first, last, scipy.sparse.coo_array((np.concatenate(weights), coordinates), shape=shape)
        first = last


class ItemKNNModel(nnx.Module):
    """Buffers: `ids_NM`, `weights_NM` (see `Neighbours`) and `prior_N1` float32 [N + 1], −∞ at the padding."""

    def __init__(self, spec: ItemKNNSpec, table: Neighbours, popularity_N1: np.ndarray) -> None:
        self.recency = spec.recency
        self.ids_NM, self.weights_NM = Buffer(jnp.asarray(table.item_ids)), Buffer(jnp.asarray(table.weights))
        prior_N = spec.popularity_weight * popularity_N1[1:]
        self.prior_N1 = Buffer(jnp.asarray(np.concatenate([[-np.inf], prior_N]), jnp.float32))

    def __call__(self, item_ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """The scores of all items, float32 [B, N + 1], after histories int32 [B, H] (right-padded, oldest first)."""
        return self.score(newest_first(item_ids, lengths))

    def score(self, newest_BH: jax.Array) -> jax.Array:
        """As a call, for histories whose newest item comes first."""
        # Powers beyond float32's range are 0: an item that old weighs nothing.
        decay_H = self.recency ** jnp.arange(newest_BH.shape[1], dtype=jnp.float32)
        weights_BHM = self.weights_NM[...][newest_BH] * decay_H[:, None]
        rows_B = jnp.arange(newest_BH.shape[0])[:, None, None]
        prior_BN = jnp.broadcast_to(self.prior_N1[...], (newest_BH.shape[0], self.prior_N1.shape[0]))
        return prior_BN.at[rows_B, self.ids_NM[...][newest_BH]].add(weights_BHM)


def newest_first(item_ids_BH: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Right-padded histories, oldest first → newest first, padded with 0 behind the oldest."""
    column_BH = lengths_B[:, None] - 1 - jnp.arange(item_ids_BH.shape[1])
    return jnp.where(column_BH >= 0, jnp.take_along_axis(item_ids_BH, jnp.maximum(column_BH, 0), axis=1), 0)


class ItemKNN:
    """See `efficientids.recommenders.base.Recommender`.

    Args:
        spec: formula and shapes.
        histories: (items, offsets) of `neighbour_table`; None leaves the table empty, for a checkpoint to fill.
    """

    def __init__(self, spec: ItemKNNSpec, histories: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self.spec, self._histories = spec, histories

    @property
    def max_items(self) -> int:
        """H: the newest items of a history that are looked at."""
        return self.spec.max_items

    @property
    def history(self) -> str:
        """The same in words."""
        return f"newest {self.max_items} items, each weighing {self.spec.recency:g} of the next newer one"

    def init(self, key: jax.Array) -> ItemKNNModel:
        """The counted model; nothing in it is random."""
        spec = self.spec
        if self._histories is None:
            shape = (spec.num_items + 1, spec.neighbours)
            blank = Neighbours(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
            return ItemKNNModel(spec, blank, np.zeros(spec.num_items + 1, np.float32))
        items, offsets = self._histories
        popularity_N1 = popularity_scores(items, spec.num_items)
        return ItemKNNModel(spec, neighbour_table(spec, items, offsets), popularity_N1)

    def plan(self) -> Sequence[Phase]:
        """Nothing to train."""
        return []

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        """The k items of highest score that are not excluded, exactly.

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
    size, neighbours = model.ids_NM.shape
    chunk = max(1, _CHUNK_ELEMENTS // max(size, ids_BH.shape[1] * neighbours))
    return top_k_of(model.score, newest_first(ids_BH, lengths_B), k, exclude_BX, chunk_size=chunk)
