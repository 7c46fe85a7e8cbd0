"""Last stage of `prepare`: ranks of what is left → dense numbers, the arrays and the tables of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import polars as pl

from efficientids.data import layout
from efficientids.data.preparation.encode import (
    COLUMNS,
    ITEM,
    ITEM_TABLE,
    ITEMS,
    SPLIT,
    TIME,
    USER_TABLE,
    USERS,
    read_rows,
)


class Left(NamedTuple):
    """What the filters left: the ordered raw columns in `folder`, `keep` (a byte a row), rows by user rank in the
    columns and after the filters, rows by item rank after the filters, rows that each filter took."""

    folder: Path
    keep: Path
    ordered_user_rows: np.ndarray
    user_rows: np.ndarray
    item_rows: np.ndarray
    dropped: Mapping[str, int]

    @property
    def split(self) -> Path:
        """Raw file: the split that each row that is left was given with."""
        return self.keep.with_name(SPLIT)


def compact(left: Left, item_ranks: np.ndarray, folder: Path) -> None:
    """Writes item_ids.npy, timestamps.npy (0 where the source has no times) and offsets.npy into `folder`.

    `item_ranks`: rank of item 1, 2, … N. The raw column of a given split goes to `left.split`, empty if there is none.
    """
    number = np.zeros(len(left.item_rows), np.int32)
    number[item_ranks] = np.arange(1, len(item_ranks) + 1, dtype=np.int32)
    lengths = left.user_rows[left.user_rows > 0]
    np.save(folder / layout.OFFSETS, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(left.ordered_user_rows)])
    has_split, has_time = (left.folder / SPLIT).is_file(), (left.folder / TIME).is_file()
    with (
        (folder / layout.ITEM_IDS).open("wb") as item_ids,
        (folder / layout.TIMESTAMPS).open("wb") as timestamps,
        left.split.open("wb") as split,
    ):
        _header(item_ids, layout.DTYPES[layout.ITEM_IDS], total)
        _header(timestamps, layout.DTYPES[layout.TIMESTAMPS], total)
        for first, end in layout.user_blocks(offsets):
            start, count = int(offsets[first]), int(offsets[end] - offsets[first])
            keep = read_rows(left.keep, np.dtype(np.uint8), start, count) == 1
            number[read_rows(left.folder / ITEM, COLUMNS[ITEM], start, count)[keep]].tofile(item_ids)
            times = np.zeros(count, np.int64)
            if has_time:
                times = read_rows(left.folder / TIME, COLUMNS[TIME], start, count) // 1000  # ordered by ms, kept in s
            times[keep].tofile(timestamps)
            if has_split:
                read_rows(left.folder / SPLIT, COLUMNS[SPLIT], start, count)[keep].tofile(split)


def item_table(
    spooled: Path, item_rank: np.ndarray, left: Left, keep_item: np.ndarray | None, whole_table: bool
) -> pl.DataFrame:
    """The catalogue in order: rank, item, item_id and what the item table knows of each.

    Items with a row; `whole_table`: those of the item table as well, but for the ones that `keep_item` takes out.
    """
    known = _item_chunks(spooled)
    items = pl.read_parquet(spooled / ITEMS).rename({"id": "item_id"}).with_row_index("code")
    items = items.with_columns(pl.Series("rank", item_rank))
    stays = left.item_rows[item_rank] > 0
    if whole_table and known is not None:
        in_table = np.zeros(len(stays), bool)
        in_table[known["code"].to_numpy()] = True
        stays |= in_table if keep_item is None else in_table & keep_item
    items = items.filter(pl.Series(stays)).sort("rank")
    numbers = pl.Series("item", np.arange(1, len(items) + 1, dtype=np.int32))
    items = items.select("rank", numbers, "item_id", "code")
    if known is not None:
        items = items.join(known, on="code", how="left", maintain_order="left")
    return items.drop("code")


def user_table(spooled: Path, user_rank: np.ndarray, left: Left) -> pl.DataFrame:
    """The users with a row, in order: user, user_id and what is known of them."""
    users = pl.read_parquet(spooled / USERS).rename({"id": "user_id"}).with_columns(pl.Series("rank", user_rank))
    users = users.filter(pl.Series(left.user_rows[user_rank] > 0)).sort("rank")
    users = users.select(pl.Series("user", np.arange(len(users), dtype=np.int32)), "user_id")
    if not (spooled / USER_TABLE).is_file():
        return users
    return users.join(pl.read_parquet(spooled / USER_TABLE), on="user_id", how="left", maintain_order="left")


def _item_chunks(spooled: Path) -> pl.DataFrame | None:
    files = sorted((spooled / ITEM_TABLE).iterdir())
    return pl.concat([pl.read_parquet(file) for file in files], how="vertical") if files else None


def _header(file: IO[bytes], dtype: np.dtype, rows: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (rows,)})
