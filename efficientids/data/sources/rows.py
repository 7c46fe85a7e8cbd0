"""A table of some format as rows of text, in bounded frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

from efficientids.data.sources.base import BadRows
from efficientids.errors import UserError

PARQUET_ROWS = 500_000


class Rows(Protocol):
    """A table on disk. Every method may be called more than once."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All names of columns."""

    @property
    def list_columns(self) -> frozenset[str]:
        """The columns that hold lists."""

    def frames(self, columns: Sequence[str], bad: BadRows, lists: Collection[str] = ()) -> Iterator[pl.DataFrame]:
        """Yields frames in file order: `line` (Int64, from 1), then `columns` as String ("" where empty); those also
        named in `lists` as List(String) (null where there is none) from formats that have lists.

        Rows that are no rows go to `bad`; `bad.checked` is left to the caller, who may find more.
        """


@dataclasses.dataclass(frozen=True)
class ParquetFile:
    """A Parquet file. Whole numbers that are kept as floats (pandas does so with gaps) read as whole numbers."""

    path: Path
    columns: tuple[str, ...]
    list_columns: frozenset[str]

    @staticmethod
    def open(path: Path) -> ParquetFile:
        """Raises UserError when the file is no Parquet file."""
        try:
            schema = pl.read_parquet_schema(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again") from error
        return ParquetFile(path, tuple(schema), frozenset(n for n, kind in schema.items() if isinstance(kind, pl.List)))

    def frames(self, columns: Sequence[str], bad: BadRows, lists: Collection[str] = ()) -> Iterator[pl.DataFrame]:
        """See `Rows`; `line` is the row's number."""
        schema = pl.read_parquet_schema(self.path)
        wanted = [_as_text(name, schema[name], name in lists) for name in dict.fromkeys(columns)]
        start = 0
        while True:
            try:
                frame = pl.scan_parquet(self.path).slice(start, PARQUET_ROWS).select(wanted).collect()
            except (OSError, pl.exceptions.PolarsError) as error:
                raise UserError(f"{self.path}: cannot be read ({str(error).splitlines()[0]})") from error
            if frame.is_empty():
                return
            yield frame.select(pl.int_range(start + 1, start + 1 + pl.len(), dtype=pl.Int64).alias("line"), pl.all())
            start += frame.height


def _as_text(name: str, dtype: pl.DataType, wants_list: bool) -> pl.Expr:
    column = pl.col(name)
    if isinstance(dtype, pl.List):
        if wants_list:
            return column.cast(pl.List(pl.String))
        return column.cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True).fill_null("")
    if dtype.is_float():
        column = column.fill_nan(None)
        whole = column.cast(pl.Int64, strict=False)
        text = pl.when(whole.cast(dtype) == column).then(whole.cast(pl.String)).otherwise(column.cast(pl.String))
    elif dtype.is_temporal():
        # Read again as ISO text: one path for times of all formats.
        text = column.cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f")
    else:
        text = column.cast(pl.String)
    text = text.fill_null("")
    return (pl.concat_list(text) if wants_list else text).alias(name)
