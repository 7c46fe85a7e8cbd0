"""What a reader of some source hands to `prepare`: an interaction log as found, before any filter or order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from efficientids.errors import UserError

MAX_BAD_SHARE = 0.01
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used; `line` counts from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class InteractionLog:
    """`interactions`: user_id, item_id (strings), rating (float64), timestamp (int64, seconds), rows in file order.

    `items`: item_id and what is known of it (title, genres); `users`: user_id and what is known of them, or None. Both
    may name ids without interactions. `bad_rows` are the unusable rows of all files.
    """

    name: str
    source: str
    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame | None
    bad_rows: Sequence[BadRow]


def check_bad_rows(path: Path, bad_rows: Sequence[BadRow], total: int) -> None:
    """Raises UserError when more than 1% of the `total` rows of `path` are unusable, showing the first ones."""
    if len(bad_rows) <= MAX_BAD_SHARE * total:
        return
    first = "; ".join(str(row) for row in bad_rows[:_SHOWN])
    raise UserError(
        f"{path}: {len(bad_rows)} of {total} rows cannot be read ({len(bad_rows) / total:.1%}, at most "
        f"{MAX_BAD_SHARE:.0%} are passed over). First: {first}. Mend these lines, or check that this is the right file"
    )


def describe_bad_rows(bad_rows: Sequence[BadRow]) -> dict[str, Any]:
    """How many rows are unusable, and the first of them in words."""
    return {"count": len(bad_rows), "first": [str(row) for row in bad_rows[:_SHOWN]]}
