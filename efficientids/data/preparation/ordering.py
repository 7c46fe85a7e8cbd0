"""Second stage of `prepare`: rows in the order of the file → each user's history in order, users one after another.

The rows go into buckets of whole users, so that a bucket fits in memory and is sorted there. Users and items are known
by rank from here on: the place of the external id in the order of ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from efficientids.data.preparation import encode
from efficientids.data.preparation.encode import COLUMNS, ITEM, SPLIT, TIME, USER
from efficientids.data.preparation.progress import Progress

_ROWS = 1 << 21  # rows held at a time: of the file, and about so many of a bucket


class Ranking(NamedTuple):
    """By code: the rank of every user and item, uint32; `keep_item` bool, None where all stay."""

    user: np.ndarray
    item: np.ndarray
    keep_item: np.ndarray | None


class Ordered(NamedTuple):
    """What was written: rows of each user rank, int64 [U]; rows taken out by a filter."""

    user_rows: np.ndarray
    untitled: int
    repeats: int


def order_rows(
    spooled: Path,
    ranking: Ranking,
    folder: Path,
    *,
    by_time: bool,
    by_split: bool,
    drop_repeats: bool,
    progress: Progress,
) -> Ordered:
    """Sorts the rows in `spooled` into raw files item (rank), time and split in `folder`.

    Users stand in the order of rank; a user's rows `by_split` (where there is one; otherwise it is left out), then,
    `by_time`, by time and item rank, otherwise as they stood in the file. `drop_repeats` leaves out a row whose user
    had the same item just before.
    """
    names = [name for name in COLUMNS if (spooled / name).stat().st_size and (by_split or name != SPLIT)]
    user_rows = np.zeros(len(ranking.user), np.int64)
    untitled = 0
    for chunk in _chunks(spooled, [USER, ITEM]):
        stays = _stays(chunk, ranking)
        untitled += int((~stays).sum())
        user_rows += np.bincount(ranking.user[chunk[USER][stays]], minlength=len(user_rows))
    dtype = np.dtype([(name, COLUMNS[name]) for name in names])
    buckets = _fill_buckets(spooled, ranking, user_rows, dtype, folder, progress)
    repeats, user_rows = 0, np.zeros_like(user_rows)
    files = {name: (folder / name).open("wb") for name in names if name != USER}
    try:
        for number, bucket in enumerate(buckets):
            rows = _sorted(np.fromfile(bucket, dtype), by_time)
            bucket.unlink()
            if drop_repeats:
                again = np.zeros(len(rows), bool)
                again[1:] = (rows[USER][1:] == rows[USER][:-1]) & (rows[ITEM][1:] == rows[ITEM][:-1])
                repeats += int(again.sum())
                rows = rows[~again]
            user_rows += np.bincount(rows[USER], minlength=len(user_rows))
            for name, file in files.items():
                np.ascontiguousarray(rows[name]).tofile(file)
            progress.say(f"ordering: {number + 1} of {len(buckets)} parts")
    finally:
        for file in files.values():
            file.close()
    return Ordered(user_rows, untitled, repeats)


def _stays(chunk: dict[str, np.ndarray], ranking: Ranking) -> np.ndarray:
    if ranking.keep_item is None:
        return np.ones(len(chunk[ITEM]), bool)
    return ranking.keep_item[chunk[ITEM]]


def _fill_buckets(
    spooled: Path, ranking: Ranking, user_rows: np.ndarray, dtype: np.dtype, folder: Path, progress: Progress
) -> list[Path]:
    """Appends each row to the file of its user's bucket; the rows of a bucket stay in the order of the file."""
    bucket_of_user = (np.cumsum(user_rows) - user_rows) // _ROWS
    count = int(np.max(bucket_of_user, initial=0)) + 1
    buckets = [folder / f"bucket-{number:06d}" for number in range(count)]
    for bucket in buckets:
        bucket.touch()
    done = 0
    for chunk in _chunks(spooled, list(dtype.names or ())):
        stays = _stays(chunk, ranking)
        rows = np.empty(int(stays.sum()), dtype)
        for name, column in chunk.items():
            rows[name] = column[stays]
        rows[USER], rows[ITEM] = ranking.user[rows[USER]], ranking.item[rows[ITEM]]
        bucket_of_row = bucket_of_user[rows[USER]]
        rows = rows[np.argsort(bucket_of_row, kind="stable")]
        ends = np.cumsum(np.bincount(bucket_of_row, minlength=count))
        for number in np.flatnonzero(np.diff(ends, prepend=0)):
            with buckets[number].open("ab") as file:
                rows[ends[number - 1] if number else 0 : ends[number]].tofile(file)
        done += len(stays)
        progress.say(f"parting by user: {done:,} rows")
    return buckets


def _sorted(rows: np.ndarray, by_time: bool) -> np.ndarray:
    keys = [rows[ITEM], rows[TIME]] if by_time else []
    if SPLIT in (rows.dtype.names or ()):
        keys.append(rows[SPLIT])
    return rows[np.lexsort([*(np.ascontiguousarray(key) for key in keys), np.ascontiguousarray(rows[USER])])]


def _chunks(folder: Path, names: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """The raw columns `names`, `_ROWS` rows at a time."""
    total = (folder / USER).stat().st_size // COLUMNS[USER].itemsize
    for start in range(0, total, _ROWS):
        yield {name: encode.read_rows(folder / name, COLUMNS[name], start, min(_ROWS, total - start)) for name in names}
