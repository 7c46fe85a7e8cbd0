"""What every reader of interaction logs hands to `prepare`: bounded chunks of rows, and the rows it could not read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import polars as pl

from efficientids.errors import UserError

MAX_BAD_SHARE = 0.01
SHOWN_BAD_ROWS = 5

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Values of the column `split` of a source that comes split."""

CHUNK_SCHEMA = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "rating": pl.Float64}
"""A chunk of interactions. `timestamp`: milliseconds since 1970, so that no order within a second is lost (null where
the source has no times; a data set keeps seconds); `rating`: may be null. A source that comes split has a column
`split` (UInt8: TRAIN, VALIDATION, TEST) beside them."""


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used; `line` counts from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRows:
    """Collects unusable rows while a source is read: all are counted, the first ones kept for people to look at.

    Args:
        max_share: of a file's rows that may be unusable; more and `checked` refuses the file.
        secret: say where bad rows are, not what stands in them: a reason may quote a user's id.
    """

    def __init__(self, max_share: float = MAX_BAD_SHARE, *, secret: bool = False) -> None:
        self.max_share, self._secret = max_share, secret
        self.count = 0
        self._of_file: dict[Path, tuple[int, list[BadRow]]] = {}

    @property
    def first(self) -> list[BadRow]:
        """The first unusable rows, by file and line, however the file was cut into blocks."""
        return [row for _, rows in self._of_file.values() for row in rows][:SHOWN_BAD_ROWS]

    def add(self, file: Path, line: int, reason: str) -> None:
        """Notes an unusable row of `file`."""
        if self._secret:
            reason = "(not shown, as --hash_users is given)"
        count, first = self._of_file.get(file, (0, []))
        if len(first) < SHOWN_BAD_ROWS or line < first[-1].line:
            first = sorted([*first, BadRow(file.name, line, reason)], key=lambda row: row.line)[:SHOWN_BAD_ROWS]
        self._of_file[file] = (count + 1, first)
        self.count += 1

    def checked(self, file: Path, total: int) -> None:
        """Raises UserError when more than `max_share` of the `total` rows of `file` are unusable, showing the first."""
        count, rows = self._of_file.get(file, (0, []))
        if count <= self.max_share * total:
            return
        first = "; ".join(str(row) for row in rows)
        raise UserError(
            f"{file}: {count:,} of {total:,} rows cannot be read ({count / total:.1%}, at most {self.max_share:.0%} "
            f"are passed over; --max_bad_share changes that). First: {first}. Mend these lines, or check that this is "
            "the right file and that --source and the column flags fit it"
        )


class Source(Protocol):
    """An interaction log as found: before any filter or order. Every method may be called more than once.

    Attributes:
        name: of the data set, from the file's or folder's name.
        kind: what it was read as ("amazon-2014", "recbole", …); stands in the manifest.
        files: every file that is read.
        timed: rows have timestamps; otherwise each user's rows stand in their order already.
        presplit: chunks have a `split` column; a user's order is then train, validation, test.
        default_core: the k of the k-core filter when --core is not given; 0 where somebody has filtered before.
        notes: what was chosen from the files rather than told (columns, unit of time, item table, offset of ids), in
            words for the report; complete once interactions and items have been read.
    """

    name: str
    kind: str
    files: tuple[Path, ...]
    timed: bool
    presplit: bool
    default_core: int
    notes: list[str]

    def interactions(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """Chunks of `CHUNK_SCHEMA`, bounded in size (a few hundred thousand rows), rows in file order."""

    def items(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        """Chunks of the item table: item_id (String) and what is known of items: title (String, null for none),
        further columns of text. No chunk where there is no item table. An id occurs once."""

    def users(self, bad: BadRows) -> pl.DataFrame | None:
        """What is known of users: user_id (String) and further columns; None where nothing is."""
