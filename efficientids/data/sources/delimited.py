"""Text tables: fields parted by a separator, which may be quoted as in CSV (RFC 4180).

A block of bytes is read by polars where its structure is beyond doubt; only the others are read row by row, to name the
line and the reason of each bad row. Both ways give the same rows.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from efficientids.data.sources.base import BadRows
from efficientids.data.sources.reading import Cut, line_blocks, line_cut

_QUOTE, _NEWLINE = 34, 10
_UNIT_SEPARATOR = "\x1f"
_SHOWN_NAMES = 8
_OPEN_QUOTE_BYTES = 1 << 20
"""A quote that is not closed for so long is looked at row by row."""


@dataclasses.dataclass(frozen=True)
class DelimitedFile:
    """A text table.

    Attributes:
        columns: names from the left.
        separator: one character or more.
        header: the first row is not data.
        quoted: fields may be quoted; otherwise quotes are text.
        encoding: of the text; rows that are not UTF-8 are bad rows.
    """

    path: Path
    columns: tuple[str, ...]
    separator: str = ","
    header: bool = True
    quoted: bool = True
    encoding: Literal["utf-8", "latin-1"] = "utf-8"

    @property
    def list_columns(self) -> frozenset[str]:
        """A text table has no lists."""
        return frozenset()

    def frames(self, columns: Sequence[str], bad: BadRows, lists: Collection[str] = ()) -> Iterator[pl.DataFrame]:
        """See `Rows`; a text table has no lists."""
        skip = self.header
        cut: Cut = self.cut if self.quoted else line_cut
        for line, block in line_blocks(self.path, cut):
            if self.encoding == "latin-1":
                block = block.decode("latin-1").encode()
            block = block.replace(b"\r\n", b"\n")
            frame = self._fast(line, block)
            if frame is None:
                frame = self._slow(line, block, bad)
            if skip:
                frame = frame.filter(pl.col("line") > 1)
                skip = False
            if not frame.is_empty():
                yield frame.select("line", *dict.fromkeys(columns))

    def _fast(self, line: int, block: bytes) -> pl.DataFrame | None:
        """The block's rows, or None where some may be malformed."""
        separator = self.separator.encode()
        if self.quoted and b'"' in block:
            layout = quoted_layout(block, separator)
            if layout is None or layout.end != len(block):
                return None
            lines, separators = line + layout.starts, layout.separators
        else:
            lines = np.arange(line, line + block.count(b"\n"), dtype=np.int64)
            separators = block.count(separator)
        # Polars fills up short rows, but raises on long ones: with the right sum there is neither.
        if separators != len(lines) * (len(self.columns) - 1) or b"\r" in block:
            return None
        if len(separator) > 1:
            if _UNIT_SEPARATOR.encode() in block:
                return None
            block = block.replace(separator, _UNIT_SEPARATOR.encode())
        try:
            frame = pl.read_csv(
                block,
                has_header=False,
                schema=dict.fromkeys(self.columns, pl.String),
                separator=self.separator if len(separator) == 1 else _UNIT_SEPARATOR,
                quote_char='"' if self.quoted else None,
            )
        except pl.exceptions.PolarsError:
            return None
        if frame.height != len(lines):
            return None
        return frame.select(pl.Series("line", lines, pl.Int64), pl.all().fill_null(""))

    def _slow(self, line: int, block: bytes, bad: BadRows) -> pl.DataFrame:
        rows: list[tuple[int | str, ...]] = []
        expected = len(self.columns)
        names = ", ".join(self.columns[:_SHOWN_NAMES]) + (", …" if expected > _SHOWN_NAMES else "")
        for number, taken, fields in self._records(line, block.decode("utf-8", "surrogateescape")):
            reason = ""
            if isinstance(fields, str):
                reason = fields
            elif len(fields) != expected:
                reason = f"{len(fields)} fields, expected {expected} ({names})"
                if taken > 1:
                    reason += f"; a quote that is opened here runs over {taken} lines"
            elif not _is_unicode(fields):
                reason = "not UTF-8; convert the file to UTF-8"
            if not reason:
                rows.append((number, *fields))
            for lost in range(taken if reason else 0):  # every line counts that such a row has swallowed
                bad.add(self.path, number + lost, reason)
        schema = {"line": pl.Int64, **dict.fromkeys(self.columns, pl.String)}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def _records(self, line: int, text: str) -> Iterator[tuple[int, int, list[str] | str]]:
        """(line, lines taken, fields or what is wrong) of each row."""
        lines = text.removesuffix("\n").split("\n")
        if not self.quoted:
            for number, row in enumerate(lines, line):
                yield number, 1, row.split(self.separator)
            return
        for start, taken, fields, complete in _csv_records(lines, self.separator):
            yield line + start, taken, fields if complete else "a quote that is opened here is not closed"

    def cut(self, buffer: bytes) -> int:
        """As `line_cut`, but never within quotes."""
        end = line_cut(buffer)
        if not end or b'"' not in buffer:
            return end
        layout = quoted_layout(buffer[:end].replace(b"\r\n", b"\n\n"), self.separator.encode())
        if layout is not None and (layout.end or end < _OPEN_QUOTE_BYTES):
            return layout.end
        # The csv module's rows; of the last one it cannot be known whether it is complete.
        lines = [row + b"\n" for row in buffer[:end].removesuffix(b"\n").split(b"\n")]
        texts = [row[:-1].removesuffix(b"\r").decode("latin-1") for row in lines]
        taken = [start + count for start, count, _, complete in _csv_records(texts, self.separator) if complete]
        return sum(len(row) for row in lines[: taken[-1]]) if taken else 0


@dataclasses.dataclass(frozen=True)
class QuotedLayout:
    """Complete rows of well-formed CSV. `end`: bytes they take; `starts`: int64, the line on which each starts, from 0;
    `separators`: how many stand between fields."""

    end: int
    starts: np.ndarray
    separators: int


def quoted_layout(block: bytes, separator: bytes) -> QuotedLayout | None:
    """The structure of a block that starts outside quotes and ends with a line end; None where its quotes are not
    those of RFC 4180.

    Counting quotes from the start, an even one opens a field (it stands after a separator or a line end) or is the
    second of a pair; an odd one closes a field (before a separator or a line end) or is the first of a pair.
    """
    data = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(data == _QUOTE)
    newlines = np.flatnonzero(data == _NEWLINE)
    edges = np.array([_NEWLINE, separator[0]], np.uint8)
    opening, closing = quotes[0::2], quotes[1::2]
    paired = opening[1:] == closing[: len(opening) - 1] + 1  # this opening and the closing before it
    at_start = np.isin(data[opening - 1], edges)  # before a quote at 0 that is the block's last byte, a line end
    at_start[1:] |= paired
    at_end = np.isin(data[closing + 1], edges)
    at_end[: len(paired)] |= paired
    if not (np.all(at_start) and np.all(at_end)):
        return None
    outside = np.flatnonzero(np.searchsorted(quotes, newlines) % 2 == 0)
    end = int(newlines[outside[-1]]) + 1 if len(outside) else 0
    parts = np.flatnonzero(data[:end] == separator[0])
    separators = int(np.count_nonzero(np.searchsorted(quotes, parts) % 2 == 0))
    starts = np.concatenate([[0], outside[:-1] + 1]).astype(np.int64)[: len(outside)]
    return QuotedLayout(end, starts, separators)


def _csv_records(lines: Sequence[str], separator: str) -> Iterator[tuple[int, int, list[str] | str, bool]]:
    """(first line from 0, lines taken, fields or what is wrong, whether it ended before the lines did) of each row."""
    exhausted = False

    def feed() -> Iterator[str]:
        nonlocal exhausted
        for row in lines:
            yield row + "\n"
        exhausted = True

    reader = csv.reader(feed(), delimiter=separator)
    while True:
        start = reader.line_num
        try:
            fields: list[str] | str = next(reader) or [""]
        except StopIteration:
            return
        except csv.Error as error:
            fields = f"not CSV ({error}); look for a quote that is not closed"
        yield start, reader.line_num - start, fields, not exhausted


def uses_quotes(path: Path, separator: str) -> bool:
    """Whether all quotes of the file are CSV's. Reads the file once; False where it has none."""
    found = False
    for _, block in line_blocks(path, DelimitedFile(path, (), separator).cut):
        if b'"' in block:
            found = True
            block = block.replace(b"\r\n", b"\n")
            layout = quoted_layout(block, separator.encode())
            if layout is None or layout.end != len(block):
                return False
    return found


def _is_unicode(fields: Sequence[str]) -> bool:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:  # bytes that were not UTF-8 stand there as lone surrogates
        return False
    return True
