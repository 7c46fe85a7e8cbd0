"""Reads a source whole, for the tests of readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from efficientids.data.sources import SourceOptions, open_source
from efficientids.data.sources.base import CHUNK_SCHEMA, BadRows, Source


class Read:
    """What a source holds: `rows` of interactions (times in seconds; `frame` has them in ms), `items`, `users`, `bad`
    (in words), and the source itself.
    """

    def __init__(self, source: Source, max_share: float) -> None:
        bad = BadRows(max_share)
        chunks = list(source.interactions(bad))
        expected = {**CHUNK_SCHEMA, **({"split": pl.UInt8} if source.presplit else {})}
        for chunk in chunks:
            assert dict(chunk.schema) == expected
        self.source = source
        self.frame = pl.concat(chunks)
        self.rows = self.frame.with_columns(pl.col("timestamp") // 1000).rows()
        tables = list(source.items(bad))
        self.items = pl.concat(tables) if tables else None
        self.users = source.users(bad)
        self.bad = [str(row) for row in bad.first]
        self.count = bad.count


ReadSource = Callable[..., Read]


@pytest.fixture
def read() -> ReadSource:
    """(kind, inputs, items, the share of bad rows that is passed over, options) → what the source holds."""

    def read_source(
        kind: str, *inputs: Path, items: Path | None = None, max_share: float = 1.0, **options: object
    ) -> Read:
        return Read(open_source(kind, inputs, items, SourceOptions(**options)), max_share)  # type: ignore[arg-type]

    return read_source
