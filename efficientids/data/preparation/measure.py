"""What the data report says of the histories, measured block by block of users."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from efficientids.data.layout import MIN_HELD_OUT, Contents, user_blocks

_POINTS = 100  # of the popularity curve, after its origin


class Histories(NamedTuple):
    """Of all rows: how often each item occurs, int64 [N + 1]; rows that share their time with another row of the user;
    rows whose user had the item before; rows by month ("2000-12" → rows, empty without times)."""

    item_rows: np.ndarray
    tied: int
    repeats: int
    by_month: list[tuple[str, int]]


def histories(contents: Contents) -> Histories:
    """One pass over the rows of `contents`; holds counts by item and one block of users."""
    item_rows = np.zeros(len(contents.items) + 1, np.int64)
    tied = repeats = 0
    months: Counter[int] = Counter()
    for users, rows in _blocks(contents.offsets):
        items = contents.item_ids[rows]
        item_rows += np.bincount(items, minlength=len(item_rows))
        repeats += len(items) - len(np.unique(users * len(item_rows) + items))
        if contents.timed:
            times = contents.timestamps[rows]
            tied += _tied(users, times)
            month, counts = np.unique(times.astype("datetime64[s]").astype("datetime64[M]"), return_counts=True)
            months.update(dict(zip(month.astype(np.int64).tolist(), counts.tolist(), strict=True)))
    by_month = [(str(np.datetime64(month, "M")), months[month]) for month in sorted(months)]
    return Histories(item_rows, tied, repeats, by_month)


class Targets(NamedTuple):
    """By split: targets whose item no training row has; targets that a row of their own history is later than."""

    cold: dict[str, int]
    misplaced: dict[str, int]


def targets(contents: Contents) -> Targets:
    """Two passes over the rows of `contents`; holds a flag by item and one block of users."""
    train_lengths = np.diff(contents.offsets)
    if contents.held_out is None:
        train_lengths = np.where(train_lengths >= MIN_HELD_OUT, train_lengths - 2, train_lengths)
        ends, short = contents.offsets[1:], np.diff(contents.offsets) < MIN_HELD_OUT
        held = {"validation": (ends - 2)[~short], "test": (ends - 1)[~short]}
    else:
        train_lengths = contents.held_out.train_lengths
        held = {"validation": contents.held_out.validation_rows, "test": contents.held_out.test_rows}
    trained = np.zeros(len(contents.items) + 1, bool)
    late: list[np.ndarray] = [np.zeros(0, np.int64)]
    for users, rows in _blocks(contents.offsets):
        place = np.arange(rows.start, rows.stop) - contents.offsets[users]
        trained[contents.item_ids[rows][place < train_lengths[users]]] = True
        if contents.timed:
            times = np.array(contents.timestamps[rows])
            # A later user's times are lifted above an earlier one's, so that one running maximum serves all.
            times -= np.min(times)
            times += (users - users[0]) * (np.max(times) + 1)
            latest = np.maximum.accumulate(times)
            late.append(rows.start + 1 + np.flatnonzero((latest[:-1] > times[1:]) & (place[1:] > 0)))
    late_rows = np.concatenate(late)
    return Targets(
        {split: int((~trained[contents.item_ids[rows]]).sum()) for split, rows in held.items()},
        {split: int(np.isin(rows, late_rows).sum()) for split, rows in held.items()},
    )


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(low, high, users) with both ends included; each bin is twice as wide as the one before: 1, 2, 3-4, 5-8, …"""
    bins = np.ceil(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(bins)
    return [((1 << b >> 1) + 1 if b else 1, 1 << b, int(count)) for b, count in enumerate(counts) if b >= bins.min()]


def popularity_curve(item_rows: np.ndarray) -> list[tuple[float, float]]:
    """(share of items, share of rows they have), the most popular items first; over items that have rows."""
    counts = np.sort(item_rows[item_rows > 0])[::-1]
    total = np.concatenate([[0], np.cumsum(counts)])
    points = np.unique(np.linspace(0, len(counts), min(_POINTS, len(counts)) + 1).round().astype(np.int64))
    return [(float(point / len(counts)), float(total[point] / total[-1])) for point in points]


def _tied(users: np.ndarray, times: np.ndarray) -> int:
    """How many rows share user and time with another; `users` rise."""
    same_user = np.diff(users) == 0
    if (np.diff(times)[same_user] < 0).any():  # ordered by something else
        order = np.lexsort((times, users))
        users, times = users[order], times[order]
    same = same_user & (np.diff(times) == 0)
    tied = np.zeros(len(users), bool)
    tied[1:] |= same
    tied[:-1] |= same
    return int(tied.sum())


def _blocks(offsets: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
    """The user of every row, int64, and which rows these are."""
    for first, end in user_blocks(offsets):
        users = np.repeat(np.arange(first, end), np.diff(offsets[first : end + 1]))
        yield users, slice(int(offsets[first]), int(offsets[end]))
