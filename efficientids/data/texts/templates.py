r"""Templates: how an item's columns become the text that stands behind it. Data, not code: nothing is evaluated.

    {title}[ by {brand}][. {description:200}]

    {column}       the value of a column of items.parquet; of a list, its members joined by ", "
    {column:200}   at most 200 characters of it, cut at a space where there is one
    [ … ]          a part that is left out as a whole where one of its columns has no value
    \{ \} \[ \] \\ the signs themselves

A value is missing where it is null, NaN, empty, or only spaces. Where a column outside of brackets is missing, the item
has no text at all. Runs of white space inside a value become one space.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import yaml

from efficientids.errors import UserError

SHIPPED = Path(__file__).with_name("item_templates")
"""Templates that come with the package: NAME.yaml."""

_SEPARATOR = ", "
_TOKEN = re.compile(
    r"\\(?P<escaped>[{}\[\]\\])|\{(?P<field>[^{}\[\]\\]*)\}|(?P<bracket>[\[\]])|(?P<literal>[^{}\[\]\\]+)"
)
_FIELD = re.compile(r"(?P<column>[^\s:](?:[^:]*[^\s:])?)(?::(?P<limit>[1-9][0-9]{0,8}))?")


@dataclasses.dataclass(frozen=True)
class Field:
    """A column's value; `limit`: characters to keep, None for all."""

    column: str
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Literal texts and fields in order; an optional part is dropped where one of its fields is missing."""

    pieces: tuple[str | Field, ...]
    optional: bool


@dataclasses.dataclass(frozen=True)
class Template:
    """A parsed template; `text` is what it was written as."""

    text: str
    parts: tuple[Part, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, each once, in order."""
        return tuple(dict.fromkeys(piece.column for part in self.parts for piece in _fields(part)))

    def check(self, items: pl.DataFrame, source: str) -> None:
        """Refuses columns that `items` does not have, and columns that are no text; `source` names the table.

        Raises:
            UserError: with the columns there are.
        """
        for column in self.columns:
            if column not in items.columns:
                there = ", ".join(items.columns)
                raise UserError(f"template {self.text!r}: {source} has no column {column!r}; it has {there}")
            dtype = items.schema[column]
            inner = dtype.inner if isinstance(dtype, (pl.List, pl.Array)) else dtype
            if inner.is_nested() or inner in (pl.Binary, pl.Object):
                raise UserError(f"template {self.text!r}: column {column!r} of {source} is {dtype}, which is no text")

    def render(self, items: pl.DataFrame) -> pl.Series:
        """One text an item (String, never null; empty where there is none), in the order of the rows."""
        required, texts = [], []
        for part in self.parts:
            missing = [_value(items.schema, field).is_null() for field in _fields(part)]
            text = pl.concat_str(
                [pl.lit(p) if isinstance(p, str) else _value(items.schema, p) for p in part.pieces], ignore_nulls=True
            )
            if part.optional:
                texts.append(pl.when(functools.reduce(operator.or_, missing)).then(pl.lit("")).otherwise(text))
            else:
                texts.append(text)
                required += missing
        whole = pl.concat_str(texts).str.strip_chars()
        if required:
            whole = pl.when(functools.reduce(operator.or_, required)).then(pl.lit("")).otherwise(whole)
        return items.select(whole.alias("text")).to_series()


def parse(text: str, source: str = "template") -> Template:
    """Parses a template; `source` names where it stands.

    Raises:
        UserError: a sign that does not belong where it stands, with its position; no field at all.
    """
    parts: list[Part] = []
    pieces: list[str | Field] = []
    opened: int | None = None
    for match in _tokens(text, source):
        place, bracket = match.start(), match["bracket"]
        if bracket is None:
            field = match["field"]
            pieces.append(match["escaped"] or match["literal"] if field is None else _field(field, place, source))
            continue
        if (bracket == "]") != (opened is not None):
            which = "a part inside a part" if bracket == "[" else "']' without its '['"
            raise UserError(f"{source}: {which} at character {place + 1} of {text!r}; write \\{bracket} for the sign")
        if pieces:
            parts.append(Part(tuple(pieces), optional=bracket == "]"))
        if bracket == "]" and not (pieces and any(_fields(parts[-1]))):
            raise UserError(f"{source}: the part [...] at character {(opened or 0) + 1} of {text!r} has no {{column}}")
        pieces, opened = [], place if bracket == "[" else None
    if opened is not None:
        raise UserError(f"{source}: '[' without its ']' at character {opened + 1} of {text!r}; write \\[ for the sign")
    if pieces:
        parts.append(Part(tuple(pieces), optional=False))
    template = Template(text, tuple(parts))
    if not template.columns:
        raise UserError(f"{source}: {text!r} names no column; write one in braces, as in {{title}}")
    return template


def load(given: str) -> Template:
    """The template of `--item_template`: its text (anything with a brace), a shipped template's name, or a YAML file.

    A file holds `template: TEXT` and, if it likes, `description: TEXT`.

    Raises:
        UserError: no such file, other keys in it, or a template that does not parse.
    """
    if "{" in given:
        return parse(given, "--item_template")
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    path = shipped.get(given, Path(given))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"--item_template {given}: no such file; give one, a template such as '{{title}}', or one of the names "
            f"{', '.join(shipped)}"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--item_template {given} cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("template"), str):
        raise UserError(f"{path}: expected `template: TEXT`, found {values!r}"[:500])
    unknown = [key for key in values if key not in ("template", "description")]
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; known keys: template, description")
    return parse(values["template"], str(path))


def _tokens(text: str, source: str) -> Iterator[re.Match[str]]:
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise UserError(
                f"{source}: {text[place]!r} at character {place + 1} of {text!r} belongs to no {{column}}; "
                f"write \\{text[place]} for the sign itself"
            )
        yield match
        place = match.end()


def _field(inside: str, place: int, source: str) -> Field:
    match = _FIELD.fullmatch(inside)
    if match is None:
        raise UserError(
            f"{source}: {{{inside}}} at character {place + 1}: expected {{column}} or {{column:characters}}"
        )
    return Field(match["column"], None if match["limit"] is None else int(match["limit"]))


def _fields(part: Part) -> list[Field]:
    return [piece for piece in part.pieces if isinstance(piece, Field)]


def _value(schema: pl.Schema, field: Field) -> pl.Expr:
    """The field's text; null where it is missing."""
    column, dtype = pl.col(field.column), schema[field.column]
    if isinstance(dtype, (pl.List, pl.Array)):
        members = column.arr.to_list() if isinstance(dtype, pl.Array) else column
        text = members.list.eval(_tidy(pl.element(), dtype.inner.is_float())).list.drop_nulls().list.join(_SEPARATOR)
        text = pl.when(text != "").then(text)
    else:
        text = _tidy(column, dtype.is_float())
    if field.limit is None:
        return text
    # One character more, so that a word which ends exactly at the limit is kept.
    more = text.str.head(field.limit + 1)
    cut = pl.when(more.str.contains(" ", literal=True)).then(more.str.replace(r" [^ ]*$", ""))
    return pl.when(text.str.len_chars() <= field.limit).then(text).otherwise(cut.otherwise(text.str.head(field.limit)))


def _tidy(value: pl.Expr, is_float: bool) -> pl.Expr:
    """As text, white space in runs of one space; null for NaN and for nothing but spaces."""
    if is_float:
        value = value.fill_nan(None)
    text = value.cast(pl.String).str.replace_all(r"\s+", " ").str.strip_chars()
    return pl.when(text != "").then(text)
