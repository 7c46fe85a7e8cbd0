"""A source made of tables: interactions, one a row; items; users."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

from efficientids.data.sources.base import BadRows
from efficientids.data.sources.rows import Rows
from efficientids.data.sources.times import Clock
from efficientids.data.sources.typed import (
    Reason,
    is_not,
    number_value,
    raw_name,
    split_value,
    text_value,
    typed_rows,
    whole_value,
)
from efficientids.errors import UserError


class Part(Protocol):
    """Some files of a log, read one after the other."""

    def chunks(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """As `Source.interactions`."""


class Items(Protocol):
    """An item table."""

    @property
    def path(self) -> Path:
        """What is read."""

    def chunks(self, bad: BadRows, log: Sequence[Part], notes: list[str]) -> Iterator[pl.DataFrame]:
        """As `Source.items`; `log` tells which ids occur, `notes` gets what was found."""


@dataclasses.dataclass
class LogSource:
    """A `Source`. `notes`: what was chosen from the files rather than told, in words."""

    name: str
    kind: str
    files: tuple[Path, ...]
    timed: bool
    presplit: bool
    default_core: int
    parts: Sequence[Part]
    item_table: Items | None = None
    user_table: RowsTable | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def interactions(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `Source`."""
        for part in self.parts:
            yield from part.chunks(bad)

    def items(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `Source`."""
        if self.item_table is not None:
            yield from self.item_table.chunks(bad, self.parts, self.notes)

    def users(self, bad: BadRows) -> pl.DataFrame | None:
        """See `Source`."""
        return None if self.user_table is None else self.user_table.read(bad)


@dataclasses.dataclass(frozen=True)
class RowsPart:
    """One interaction a row.

    Attributes:
        clock: how times are written; None where `time` is None.
        split: of all rows; `split_column` says it row by row. None and None: not split.
        whole_ids: ids are whole numbers; otherwise any text.
        needs_rating: a row without a rating is a bad row.
    """

    rows: Rows
    user: str
    item: str
    time: str | None = None
    rating: str | None = None
    clock: Clock | None = None
    split: int | None = None
    split_column: str | None = None
    whole_ids: bool = False
    needs_rating: bool = False

    def chunks(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `Part`. Raises UserError for a file without rows, or with too many bad ones."""
        columns = [name for name in (self.user, self.item, self.time, self.rating, self.split_column) if name]
        values, reasons = self._values(), self._reasons()
        path, total, before = self.rows.path, 0, bad.count
        for frame in self.rows.frames(columns, bad):
            good, wrong = typed_rows(frame, values, reasons)
            for line, reason in wrong:
                bad.add(path, line, reason)
            total += good.height
            if not good.is_empty():
                yield good
        finish(path, total, before, bad)

    def _values(self) -> list[pl.Expr]:
        of_id = whole_value if self.whole_ids else text_value
        values = [of_id(self.user).cast(pl.String).alias("user_id"), of_id(self.item).cast(pl.String).alias("item_id")]
        time, rating = pl.lit(None, pl.Int64), pl.lit(None, pl.Float64)
        if self.time is not None and self.clock is not None:
            time = self.clock.milliseconds(raw_name(self.time))
        if self.rating is not None:
            rating = number_value(self.rating)
        values += [time.alias("timestamp"), rating.alias("rating")]
        if self.split_column is not None:
            values.append(split_value(self.split_column).alias("split"))
        elif self.split is not None:
            values.append(pl.lit(self.split, pl.UInt8).alias("split"))
        return values

    def _reasons(self) -> list[Reason]:
        reasons: list[Reason] = []
        for name, column in (("user_id", self.user), ("item_id", self.item)):
            empty = pl.lit(f"{column} is empty")
            reasons.append((pl.col(name).is_null(), is_not(column, "a whole number") if self.whole_ids else empty))
        if self.rating is not None:
            wrong = pl.col("rating").is_null()
            if not self.needs_rating:
                wrong &= text_value(self.rating).is_not_null()
            reasons.append((wrong, is_not(self.rating, "a number")))
        if self.time is not None and self.clock is not None:
            reasons.append((pl.col("timestamp").is_null(), is_not(self.time, self.clock.expected())))
        if self.split_column is not None:
            reasons.append((pl.col("split").is_null(), is_not(self.split_column, "train, valid or test")))
        return reasons


@dataclasses.dataclass(frozen=True)
class RowsTable:
    """A small table read whole. `names`: the columns to read and the names they get; the first one is the id, which
    is never empty and occurs once. `whole`: the columns (as read) of whole numbers."""

    rows: Rows
    names: Mapping[str, str]
    whole: frozenset[str] = frozenset()

    def read(self, bad: BadRows) -> pl.DataFrame:
        """The good rows; the id as String. Raises UserError for a table without rows, or with too many bad ones."""
        path, before = self.rows.path, bad.count
        frames = list(self.rows.frames(list(self.names), bad))
        if not frames:
            finish(path, 0, before, bad)
            raise _no_rows(path)  # with bad ones alone, and all of them passed over
        values, reasons = [], []
        for column, name in self.names.items():
            value = whole_value(column) if column in self.whole else text_value(column)
            values.append(value.alias(name))
            if column in self.whole:
                reasons.append((pl.col(name).is_null(), is_not(column, "a whole number")))
        column, key = next(iter(self.names.items()))
        reasons.append((pl.col(key).is_null(), pl.lit(f"{column} is empty")))
        reasons.append((~pl.col(key).is_first_distinct(), pl.format("{} {} occurs twice", pl.lit(column), key)))
        good, wrong = typed_rows(pl.concat(frames), values, reasons)
        for line, reason in wrong:
            bad.add(path, line, reason)
        finish(path, good.height, before, bad)
        return good.with_columns(pl.col(key).cast(pl.String))


def finish(path: Path, good: int, before: int, bad: BadRows) -> None:
    """At a file's end: raises UserError where it has no rows, or too many bad ones among `good` good ones and those
    noted since there were `before`."""
    total = good + bad.count - before
    if not total:
        raise _no_rows(path)
    bad.checked(path, total)


def _no_rows(path: Path) -> UserError:
    """The error of a file that has a header at most."""
    return UserError(f"{path}: no rows; fetch or copy the file again")
