"""First stage of `prepare`: a source's chunks → codes on disk, in the order of the file.

Memory holds the distinct ids and one chunk. Codes count the ids in the order of their first appearance; `ordered_ids`
later gives them their final numbers, so the size of chunks leaves no trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.users import hash_ids
from efficientids.data.sources.base import BadRows, Source
from efficientids.errors import UserError

USER, ITEM, TIME, SPLIT = "user", "item", "time", "split"
COLUMNS: Mapping[str, np.dtype[Any]] = {
    USER: np.dtype("<u4"),
    ITEM: np.dtype("<u4"),
    TIME: np.dtype("<i8"),
    SPLIT: np.dtype("u1"),
}
USERS, ITEMS, USER_TABLE = "user_ids.parquet", "item_ids.parquet", "user_table.parquet"
TITLED = "titled.npy"  # bool by item code: the item table has a title for it
ITEM_TABLE = "item_table"  # folder of parquet files: `code` and what is known of the item

_INTEGER = r"^-?[0-9]{1,18}$"  # fits int64
_SHOWN = 5


class IdCodes:
    """Distinct ids ↔ codes 0, 1, 2, …; polars keeps the dictionary, about the ids' own size."""

    def __init__(self) -> None:
        self._categories = pl.Categories.random()
        self._dtype = pl.Categorical(self._categories)
        # The dictionary lives only as long as some series of the type does.
        self._anchor = pl.Series([], dtype=self._dtype)

    def encode(self, ids: pl.Series) -> np.ndarray:
        """The codes of a String series, uint32; ids not seen before get new ones."""
        return ids.cast(self._dtype).to_physical().to_numpy()

    def ids(self) -> pl.Series:
        """All ids, in the order of their codes."""
        return self._categories.to_series()


def ordered_ids(ids: pl.Series) -> tuple[pl.Series, str]:
    """The distinct ids of a string column in their order, and that order's name: "numeric" or "lexicographic"."""
    distinct = pl.DataFrame({"id": ids.unique()})
    if distinct["id"].str.contains(_INTEGER).all():
        # The text decides between "7" and "07".
        return distinct.sort(pl.col("id").cast(pl.Int64), "id")["id"], "numeric"
    return distinct.sort("id")["id"], "lexicographic"


def ranks(ids: pl.Series) -> tuple[np.ndarray, str]:
    """Code → place of its id in the order of ids (uint32), and that order's name. `ids`: distinct, by code."""
    ordered, name = ordered_ids(ids)
    places = pl.DataFrame({"id": ordered}).with_row_index("place")
    return pl.DataFrame({"id": ids}).join(places, on="id", how="left", maintain_order="left")["place"].to_numpy(), name


@dataclasses.dataclass(frozen=True)
class SpoolOptions:
    """`salt`: hashes user ids before anything is written. `whole_table`: items without an interaction stay, too."""

    min_rating: float | None
    salt: bytes | None = dataclasses.field(repr=False)
    whole_table: bool


def spool(source: Source, options: SpoolOptions, folder: Path, bad: BadRows, progress: Progress) -> dict[str, Any]:
    """Reads the whole source into `folder`: a raw file for each of `COLUMNS`, ids by code, the tables.

    Returns facts as JSON values: rows `read`, `rows` kept and rows that `min_rating` took, the item table's size and
    what of the log it knows (`item_table`; None where there is none), `bad_rows` and the reader's `notes`.

    Raises UserError for what the readers refuse, for `min_rating` where no row has a rating, and for an item table that
    knows no item of the log.
    """
    users, items = IdCodes(), IdCodes()
    kept = read = rated = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in COLUMNS}
        for chunk in source.interactions(bad):
            read += len(chunk)
            if options.min_rating is not None:
                rated += len(chunk) - chunk["rating"].null_count()
                chunk = chunk.filter(pl.col("rating") >= options.min_rating)
            kept += len(chunk)
            columns = _encoded(chunk, source, users, items, options.salt)
            for name, column in columns.items():
                np.ascontiguousarray(column, COLUMNS[name]).tofile(files[name])
            progress.say(f"{read:,} rows read")
    if options.min_rating is not None and read and not rated:
        raise UserError("--min_rating: no row of the source has a rating; leave it out, or name --rating_column")
    in_log = len(items.ids())
    item_table = _spool_items(source.items(bad), items, folder, in_log, options.whole_table)
    _check_matches(item_table, items, in_log)
    _spool_users(source.users(bad), folder, options.salt)
    pl.DataFrame({"id": users.ids()}).write_parquet(folder / USERS)
    pl.DataFrame({"id": items.ids()}).write_parquet(folder / ITEMS)
    return {
        "rows": kept,
        "read": read,
        "min_rating": read - kept,
        "item_table": item_table,
        "bad_rows": {"count": bad.count, "first": [str(row) for row in bad.first]},
        "notes": list(source.notes),
    }


def _encoded(
    chunk: pl.DataFrame, source: Source, users: IdCodes, items: IdCodes, salt: bytes | None
) -> dict[str, np.ndarray]:
    user_ids = chunk["user_id"] if salt is None else hash_ids(chunk["user_id"], salt)
    columns = {USER: users.encode(user_ids), ITEM: items.encode(chunk["item_id"])}
    if source.timed:
        columns[TIME] = chunk["timestamp"].to_numpy()
    if source.presplit:
        columns[SPLIT] = chunk["split"].to_numpy()
    return columns


def _spool_items(
    chunks: Iterator[pl.DataFrame], items: IdCodes, folder: Path, in_log: int, whole: bool
) -> dict[str, int] | None:
    """Writes what the item table knows of items of the log (`whole`: of all items) and which have a title.

    Returns how many `items` the table has, and how many of the log's are `known` to it; None without a table.
    """
    (folder / ITEM_TABLE).mkdir()
    titled = np.zeros(in_log, bool)
    size = matched = 0
    any_chunk = False
    known = pl.DataFrame({"item_id": items.ids()}).with_row_index("code")
    for number, chunk in enumerate(chunks):
        any_chunk = True
        size += len(chunk)
        if whole:
            chunk = chunk.with_columns(pl.Series("code", items.encode(chunk["item_id"])))
            titled = np.pad(titled, (0, max(0, len(items.ids()) - len(titled))))
        else:
            chunk = chunk.join(known, on="item_id", how="inner", maintain_order="left")
        matched += int((chunk["code"] < in_log).sum())
        if "title" in chunk.columns:
            has_title = chunk["title"].is_not_null() & (chunk["title"] != "")
            titled[chunk["code"].to_numpy()[has_title.fill_null(False).to_numpy()]] = True
        chunk.drop("item_id").write_parquet(folder / ITEM_TABLE / f"{number:06d}.parquet")
    np.save(folder / TITLED, titled)
    return {"items": size, "known": matched} if any_chunk else None


def _check_matches(item_table: dict[str, int] | None, items: IdCodes, in_log: int) -> None:
    if item_table is None or item_table["known"] or not in_log:
        return
    shown = ", ".join(repr(item) for item in items.ids().head(3))
    raise UserError(
        f"--items: none of the item table's {item_table['items']:,} ids is in the log, whose items are {shown}, …; "
        "give the table that belongs to the log, name its column of ids with --item_id_column, or shift them with "
        "--item_id_offset"
    )


def _spool_users(table: pl.DataFrame | None, folder: Path, salt: bytes | None) -> None:
    if table is None:
        return
    if salt is not None:
        table = table.with_columns(hash_ids(table["user_id"], salt).alias("user_id"))
    table.write_parquet(folder / USER_TABLE)


def read_rows(file: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
    """`count` rows of a raw column from row `start` on, fewer at its end."""
    return np.fromfile(file, dtype, count, offset=start * dtype.itemsize)


def check_titles(folder: Path, policy: str, has_items: bool) -> np.ndarray | None:
    """For the policy "drop": which item codes stay (bool); else None.

    Raises UserError for "error" where an item of the log has no title, and for both where nothing tells titles.
    """
    if policy == "keep":
        return None
    titled = np.load(folder / TITLED, allow_pickle=False)
    if not has_items:
        raise UserError(f"--missing_title {policy}: the source has no item table; give --items, or leave it out")
    if not titled.any():
        raise UserError(f"--missing_title {policy}: the item table has a title of no item; see --title_column, --items")
    if policy == "error" and not titled.all():
        ids = pl.read_parquet(folder / ITEMS)["id"].filter(pl.Series(~titled))
        raise UserError(
            f"--missing_title error: {len(ids):,} of {len(titled):,} items have no title, such as "
            f"{', '.join(ids.head(_SHOWN))}; mend the item table, or give --missing_title drop or keep"
        )
    return titled if policy == "drop" else None
