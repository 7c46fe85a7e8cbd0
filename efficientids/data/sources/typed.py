"""Rows of text → rows of values, and the reason of each row that has none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from efficientids.data.sources.base import TEST, TRAIN, VALIDATION

SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("valid", "validation", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
"""How files, columns and fields call the splits."""

Reason = tuple[pl.Expr, pl.Expr]
"""What holds of a bad row, and why that is bad."""


def raw(column: str) -> pl.Expr:
    """The text that stands in a row, in the expressions given to `typed_rows`."""
    return pl.col(raw_name(column))


def raw_name(column: str) -> str:
    """The name under which `typed_rows` keeps the text: a value may have the name of the column it comes from."""
    return f"text of {column}"


def typed_rows(
    frame: pl.DataFrame, values: Sequence[pl.Expr], reasons: Sequence[Reason]
) -> tuple[pl.DataFrame, list[tuple[int, str]]]:
    """The values of a frame's good rows; and (line, reason) of the others.

    `frame` has `line` and columns of text, which `values` know as `raw`; `reasons` may look at both. The first reason
    that holds is told.
    """
    frame = frame.select("line", *(pl.col(name).alias(raw_name(name)) for name in frame.columns if name != "line"))
    frame = frame.with_columns(values)
    names = [value.meta.output_name() for value in values]
    wrong = frame.select(pl.any_horizontal(condition for condition, _ in reasons)).to_series()
    if not wrong.any():
        return frame.select(names), []
    # Over all rows: a condition may look at other rows than its own.
    why = frame.select("line", pl.coalesce(pl.when(condition).then(text) for condition, text in reasons))
    return frame.filter(~wrong).select(names), list(why.filter(wrong).iter_rows())


def is_not(column: str, expected: str) -> pl.Expr:
    """The reason of a value of another type."""
    shown = raw(column).str.slice(0, 60)
    return pl.format("{} is '{}', expected {}", pl.lit(column), shown, pl.lit(expected))


def text_value(column: str) -> pl.Expr:
    """The text without spaces around it; null where there is none."""
    text = raw(column).str.strip_chars()
    return pl.when(text != "").then(text)


def number_value(column: str) -> pl.Expr:
    """A finite Float64, else null."""
    value = raw(column).str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def whole_value(column: str) -> pl.Expr:
    """An Int64, else null."""
    return raw(column).str.strip_chars().cast(pl.Int64, strict=False)


def split_value(column: str) -> pl.Expr:
    """TRAIN, VALIDATION or TEST as UInt8, else null."""
    names = raw(column).str.strip_chars().str.to_lowercase()
    return names.replace_strict(SPLITS, default=None, return_dtype=pl.UInt8)


def again(ids: Iterable[str], seen: set[str]) -> list[bool]:
    """Which ids are in `seen` or occur earlier; adds all to it."""
    found = []
    for text in ids:
        found.append(text in seen)
        seen.add(text)
    return found
