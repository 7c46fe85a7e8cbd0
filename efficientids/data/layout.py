"""What a data set folder holds, and the checks that its arrays and tables must pass.

    manifest.json      counts, protocol of the order, filters, sizes and sha256 of every other file
    items.parquet      item (int32, 1..N), item_id (external, string), title, genres (list of strings), …
    users.parquet      user (int32, 0..U-1), user_id (external, string), …
    item_ids.npy       int32 [n], the histories of all users, one after another
    timestamps.npy     int64 [n], seconds since 1970
    offsets.npy        int64 [U+1], user u owns rows offsets[u] to offsets[u+1]

Item 0 is padding and never occurs in a history. N is the size of the catalogue; an item of it may have no interaction.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from efficientids.errors import UserError

FORMAT = "efficientids-dataset"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REPORT = "report.json"  # what was dropped and why; beside the data set, not of it
ITEMS, USERS = "items.parquet", "users.parquet"
ITEM_IDS, TIMESTAMPS, OFFSETS = "item_ids.npy", "timestamps.npy", "offsets.npy"
DTYPES = {ITEM_IDS: np.dtype(np.int32), TIMESTAMPS: np.dtype(np.int64), OFFSETS: np.dtype(np.int64)}
REQUIRED_FILES = (ITEMS, USERS, ITEM_IDS, TIMESTAMPS, OFFSETS)
MIN_HELD_OUT = 3  # interactions a user needs to give a validation and a test target and keep something to train on

_CHUNK = 1 << 22  # interactions looked at in one go, so that a check needs a few MB whatever the data set's size


@dataclasses.dataclass(frozen=True)
class Contents:
    """A data set in memory, ready to be written.

    `item_ids` int32 [n], `timestamps` int64 [n], `offsets` int64 [U+1]; `items` and `users` as in this module's legend;
    `order` and `filters` are plain values that say how the histories came about, kept in the manifest.
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
