"""Item tables: ids, titles and further text, and whether their ids count from 0 where the log's count from 1."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from efficientids.data.sources.base import BadRows
from efficientids.data.sources.columns import ITEM, TEXTS, TITLE, find_column, listed, need_column, normal
from efficientids.data.sources.json_lines import ObjectFile
from efficientids.data.sources.log_source import Part, finish
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.rows import Rows
from efficientids.data.sources.tables import open_item_table
from efficientids.data.sources.typed import Reason, again, is_not, raw, text_value, typed_rows, whole_value
from efficientids.errors import UserError


@dataclasses.dataclass(frozen=True)
class ItemTable:
    """An item table.

    Attributes:
        title: its column; None: items have no titles.
        texts: further columns that are kept under their own names; lists of texts stay lists.
        offset: added to whole-number ids; None: chosen by `counted_from_zero`.
        whole_ids: ids are whole numbers.
        unescape: texts have HTML entities.
        repeats: an id may occur again: the first row counts, the others are counted in the notes. Otherwise they are
            bad rows.
        parted: columns of texts parted by a sign, with that sign: they become lists.
        nothing: what stands in a list for no text.
    """

    rows: Rows
    id: str
    title: str | None
    texts: tuple[str, ...] = ()
    offset: int | None = None
    whole_ids: bool = False
    unescape: bool = False
    repeats: bool = False
    parted: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nothing: str = ""

    @property
    def path(self) -> Path:
        """The file."""
        return self.rows.path

    def chunks(self, bad: BadRows, log: Sequence[Part], notes: list[str]) -> Iterator[pl.DataFrame]:
        """See `Items`. Raises UserError for a table without rows or with too many bad ones."""
        offset = self._offset(log, notes)
        before, good, repeats = bad.count, 0, 0
        seen: set[str] = set()
        lists = [name for name in self.texts if name in self.rows.list_columns]
        columns = [self.id, *([self.title] if self.title else []), *self.texts]
        for frame in self.rows.frames(columns, bad, lists):
            chunk, wrong = typed_rows(frame, self._values(offset, lists), self._reasons(offset))
            for line, reason in wrong:
                bad.add(self.path, line, reason)
            twice = pl.Series("twice", again(chunk["item_id"], seen), pl.Boolean)
            repeats += int(twice.sum())
            for line, item in chunk.filter(twice).select("line", "item_id").iter_rows() if not self.repeats else ():
                bad.add(self.path, line, f"{self.id} {item} occurs twice")
            chunk = chunk.filter(~twice).drop("line")
            good += chunk.height
            if not chunk.is_empty():
                yield self._unescaped(chunk) if self.unescape else chunk
        if self.repeats and repeats:
            _note(notes, f"{self.path.name}: {repeats:,} rows repeat an item; the first of each counts")
        finish(self.path, good + repeats if self.repeats else good, before, bad)

    def _values(self, offset: int, lists: Sequence[str]) -> list[pl.Expr]:
        number = whole_value(self.id)
        item = (number + offset).cast(pl.String) if offset or self.whole_ids else text_value(self.id)
        title = pl.lit(None, pl.String) if self.title is None else text_value(self.title)
        values = [pl.col("line"), item.alias("item_id"), title.alias("title")]
        for name in self.texts:
            if name in lists:
                values.append(raw(name).list.drop_nulls().alias(name))
            elif name in self.parted:
                parts = raw(name).str.split(self.parted[name])
                values.append(parts.list.eval(pl.element().filter(~pl.element().is_in(["", self.nothing]))).alias(name))
            else:
                values.append(text_value(name).alias(name))
        return values

    def _reasons(self, offset: int) -> list[Reason]:
        missing = pl.col("item_id").is_null()
        if offset or self.whole_ids:
            return [(missing, is_not(self.id, "a whole number"))]
        return [(missing, pl.lit(f"{self.id} is empty"))]

    def _offset(self, log: Sequence[Part], notes: list[str]) -> int:
        if self.offset is not None:
            return self.offset
        items = self._counted_from_zero()
        chunks = (chunk["item_id"] for part in log for chunk in part.chunks(BadRows(max_share=1)))
        if not items or not counted_from_one(chunks, items, self.path):
            return 0
        _note(notes, f"{self.path.name} counts items from 0, the log from 1: 1 is added to its ids (--item_id_offset)")
        return 1

    def _counted_from_zero(self) -> int:
        """N where the ids are exactly 0 … N − 1, else 0."""
        frames = [frame.select(self.id) for frame in self.rows.frames([self.id], BadRows(max_share=1))]
        if not frames:
            return 0
        ids = pl.concat(frames).to_series().str.strip_chars().cast(pl.Int64, strict=False).sort()
        return len(ids) if ids.null_count() == 0 and np.array_equal(ids.to_numpy(), np.arange(len(ids))) else 0

    def _unescaped(self, chunk: pl.DataFrame) -> pl.DataFrame:
        columns = [pl.Series(n, [_unescape(v) for v in chunk[n]], chunk.schema[n]) for n in ("title", *self.texts)]
        return chunk.with_columns(columns)


def counted_from_one(chunks: Iterable[pl.Series], items: int, path: Path) -> bool:
    """Whether item ids, in chunks, are exactly 1 … `items`, where those of the table `path` are 0 … `items` − 1.

    Looks at them up to the first id that settles it. Raises UserError when the id `items`, which the table lacks, is
    among them, but not all others: then neither reading is sure.
    """
    found = np.zeros(items + 1, bool)
    for chunk in chunks:
        ids = chunk.unique().cast(pl.Int64, strict=False)
        if ids.null_count() or np.min(ids.to_numpy()) < 1 or np.max(ids.to_numpy()) > items:
            return False
        found[ids.to_numpy()] = True
    if found[items] and not np.all(found[1:]):
        raise UserError(
            f"{path}: its items are numbered 0 to {items - 1}, the log's 1 to {items} with gaps, so rows may be "
            "those of the item before. Say which: --item_id_offset 1 (or 0)"
        )
    return bool(np.all(found[1:]))


def named_item_table(path: Path, options: SourceOptions, **more: Any) -> ItemTable:
    """Opens an item table in whichever format; see `named_rows`."""
    return named_rows(open_item_table(path, options), options, **more)


def named_rows(rows: Rows, options: SourceOptions, **more: Any) -> ItemTable:
    """The item table `rows`, whose columns have usual names or are named by the options.

    `more`: further fields of `ItemTable`. Raises UserError where the id's column is not clear, a named column is
    missing, or there is nothing but ids.
    """
    path = rows.path
    if isinstance(rows, ObjectFile) and options.item_id_column is None:
        item: str = ObjectFile.KEY
    else:
        item = need_column(path, rows.columns, ITEM, options.item_id_column, "item_id_column", "item ids")
    title = find_column(path, rows.columns, TITLE, options.title_column, "title_column", "titles")
    if options.text_columns is None:
        texts = tuple(name for name in rows.columns if normal(name) in TEXTS and name not in (item, title))
    else:
        texts = options.text_columns
        for name in texts:
            if name not in rows.columns:
                raise UserError(f"--text_columns {name}: {path} has no such column; it has {listed(rows.columns)}")
    if title is None and not texts:
        raise UserError(
            f"{path}: no column is known to hold titles or other text; it has {listed(rows.columns)}. Name it with "
            "--title_column"
        )
    return ItemTable(rows, item, title, texts, options.item_id_offset, **more)


def describe(table: ItemTable) -> str:
    """In words, for the report."""
    held = listed([*([f"title ({table.title})"] if table.title else []), *table.texts])
    return f"item table {table.path.name}: ids from {table.id}; {held}"


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


def _unescape(value: Any) -> Any:
    if value is None:
        return None
    return html.unescape(value) if isinstance(value, str) else [html.unescape(part) for part in value]
