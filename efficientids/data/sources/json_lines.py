"""One object a line: JSON, or the Python literals of Amazon's metadata of 2014 (`ast.literal_eval`, never `eval`)."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from efficientids.data.sources.base import BadRows
from efficientids.data.sources.reading import decoded, first_line, json_object, line_blocks
from efficientids.errors import UserError

MAX_LITERAL = 1 << 20
"""Characters of a Python literal: deeper or longer ones can take the interpreter's memory or stack."""
_SAMPLE = 1000


@dataclasses.dataclass(frozen=True)
class JsonLinesFile:
    """A file of objects, one a line. `columns`, `list_columns`: the fields of the first lines."""

    path: Path
    columns: tuple[str, ...]
    list_columns: frozenset[str]
    literals: bool = False

    @staticmethod
    def open(path: Path, *, literals: bool = False) -> JsonLinesFile:
        """Raises UserError when the first line holds no object."""
        parse = parse_literal if literals else parse_json
        line = decoded(path, first_line(path))
        if line.lstrip().startswith("["):
            raise UserError(f"{path}: a JSON array; write one object a line (with jq: `jq -c '.[]' {path.name}`)")
        first = parse(line)
        if isinstance(first, str):
            raise UserError(f"{path}:1: {first}; expected one object a line")
        # Later lines may have fields that the first one lacks.
        lines = (row for _, block in line_blocks(path) for row in block.split(b"\n"))
        sample = [parse(row.decode("utf-8", "replace")) for row in itertools.islice(lines, _SAMPLE)]
        names, lists = _fields([value for value in sample if isinstance(value, dict)])
        return JsonLinesFile(path, names, lists, literals)

    def frames(self, columns: Sequence[str], bad: BadRows, lists: Collection[str] = ()) -> Iterator[pl.DataFrame]:
        """See `Rows`. Numbers are as written, whole ones without a point; where a list is asked, text is a list of one
        and a list of lists is one list; where text is asked, a list is joined by spaces."""
        kinds: dict[str, Any] = {name: pl.List(pl.String) if name in lists else pl.String for name in columns}
        for line, block in line_blocks(self.path):
            frame = None if self.literals else _fast(line, block, kinds)
            if frame is None:
                frame = self._slow(line, block, kinds, bad)
            if not frame.is_empty():
                text = [pl.col(name).fill_null("") for name in kinds if name not in lists]
                yield frame.with_columns(text).select("line", *kinds)

    def _slow(self, line: int, block: bytes, kinds: Mapping[str, Any], bad: BadRows) -> pl.DataFrame:
        parse = parse_literal if self.literals else parse_json
        rows: list[tuple[Any, ...]] = []
        for number, raw in enumerate(block.removesuffix(b"\n").split(b"\n"), line):
            try:
                value = parse(raw.decode("utf-8"))
            except UnicodeDecodeError:
                value = "not UTF-8; convert the file to UTF-8"
            if isinstance(value, str):
                bad.add(self.path, number, value)
            else:
                rows.append((number, *(_cell(value.get(name), kind) for name, kind in kinds.items())))
        return pl.DataFrame(rows, schema={"line": pl.Int64, **kinds}, orient="row")


@dataclasses.dataclass(frozen=True)
class ObjectFile:
    """One JSON object {id: {field: …}}; `KEY` is the column of the ids. `line` is the entry's number."""

    path: Path
    columns: tuple[str, ...]
    list_columns: frozenset[str]

    KEY: ClassVar[str] = "key"

    @staticmethod
    def open(path: Path) -> ObjectFile:
        """Raises UserError when the file is another kind of JSON; a map from ids to ids or codes is named as such."""
        entries = json_object(path)
        kinds = {type(value).__name__ for value in entries.values()}
        if kinds != {"dict"}:
            first = next((key, value) for key, value in entries.items() if not isinstance(value, dict))
            found = json.dumps(dict([first]))[:80]
            raise UserError(
                f"{path}: expected {{id: {{title: …}}}}, found {found}; a map of ids to ids, titles or codes is not an "
                "item table. Give a table with a column of ids and a column of titles"
            )
        names, lists = _fields(list(entries.values()))
        return ObjectFile(path, (ObjectFile.KEY, *names), lists)

    def frames(self, columns: Sequence[str], bad: BadRows, lists: Collection[str] = ()) -> Iterator[pl.DataFrame]:
        """See `Rows` and `JsonLinesFile.frames`."""
        kinds: dict[str, Any] = {name: pl.List(pl.String) if name in lists else pl.String for name in columns}
        rows = [
            (number, *(_cell({**value, self.KEY: key}.get(name), kind) for name, kind in kinds.items()))
            for number, (key, value) in enumerate(json_object(self.path).items(), 1)
        ]
        frame = pl.DataFrame(rows, schema={"line": pl.Int64, **kinds}, orient="row")
        yield frame.with_columns(pl.col(name).fill_null("") for name in kinds if name not in lists)


def parse_json(text: str) -> dict[str, Any] | str:
    """The object of a line of JSON, or what is wrong with it."""
    if not text.strip():
        return "a blank line"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return value if isinstance(value, dict) else f"expected an object, found {text[:40]!r}"


def parse_literal(text: str) -> dict[str, Any] | str:
    """The dict of a line that holds a Python literal, or what is wrong with it."""
    if len(text) > MAX_LITERAL:
        return f"a Python literal of {len(text):,} characters, at most {MAX_LITERAL:,} are read"
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        return f"not a Python literal ({type(error).__name__})"
    return value if isinstance(value, dict) else f"expected a dict, found {text[:40]!r}"


def _fields(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of all fields in the order of their appearance, and those that hold a list in some row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(names), frozenset(name for row in rows for name, value in row.items() if isinstance(value, list))


def _fast(line: int, block: bytes, kinds: Mapping[str, Any]) -> pl.DataFrame | None:
    """The block's rows, or None where some may be malformed or polars would write a value differently."""
    try:
        frame = pl.read_ndjson(block, schema=dict(kinds))
    except pl.exceptions.PolarsError:
        return None
    if frame.height != block.count(b"\n"):
        return None
    texts = [pl.col(name).explode() if kind != pl.String else pl.col(name) for name, kind in kinds.items()]
    for text in texts:
        odd = text.str.contains(r"^[\[{]").any()  # lists and objects come as JSON text
        if b"\\ud" in block:
            odd |= text.str.contains("\x00", literal=True).any()  # half a surrogate pair
        if frame.select(odd).item():
            return None
    return frame.select(pl.int_range(line, line + pl.len(), dtype=pl.Int64).alias("line"), pl.all())


def _cell(value: Any, kind: Any) -> str | list[str | None] | None:
    if kind == pl.String:
        return " ".join(text for text in _flat(value) if text) if isinstance(value, list | tuple) else as_text(value)
    if value is None or value == "":
        return None
    return _flat(value)


def _flat(value: Any) -> list[str | None]:
    """All texts of a list of lists, in order; a text alone is a list of one."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _flat(part)]
    return [as_text(value)]


def as_text(value: Any) -> str | None:
    """A JSON value as polars writes it in a column of text; half a surrogate pair becomes a replacement sign."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)
