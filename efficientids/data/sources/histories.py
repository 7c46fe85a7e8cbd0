"""Rows with a history each, as MiniOneRec's csv and RecBole's benchmark files: (user, the items before, the item).

A user's sequence is the history of the user's first row, then the item of each row in order. Histories may be cut to
the newest few items; each must be the end of the sequence so far, else the row is a bad row. What stands in a first
history trains; an item to predict belongs to the split of its file.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

import polars as pl

from efficientids.data.sources.base import TRAIN, BadRows
from efficientids.data.sources.columns import ITEM, USER, need_column
from efficientids.data.sources.files import LogFile, data_set_name
from efficientids.data.sources.json_lines import MAX_LITERAL, as_text
from efficientids.data.sources.log_source import LogSource, finish
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.rows import Rows

ROWS_A_CHUNK = 200_000
_SHOWN = 5

ParseList = Callable[[str], list[str]]


@dataclasses.dataclass(frozen=True)
class HistoriesPart:
    """All files of such rows, train first. `splits`: of each table, None where rows are not split; `parse`: the text of
    a history → its items, ValueError where it is none."""

    tables: Sequence[Rows]
    splits: Sequence[int | None]
    user: str
    history: str
    item: str
    parse: ParseList

    def chunks(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `Part`. Memory: 8 bytes an interaction, for the check of histories."""
        names: dict[str, str] = {}  # one string object an item
        sequences: dict[str, list[str]] = {}
        rows: list[tuple[str, str, int]] = []
        for table, split in zip(self.tables, self.splits, strict=True):
            before, good = bad.count, 0
            for line, user, history, item in self._rows(table, bad):
                try:
                    earlier = [names.setdefault(text, text) for text in self._items(history)]
                    if not user or not item:
                        raise ValueError(f"{self.item if user else self.user} is empty")
                    known = sequences.get(user)
                    if known is not None and earlier != known[len(known) - len(earlier) :]:
                        raise ValueError(_broken(earlier, known))
                except ValueError as error:
                    bad.add(table.path, line, str(error))
                    continue
                if known is None:
                    known = sequences[user] = earlier
                    rows += [(user, text, TRAIN) for text in earlier]
                known.append(names.setdefault(item, item))
                rows.append((user, item, TRAIN if split is None else split))
                good += 1
                if len(rows) >= ROWS_A_CHUNK:
                    yield self._chunk(rows)
                    rows = []
            finish(table.path, good, before, bad)
        if rows:
            yield self._chunk(rows)

    def _rows(self, table: Rows, bad: BadRows) -> Iterator[tuple[int, str, list[str] | str | None, str]]:
        lists = [self.history] if self.history in table.list_columns else []
        for frame in table.frames([self.user, self.history, self.item], bad, lists):
            for line, user, history, item in frame.iter_rows():
                yield line, user.strip(), history, item.strip()

    def _items(self, history: list[str] | str | None) -> list[str]:
        items = self.parse(history) if isinstance(history, str) else [text for text in history or [] if text]
        if any(not item for item in items):
            raise ValueError(f"{self.history} has an empty item")
        return items

    def _chunk(self, rows: Sequence[tuple[str, str, int]]) -> pl.DataFrame:
        schema = {"user_id": pl.String, "item_id": pl.String, "split": pl.UInt8}
        frame = pl.DataFrame(rows, schema=schema, orient="row")
        times = [pl.lit(None, pl.Int64).alias("timestamp"), pl.lit(None, pl.Float64).alias("rating")]
        split = ["split"] if any(split is not None for split in self.splits) else []
        return frame.select("user_id", "item_id", *times, *split)


def open_histories(
    files: Sequence[LogFile], tables: Sequence[Rows], history: str, options: SourceOptions, *, spaced: bool = False
) -> LogSource:
    """A source of such rows. `spaced`: histories are ids parted by spaces; otherwise lists, as JSON or as Python writes
    them. Raises UserError where a column is not clear."""
    path, columns = tables[0].path, [name for name in tables[0].columns if name != history]
    user = need_column(path, columns, USER, options.user_column, "user_column", "user ids")
    item = need_column(path, columns, ITEM, options.item_column, "item_column", "the item to predict")
    splits = [file.split for file in files]
    presplit = any(split is not None for split in splits)
    part = HistoriesPart(tables, splits, user, history, item, str.split if spaced else parse_list)
    notes = [
        f"columns: users {user}, histories {history}, items to predict {item}; no times: rows stand in file order",
        "a user's sequence is the first row's history, which trains, then the items to predict in the rows' order",
    ]
    if presplit:
        notes.append(f"splits are given by files: {', '.join(file.path.name for file in files)}")
    paths = tuple(file.path for file in files)
    return LogSource(data_set_name(files), "histories", paths, False, presplit, 0, [part], notes=notes)


def parse_list(text: str) -> list[str]:
    """The items of a list as JSON or Python writes it. Raises ValueError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if len(text) > MAX_LITERAL:
            raise ValueError(f"a history of {len(text):,} characters, at most {MAX_LITERAL:,} are read") from None
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise ValueError(f"history is {text[:40]!r}, expected a list of items") from None
    if not isinstance(value, list | tuple) or any(not isinstance(item, str | int) for item in value):
        raise ValueError(f"history is {text[:40]!r}, expected a list of items")
    return [(as_text(item) or "").strip() for item in value]


def _broken(earlier: Sequence[str], known: Sequence[str]) -> str:
    end = ", ".join(known[-_SHOWN:])
    found = ", ".join(earlier[-_SHOWN:])
    return f"the history ends with [{found}], the user's earlier rows with [{end}]: a row between them is missing"
