"""What a data set folder holds, and the checks that its arrays and tables must pass.

    manifest.json      counts, protocol of the order and the split, filters, sizes and sha256 of every other file
    items.parquet      item (int32, 1..N), item_id (external, string), title, genres (list of strings), …
    users.parquet      user (int32, 0..U-1), user_id (external, string), …
    item_ids.npy       int32 [n], the histories of all users, one after another
    timestamps.npy     int64 [n], seconds since 1970; all 0 where the manifest says `timestamps: false`
    offsets.npy        int64 [U+1], user u owns rows offsets[u] to offsets[u+1]

and, unless the split is leave-one-out (the last row of a user is the test target, the one before it validates):

    train_lengths.npy    int64 [U], so many of a user's first rows train
    validation_rows.npy  int64, ascending: each such row of item_ids.npy is a target; its history is all rows of the
    test_rows.npy        user before it

Item 0 is padding and never occurs in a history. N is the size of the catalogue; an item of it may have no interaction.
Version 1 of the format, which is read as well, knows leave-one-out alone and always has times.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from efficientids.errors import UserError

FORMAT = "efficientids-dataset"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.json"
REPORT, PAGE = "report.json", "report.html"  # what was dropped and why; beside the data set, not of it
ITEMS, USERS = "items.parquet", "users.parquet"
ITEM_IDS, TIMESTAMPS, OFFSETS = "item_ids.npy", "timestamps.npy", "offsets.npy"
DTYPES: Mapping[str, np.dtype[Any]] = {
    ITEM_IDS: np.dtype(np.int32),
    TIMESTAMPS: np.dtype(np.int64),
    OFFSETS: np.dtype(np.int64),
}
REQUIRED_FILES = (ITEMS, USERS, ITEM_IDS, TIMESTAMPS, OFFSETS)
LEAVE_ONE_OUT, TIME, GIVEN = "leave_one_out", "time", "given"
TRAIN_LENGTHS, VALIDATION_ROWS, TEST_ROWS = "train_lengths.npy", "validation_rows.npy", "test_rows.npy"
SPLIT_FILES = (TRAIN_LENGTHS, VALIDATION_ROWS, TEST_ROWS)  # of every split but leave-one-out
MIN_HELD_OUT = 3  # interactions a user needs to give a validation and a test target and keep something to train on

_CHUNK = 1 << 22  # interactions looked at in one go, so that a check needs a few MB whatever the data set's size


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A split other than leave-one-out: the three arrays of this module's legend, int64."""

    train_lengths: np.ndarray
    validation_rows: np.ndarray
    test_rows: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """File name → array."""
        return dict(zip(SPLIT_FILES, (self.train_lengths, self.validation_rows, self.test_rows), strict=True))


@dataclasses.dataclass(frozen=True)
class Contents:
    """A data set, in memory or memory-mapped, ready to be written.

    `item_ids` int32 [n], `timestamps` int64 [n], `offsets` int64 [U+1]; `items` and `users` as in this module's legend;
    `order`, `filters`, `split` and `request` (files and flags) are plain values that say how the data set came about,
    kept in the manifest; `held_out` goes with a `split` other than leave-one-out. `timed`: there are times (else
    `timestamps` is all 0). `catalogue`: "interactions" where it is the items that have some, "table" where it is the
    whole item table.
    """

    name: str
    source: str
    items: pl.DataFrame
    users: pl.DataFrame
    item_ids: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    order: Mapping[str, str]
    filters: Mapping[str, Any]
    split: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"rule": LEAVE_ONE_OUT})
    held_out: HeldOut | None = None
    timed: bool = True
    catalogue: str = "interactions"
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def user_blocks(offsets: np.ndarray, rows: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Ranges (first, end) of whole users with about `rows` rows each: what is looked at in one go."""
    first = 0
    while first < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[first] + rows, "right")) - 1
        end = max(end, first + 1)
        yield first, end
        first = end


def without_target(lengths: np.ndarray, held_out: HeldOut | None, offsets: np.ndarray) -> int:
    """How many users are never evaluated: too short for leave-one-out, or without a row that is held out."""
    if held_out is None:
        return int((lengths < MIN_HELD_OUT).sum())
    evaluated = np.zeros(len(lengths), bool)
    for rows in (held_out.validation_rows, held_out.test_rows):
        evaluated[np.searchsorted(offsets, rows, "right") - 1] = True
    return int((~evaluated).sum())


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_arrays(where: Path, arrays: Mapping[str, np.ndarray], catalogue_size: int) -> int:
    """Checks the three arrays (keys: file names) against each other and returns how many items occur.

    Raises UserError naming the file under `where`, the field and the value for a wrong dtype or shape, an empty data
    set, offsets that do not rise from 0 to n, and ids outside 1..catalogue_size.
    """
    for name, dtype in DTYPES.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != 1:
            raise _broken(
                where / name, f"holds {array.dtype} of shape {list(array.shape)}, expected {dtype} with 1 axis"
            )
    item_ids, timestamps, offsets = arrays[ITEM_IDS], arrays[TIMESTAMPS], arrays[OFFSETS]
    n = len(item_ids)
    if n == 0 or len(offsets) < 2:
        raise UserError(f"{where}: the data set is empty (0 interactions); prepare it from a source that has some")
    if len(timestamps) != n:
        raise _broken(where / TIMESTAMPS, f"has {len(timestamps)} rows, {ITEM_IDS} has {n}")
    if offsets[0] != 0 or offsets[-1] != n:
        raise _broken(
            where / OFFSETS, f"runs from {offsets[0]} to {offsets[-1]}, expected 0 to {n} (rows of {ITEM_IDS})"
        )
    gaps = np.diff(offsets)
    if (gaps < 1).any():
        user = int(np.argmax(gaps < 1))
        raise _broken(
            where / OFFSETS, f"user {user} owns {gaps[user]} rows; every user needs at least 1, so offsets must rise"
        )
    return _check_ids(where / ITEM_IDS, item_ids, catalogue_size)


def _check_ids(file: Path, item_ids: np.ndarray, catalogue_size: int) -> int:
    occurs = np.zeros(catalogue_size + 1, bool)
    for start in range(0, len(item_ids), _CHUNK):
        chunk = item_ids[start : start + _CHUNK]
        bad = (chunk < 1) | (chunk > catalogue_size)
        if bad.any():
            row = int(np.argmax(bad))
            raise _broken(file, f"row {start + row} is item {chunk[row]}, outside 1..{catalogue_size} (the catalogue)")
        occurs[chunk] = True
    return int(occurs.sum())


def check_held_out(where: Path, held_out: HeldOut, offsets: np.ndarray) -> None:
    """Checks a split's arrays against the histories.

    Raises UserError naming the file under `where` and the value for: wrong dtypes or shapes, train lengths outside a
    user's history, target rows that do not rise, lie outside the data, among the rows that train, at a user's very
    first row (nothing before it to predict from), or in both splits.
    """
    lengths = np.diff(offsets)
    for name, array in held_out.arrays().items():
        if array.dtype != np.int64 or array.ndim != 1:
            raise _broken(where / name, f"holds {array.dtype} of shape {list(array.shape)}, expected int64 with 1 axis")
    train = held_out.train_lengths
    if len(train) != len(lengths):
        raise _broken(where / TRAIN_LENGTHS, f"has {len(train)} rows, {OFFSETS} tells of {len(lengths)} users")
    wrong = (train < 0) | (train > lengths)
    if wrong.any():
        user = int(np.argmax(wrong))
        raise _broken(where / TRAIN_LENGTHS, f"user {user} trains on {train[user]} rows of {lengths[user]}")
    for name, rows in ((VALIDATION_ROWS, held_out.validation_rows), (TEST_ROWS, held_out.test_rows)):
        if len(rows) == 0:
            continue
        if (np.diff(rows) < 1).any() or rows[0] < 0 or rows[-1] >= offsets[-1]:
            raise _broken(where / name, f"must hold rising row numbers within 0..{offsets[-1] - 1}")
        users = np.searchsorted(offsets, rows, "right") - 1
        early = rows - offsets[users] < np.maximum(train[users], 1)
        if early.any():
            row = int(rows[np.argmax(early)])
            raise _broken(where / name, f"row {row} trains or is its user's first; it cannot be a target")
    if len(np.intersect1d(held_out.validation_rows, held_out.test_rows, assume_unique=True)):
        raise _broken(where / TEST_ROWS, f"shares rows with {VALIDATION_ROWS}")


def check_tables(where: Path, items: pl.DataFrame, users: pl.DataFrame, num_users: int) -> None:
    """Checks that `item` counts 1..N and `user` 0..U-1, and that the external ids are unique strings.

    Raises UserError naming the file and the column.
    """
    for table, name, index, first, size in (
        (items, ITEMS, "item", 1, len(items)),
        (users, USERS, "user", 0, num_users),
    ):
        external = f"{index}_id"
        missing = [column for column in (index, external) if column not in table.columns]
        if missing:
            raise _broken(where / name, f"has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
        if len(table) != size:
            raise _broken(where / name, f"has {len(table)} rows, expected {size}")
        if table.schema[index] != pl.Int32 or table.schema[external] != pl.String:
            found = f"{table.schema[index]} and {table.schema[external]}"
            raise _broken(where / name, f"columns {index} and {external} are {found}, expected Int32 and String")
        if not np.array_equal(table[index].to_numpy(), np.arange(first, first + size)):
            raise _broken(where / name, f"column {index} must count {first}, {first + 1}, … {first + size - 1}")
        if table[external].null_count() or table[external].n_unique() != size:
            raise _broken(where / name, f"column {external} holds empty or repeated ids; they must be unique")


def _broken(file: Path, found: str) -> UserError:
    return UserError(f"{file}: {found}. Prepare the data set again with `python -m efficientids prepare`")
