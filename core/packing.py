"""Packing on the host: several histories in one row of fixed length, so that few positions are padding.

NumPy, and a pure function of its arguments: packed batches are as deterministic as the batches they are made of. What
reads packed rows keeps their histories apart by segment: `core.embeddings.weave`, `core.attention`, and the loss of
`core.models.efficientids`.

Legend: P histories, H items of the longest, R rows, T positions of a row, I items of a row, N items of the catalogue.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

# One item alone has nothing before it to be predicted from.
_FEWEST_ITEMS = 2
# Share of all positions that the histories of a batch ask for on average: more and many are cut, less and rows stay
# empty (benchmarks/packing.py).
_ASKED = 0.97
_SPARE_ITEMS = 1.25


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """The fixed shapes of packed batches.

    Attributes:
        histories: P, how many histories go into a batch.
        rows: R.
        positions: T, tokens included.
        items: I, slots for items in a row: at most T, fewer where each item brings text.
        bos: positions before the first item of a history: 1 with text, else 0.
    """

    histories: int
    rows: int
    positions: int
    items: int
    bos: int

    @staticmethod
    def of(sizes_U: np.ndarray, items_U: np.ndarray, *, rows: int, positions: int, bos: int) -> PackPlan:
        """The plan for histories of these sizes: as many in a batch as fill its rows on average.

        Args:
            sizes_U: positions that each history takes, int [U], without BOS; what is beyond T is cut.
            items_U: its items, int [U].
        """
        room = positions - bos
        share_U = np.minimum(1.0, room / np.maximum(sizes_U, 1))  # of a history that a row can hold
        mean = float(np.mean(np.minimum(sizes_U, room))) + bos
        histories = max(rows, int(_ASKED * rows * positions / mean))
        items_a_position = float(np.sum(items_U * share_U)) / (mean * len(sizes_U))
        items = min(positions, int(np.ceil(_SPARE_ITEMS * positions * items_a_position)))
        return PackPlan(histories, rows, positions, items, bos)


class PackedHistories(NamedTuple):
    """Histories in rows: `item_ids` int32 [R, I], right-padded with 0; `segments` int32 [R, I], 1, 2, … for a row's
    histories, 0 behind the last; `lengths` int32 [R], items a row; `kept` int32 [P], how many of each history's newest
    items are in a row (0: none of it is)."""

    item_ids: np.ndarray
    segments: np.ndarray
    lengths: np.ndarray
    kept: np.ndarray


def pack_histories(
    item_ids_PH: np.ndarray, lengths_P: np.ndarray, widths_N: np.ndarray, plan: PackPlan
) -> PackedHistories:
    """Packs histories by best fit, the longest first.

    Where they ask for more than there is, the longest give way first: all are cut to a common size that makes the sum
    fit. A history that still finds no row is cut to the room of the emptiest one, and left out where that is less than
    two items.

    Args:
        item_ids_PH: int [P, H], right-padded, oldest first.
        lengths_P: int [P], items of each; 0 for none.
        widths_N: int [N + 1], positions that each item takes with its text, at least 1.
        plan: the shapes; P may differ from the plan's.
    """
    valid_PH = np.arange(item_ids_PH.shape[1]) < lengths_P[:, None]
    widths_PH = np.where(valid_PH, widths_N[item_ids_PH], 0)
    # Positions and items from each item on to the newest: what keeping it costs.
    cost_PH = np.cumsum(widths_PH[:, ::-1], axis=1)[:, ::-1]
    count_PH = lengths_P[:, None] - np.arange(item_ids_PH.shape[1])

    def kept_within(room_P: np.ndarray, slots: int) -> np.ndarray:
        """How many of the newest items fit."""
        return np.sum(valid_PH & (cost_PH <= room_P[:, None] - plan.bos) & (count_PH <= slots), axis=1)

    def size_of(kept_P: np.ndarray) -> np.ndarray:
        """Positions of the newest `kept_P` items, BOS included; 0 for none."""
        first_P1 = np.minimum(lengths_P - kept_P, item_ids_PH.shape[1] - 1)[:, None]
        return np.where(kept_P > 0, np.take_along_axis(cost_PH, first_P1, axis=1)[:, 0] + plan.bos, 0)

    whole_P = np.full(len(lengths_P), plan.positions)
    kept_P = kept_within(whole_P, plan.items)
    level = _level(size_of(kept_P), plan.rows * plan.positions)
    kept_P = kept_within(np.minimum(whole_P, level), plan.items)
    kept_P[kept_P < _FEWEST_ITEMS] = 0
    size_P = size_of(kept_P)
    room_R, slots_R = np.full(plan.rows, plan.positions), np.full(plan.rows, plan.items)
    row_P = np.zeros(len(lengths_P), np.int64)
    order_P = np.argsort(-size_P, kind="stable")
    for p in order_P:
        fits_R = (room_R >= size_P[p]) & (slots_R >= kept_P[p])
        if fits_R.any():
            row = int(np.argmin(np.where(fits_R, room_R, plan.positions + 1)))
        else:
            row = int(np.argmax(room_R))
            fitting_H = (cost_PH[p] <= room_R[row] - plan.bos) & (count_PH[p] <= slots_R[row])
            kept = int(np.sum(valid_PH[p] & fitting_H))
            kept_P[p] = kept if kept >= _FEWEST_ITEMS else 0
            size_P[p] = cost_PH[p, lengths_P[p] - kept] + plan.bos if kept_P[p] else 0
        row_P[p] = row
        room_R[row] -= size_P[p]
        slots_R[row] -= kept_P[p]
    return _laid_out(item_ids_PH, lengths_P, kept_P, row_P, order_P, plan)


def _level(size_P: np.ndarray, capacity: int) -> int:
    """The largest size such that sizes cut to it add up to at most `capacity`."""
    rising = np.sort(size_P)
    if rising.sum() <= capacity:
        return int(rising[-1]) if len(rising) else 0
    # Cut to rising[j], sizes add up to those below it and as many of it as are left.
    sums = np.cumsum(rising) - rising + rising * np.arange(len(rising), 0, -1)
    j = int(np.searchsorted(sums, capacity, side="right"))
    return int((capacity - rising[:j].sum()) // (len(rising) - j))


def _laid_out(
    item_ids_PH: np.ndarray,
    lengths_P: np.ndarray,
    kept_P: np.ndarray,
    row_P: np.ndarray,
    order_P: np.ndarray,
    plan: PackPlan,
) -> PackedHistories:
    """Writes the newest `kept_P` items of each history into its row, in the order of `order_P`."""
    item_ids_RI = np.zeros((plan.rows, plan.items), np.int32)
    segments_RI = np.zeros((plan.rows, plan.items), np.int32)
    lengths_R, segment_R = np.zeros(plan.rows, np.int32), np.zeros(plan.rows, np.int32)
    for p in order_P[kept_P[order_P] > 0]:
        row, end = row_P[p], lengths_P[p]
        place = slice(lengths_R[row], lengths_R[row] + kept_P[p])
        segment_R[row] += 1
        item_ids_RI[row, place] = item_ids_PH[p, end - kept_P[p] : end]
        segments_RI[row, place] = segment_R[row]
        lengths_R[row] = place.stop
    return PackedHistories(item_ids_RI, segments_RI, lengths_R, kept_P.astype(np.int32))
