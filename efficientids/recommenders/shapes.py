"""Histories and exclusions in few shapes, so that few programs compile.

Legend: B rows, H history items, X exclusions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from core import rows, sharding
from efficientids.recommenders.base import Histories, Ranked

RANKING_BYTES = 2 << 30
"""Device memory for what the rows of one ranking program hold, if one row a device does not need more."""


class Request(NamedTuple):
    """What a compiled ranking program reads: rows, exclusions and k padded to powers of two.

    item_ids int32 [B, H], lengths int32 [B], exclude int32 [B, X] (0 for none), k results a row.
    """

    item_ids: np.ndarray
    lengths: np.ndarray
    exclude: np.ndarray
    k: int


def request(histories: Histories, exclude: np.ndarray | None, k: int, max_items: int, num_items: int) -> Request:
    """The newest `max_items` of each history, padded.

    Raises:
        ValueError: ids outside 0 … num_items, or a 0 inside a history.
    """
    for name, ids in (("histories", histories.item_ids), ("exclude", exclude)):
        if ids is not None and ids.size and (ids.min() < 0 or ids.max() > num_items):
            raise ValueError(f"{name}: item ids {ids.min()} … {ids.max()}, the catalogue has 1 … {num_items}")
    inside_BH = np.arange(histories.item_ids.shape[1]) < histories.lengths[:, None]
    if (hole_BH := inside_BH & (histories.item_ids == 0)).any():
        row, column = np.argwhere(hole_BH)[0]
        raise ValueError(
            f"histories: row {row} has item id 0, which is padding, at place {column} of its {histories.lengths[row]} "
            "items; items are 1 … N, oldest first, padded on the right"
        )
    ids_BH, lengths_B = newest(histories, max_items)
    exclude_BX = np.zeros((len(lengths_B), 1), np.int32) if exclude is None else exclude
    padded_k = max(min(power_of_two(k), num_items), k)
    return Request(pad_rows(ids_BH), pad_rows(lengths_B), _pad_columns(pad_rows(exclude_BX)), padded_k)


def ranked(
    program: Callable[..., tuple[jax.Array, jax.Array]],
    model: nnx.Module,
    histories: Histories,
    k: int,
    exclude: np.ndarray | None,
    *,
    max_items: int,
    num_items: int,
    needs_items: bool = True,
    row_bytes: int = 0,
) -> Ranked:
    """What `Recommender.recommend` returns, by a compiled program. On a mesh each device ranks for a part of the rows;
    where several processes share it, all must ask the same.

    Args:
        program: (graphdef, state, item_ids [B, H], lengths [B], exclude [B, X], k) → (scores [B, k], items [B, k]).
        needs_items: False of a system that has an answer to a history without items.
        row_bytes: device memory of a row while it is ranked; rows beyond `RANKING_BYTES` a device wait for their turn.

    Raises:
        ValueError: ids outside 0 … num_items, a 0 inside a history, or a history without items where some are needed.
    """
    if needs_items:
        _refuse_empty(histories)
    graphdef, state = nnx.split(model)
    asked = request(histories, exclude, k, max_items, num_items)
    mesh = sharding.mesh_of(state)
    at_once, parts = rows_at_once(len(asked.lengths), row_bytes, mesh), list[tuple[np.ndarray, np.ndarray]]()
    for first in range(0, max(len(histories.lengths), 1), at_once):
        arrays = tuple(x[first : first + at_once] for x in (asked.item_ids, asked.lengths, asked.exclude))
        if mesh is not None:
            arrays = sharding.split_rows(arrays, mesh)
        with rows.on(mesh):
            found = program(graphdef, state, *arrays, k=asked.k)
        parts.append((sharding.to_host(found[0]), sharding.to_host(found[1])))
    scores, items = (np.concatenate(part)[: len(histories.lengths), :k] for part in zip(*parts, strict=True))
    return Ranked(items, scores)


def rows_at_once(count: int, row_bytes: int, mesh: Mesh | None) -> int:
    """How many of `count` rows, a power of two, fit into `RANKING_BYTES` of each device; at least one a device."""
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    while count > devices and count // devices * row_bytes > RANKING_BYTES:
        count //= 2
    return count


def _refuse_empty(histories: Histories) -> None:
    real_B = np.arange(len(histories.lengths)) < len(histories.lengths) - histories.padding
    empty = np.flatnonzero(real_B & (histories.lengths <= 0))
    if len(empty):
        raise ValueError(
            f"histories: row {empty[0]} has no items ({len(empty)} such rows), and this recommender goes on from "
            "items; give at least one, leave the row out, or ask popularity, which needs none"
        )


def newest(histories: Histories, items: int) -> tuple[np.ndarray, np.ndarray]:
    """The newest `items` of each history, right-padded: int32 [B, items] and lengths [B]."""
    lengths_B = np.minimum(histories.lengths, items).astype(np.int32)
    start_B1 = (histories.lengths - lengths_B)[:, None]
    columns_BH = start_B1 + np.arange(items)
    inside_BH = np.arange(items) < lengths_B[:, None]
    width = histories.item_ids.shape[1]
    picked_BH = np.take_along_axis(histories.item_ids, np.minimum(columns_BH, width - 1), axis=1)
    return np.where(inside_BH, picked_BH, 0).astype(np.int32), lengths_B


def power_of_two(n: int) -> int:
    """The least power of two that is n or more; 1 for n ≤ 1."""
    return 1 << max(n - 1, 0).bit_length()


def pad_rows(x: np.ndarray) -> np.ndarray:
    """int32, with rows of zeros up to a power of two."""
    return np.pad(x, [(0, power_of_two(len(x)) - len(x))] + [(0, 0)] * (x.ndim - 1)).astype(np.int32)


def _pad_columns(x: np.ndarray) -> np.ndarray:
    return np.pad(x, [(0, 0), (0, power_of_two(x.shape[1]) - x.shape[1])])
