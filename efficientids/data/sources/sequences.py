"""A user's items in a row: lines `user item item …`, JSON lines {"user": …, "items": […]}, one JSON object
{user: [items]}. JSON lines may have lists train, val and test instead. There are no times: items stand in their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from efficientids.data.sources.base import BadRows
from efficientids.data.sources.columns import SEQUENCE, USER, find_column, listed, need_column, normal, recognised
from efficientids.data.sources.delimited import DelimitedFile
from efficientids.data.sources.files import LogFile, data_set_name, log_files
from efficientids.data.sources.json_lines import JsonLinesFile, as_text, parse_json
from efficientids.data.sources.log_source import LogSource, finish
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.reading import decoded, first_line, json_object
from efficientids.data.sources.table import with_items
from efficientids.data.sources.tables import JSON, TEXT, check_file, format_of
from efficientids.data.sources.typed import SPLITS, again
from efficientids.errors import UserError

_USERS_A_FRAME = 50_000
_SAMPLE = 60
_NO_SEPARATOR = "\x1f"


def open_sequences(inputs: Sequence[Path], items: Path | None, options: SourceOptions) -> LogSource:
    """Sequences in whichever form; files named train, valid and test, or lists of these names, give the split.

    Raises UserError where a field is not clear.
    """
    files = log_files(inputs, (*TEXT, *JSON))
    parts = [_open(file, options) for file in files]
    presplit = any(file.split is not None for file in files) or parts[0].splits
    notes = [parts[0].describe(), "no times: items stand in their order"]
    if presplit:
        notes.append("splits are given by " + ("lists of each line" if parts[0].splits else "files"))
    source = LogSource(
        data_set_name(files), "sequences", tuple(f.path for f in files), False, presplit, 0, parts, notes=notes
    )
    return with_items(source, files, items, options)


@dataclasses.dataclass(frozen=True)
class SequencesPart:
    """A file of sequences. Concrete ones say how a frame of `line`, user_id, items (List(String)) comes about, one row
    a user, or a user and split; `split`: of all rows; `splits`: each row has a `split`."""

    path: Path
    split: int | None

    @property
    def splits(self) -> bool:
        """Whether rows have a split of their own."""
        return False

    def describe(self) -> str:
        """In words, for the report."""
        raise NotImplementedError

    def frames(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See the class."""
        raise NotImplementedError

    def chunks(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `Part`. An empty user or item, a user twice and a row without items are bad rows."""
        before, good = bad.count, 0
        seen: set[str] = set()
        for frame in self.frames(bad):
            wrong = _reasons(frame, seen)
            for line, reason in wrong.iter_rows():
                bad.add(self.path, line, reason)
            rows = frame.filter(~pl.col("line").is_in(wrong["line"].implode()))
            good += rows["line"].n_unique()
            if rows.is_empty():
                continue
            split = [pl.lit(self.split, pl.UInt8).alias("split")] if self.split is not None else []
            rows = rows.explode("items").drop_nulls("items")
            times = [pl.lit(None, pl.Int64).alias("timestamp"), pl.lit(None, pl.Float64).alias("rating")]
            item = pl.col("items").str.strip_chars().alias("item_id")
            yield rows.select("user_id", item, *times, *(["split"] if self.splits else split))
        finish(self.path, good, before, bad)


@dataclasses.dataclass(frozen=True)
class LinesPart(SequencesPart):
    """`user item item …`, parted by spaces or tabulators."""

    def describe(self) -> str:
        """See `SequencesPart`."""
        return "lines of a user and items"

    def frames(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `SequencesPart`."""
        words = pl.col("text").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
        lines = DelimitedFile(self.path, ("text",), _NO_SEPARATOR, header=False, quoted=False)
        for frame in lines.frames(["text"], bad):
            yield frame.select("line", words.list.first().alias("user_id"), words.list.slice(1).alias("items"))


@dataclasses.dataclass(frozen=True)
class ObjectPart(SequencesPart):
    """One JSON object {user: [items]}; `line` is the entry's number."""

    def describe(self) -> str:
        """See `SequencesPart`."""
        return "one JSON object {user: [items]}"

    def frames(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `SequencesPart`."""
        schema: dict[str, Any] = {"line": pl.Int64, "user_id": pl.String, "items": pl.List(pl.String)}
        rows: list[tuple[int, str, list[str | None]]] = []
        for number, (user, items) in enumerate(json_object(self.path).items(), 1):
            if not isinstance(items, list) or any(not isinstance(item, str | int | None) for item in items):
                bad.add(self.path, number, f"user {user!r}: expected a list of items, found {str(items)[:_SAMPLE]!r}")
                continue
            rows.append((number, user, [as_text(item) for item in items]))
            if len(rows) == _USERS_A_FRAME:
                yield pl.DataFrame(rows, schema=schema, orient="row")
                rows = []
        yield pl.DataFrame(rows, schema=schema, orient="row")


@dataclasses.dataclass(frozen=True)
class JsonLinesPart(SequencesPart):
    """JSON lines. `lists`: the fields with items and the split of each, None where there is none."""

    file: JsonLinesFile
    user: str
    lists: Mapping[str, int | None]

    @property
    def splits(self) -> bool:
        """See `SequencesPart`."""
        return None not in self.lists.values()

    def describe(self) -> str:
        """See `SequencesPart`."""
        return f"JSON lines: users {self.user}, items {', '.join(self.lists)}"

    def frames(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """See `SequencesPart`."""
        for frame in self.file.frames([self.user, *self.lists], bad, list(self.lists)):
            user = pl.col(self.user).str.strip_chars().alias("user_id")
            if not self.splits:
                yield frame.select("line", user, pl.col(*self.lists).alias("items"))
                continue
            parts = [
                frame.select("line", user, pl.col(name).alias("items"), pl.lit(split, pl.UInt8).alias("split"))
                for name, split in self.lists.items()
            ]
            # One user after the other, the lists of each in the order of the splits.
            yield pl.concat(parts).sort("line", "split")


def _open(file: LogFile, options: SourceOptions) -> SequencesPart:
    path = file.path
    check_file(path)
    line = decoded(path, first_line(path))
    if not line.lstrip().startswith("{") and format_of(path) not in JSON:
        if options.user_column is not None or options.sequence_column is not None:
            raise UserError(f"--user_column, --sequence_column: {path} has no names of columns; leave them out")
        return LinesPart(path, file.split)
    first = parse_json(line)
    fields = list(first) if isinstance(first, dict) else []
    if not fields or (options.user_column is None and not recognised(fields, USER)):
        return ObjectPart(path, file.split)
    rows = JsonLinesFile.open(path)
    user = need_column(path, rows.columns, USER, options.user_column, "user_column", "user ids")
    named = {name: SPLITS[normal(name)] for name in rows.columns if normal(name) in SPLITS}
    sequence = find_column(path, rows.columns, SEQUENCE, options.sequence_column, "sequence_column", "a user's items")
    if sequence is not None:
        return JsonLinesPart(path, file.split, rows, user, {sequence: None})
    if len(named) < 2 or len(set(named.values())) < len(named) or file.split is not None:
        raise UserError(
            f"{path}: no field is known to hold a user's items; it has {listed(rows.columns)}. Name it with "
            "--sequence_column, or call lists of a given split train, val and test"
        )
    return JsonLinesPart(path, None, rows, user, named)


def _reasons(frame: pl.DataFrame, seen: set[str]) -> pl.DataFrame:
    """`line` and `why` of each bad line. Adds the users to `seen`."""
    element = pl.element().str.strip_chars()
    lines = frame.group_by("line", maintain_order=True).agg(
        pl.col("user_id").first(),
        pl.col("items").list.len().sum().alias("count"),
        pl.col("items").list.eval(element.is_null() | (element == "")).list.any().any().alias("empty"),
    )
    user = pl.col("user_id").fill_null("")
    why = (
        pl.when(user == "")
        .then(pl.lit("the user is empty"))
        .when(pl.Series("again", again(lines["user_id"], seen)))
        .then(pl.format("user {} occurs twice", user))
        .when(pl.col("count") == 0)
        .then(pl.format("user {} has no items", user))
        .when(pl.col("empty"))
        .then(pl.format("user {} has an empty item", user))
    )
    return lines.select("line", why.alias("why")).drop_nulls("why")
