"""Tables with one interaction a row: CSV, TSV, Parquet, JSON lines. And rows with a history each: `histories`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efficientids.data.sources.base import BadRows
from efficientids.data.sources.columns import HISTORY, ITEM, RATING, SPLIT, TIME, USER, find_column, need_column
from efficientids.data.sources.files import LogFile, data_set_name, find_item_table, log_files
from efficientids.data.sources.histories import open_histories
from efficientids.data.sources.item_table import describe, named_item_table
from efficientids.data.sources.log_source import LogSource, RowsPart
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.rows import Rows
from efficientids.data.sources.tables import open_table
from efficientids.data.sources.times import Clock
from efficientids.errors import UserError

DEFAULT_CORE = 5


def open_table_source(inputs: Sequence[Path], items: Path | None, options: SourceOptions) -> LogSource:
    """A table, by named or usual columns. Raises UserError where a column is not clear."""
    files = log_files(inputs, needs_train=False)
    tables = [open_table(file.path, options) for file in files]
    first = tables[0]
    history = find_column(first.path, first.columns, HISTORY, options.history_column, "history_column", "histories")
    if history is not None:
        source = open_histories(files, tables, history, options)
    else:
        if any(file.split is not None for file in files) and files[0].split != 0:
            raise UserError(f"{files[0].path}: no train file beside it; give it as --input too")
        source = rows_source(files, tables, options, "table")
    return with_items(source, files, items, options)


def rows_source(
    files: Sequence[LogFile], tables: Sequence[Rows], options: SourceOptions, kind: str, *, core: int = DEFAULT_CORE
) -> LogSource:
    """One interaction a row, in files of one form: columns as in the first of them, the same unit of time in all."""
    path, columns = tables[0].path, tables[0].columns
    user = need_column(path, columns, USER, options.user_column, "user_column", "user ids")
    item = need_column(path, columns, ITEM, options.item_column, "item_column", "item ids")
    time = find_column(path, columns, TIME, options.time_column, "time_column", "times")
    rating = find_column(path, columns, RATING, options.rating_column, "rating_column", "ratings")
    split = find_column(path, columns, SPLIT, options.split_column, "split_column", "the split")
    by_file = any(file.split is not None for file in files)
    if by_file and split is not None:
        raise UserError(f"{path}: the files' names and the column {split} both say the split; give one file")
    clock = None if time is None else clock_of(tables[0], time)
    parts = []
    for file, table in zip(files, tables, strict=True):
        lacking = [name for name in (user, item, time, rating) if name is not None and name not in table.columns]
        if lacking:
            raise UserError(f"{table.path}: no column {lacking[0]}, which {path.name} has; mend the header")
        parts.append(RowsPart(table, user, item, time, rating, clock, file.split, split))
    presplit = by_file or split is not None
    notes = [f"columns: users {user}, items {item}, times {time or 'none'}, ratings {rating or 'none'}"]
    notes.append("no times: rows stand in file order" if clock is None else f"times are {clock.describe()}")
    if split is not None:
        notes.append(f"splits are given by column {split}")
    elif by_file:
        notes.append(f"splits are given by files: {', '.join(file.path.name for file in files)}")
    paths = tuple(file.path for file in files)
    name = data_set_name(files)
    return LogSource(name, kind, paths, clock is not None, presplit, 0 if presplit else core, parts, notes=notes)


def clock_of(rows: Rows, column: str) -> Clock:
    """How the first rows write their times. Raises UserError for a table without rows, or where they write none."""
    frame = next(rows.frames([column], BadRows(max_share=1)), None)
    if frame is None:
        raise UserError(f"{rows.path}: no rows that can be read; check that it is the right file and its separator")
    return Clock.of(frame[column], rows.path, column)


def with_items(
    source: LogSource, files: Sequence[LogFile], items: Path | None, options: SourceOptions, **more: bool
) -> LogSource:
    """Adds the item table `items`, else the one beside the log. `more`: as in `named_item_table`.

    Raises UserError when an option speaks of an item table and there is none.
    """
    path = items if items is not None else find_item_table(files)
    if path is None:
        said = [name for name in ("item_id_column", "title_column", "text_columns", "item_id_offset")
                if name in options.given()]  # fmt: skip
        if said:
            raise UserError(f"--{said[0]}: there is no item table; give it with --items")
        source.notes.append("no item table")
        return source
    table = named_item_table(path, options, **more)
    source.item_table = table
    source.files = (*source.files, path)
    source.notes.append(describe(table) + ("" if items is not None else "; found beside the log"))
    return source
