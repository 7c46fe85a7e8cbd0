"""Opens a table in whichever format it is."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from efficientids.data.sources.columns import known
from efficientids.data.sources.delimited import DelimitedFile, uses_quotes
from efficientids.data.sources.json_lines import JsonLinesFile, ObjectFile, parse_json, parse_literal
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.reading import decoded, first_line
from efficientids.data.sources.rows import ParquetFile, Rows
from efficientids.errors import UserError

TEXT = (".csv", ".tsv", ".txt", ".dat")
JSON = (".json", ".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
FORMATS = (*TEXT, *JSON, *PARQUET)
_SEPARATORS = (",", "\t", ";", "|", "::")
_QUOTED = (",", ";", "|")


def format_of(path: Path) -> str:
    """The file's suffix in small letters, of a packed file that below ".gz"."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def open_table(path: Path, options: SourceOptions) -> Rows:
    """Opens a Parquet file, JSON lines, or else a text table with the separator and header that the options say or
    that the first line shows. Raises UserError for a missing, empty or other file."""
    check_file(path)
    form = format_of(path)
    if form in PARQUET:
        return ParquetFile.open(path)
    if form in JSON:
        return JsonLinesFile.open(path)
    return _open_text(path, options)


def open_item_table(path: Path, options: SourceOptions) -> Rows:
    """As `open_table`; moreover one JSON object {id: {…}}, and Python literals, one a line."""
    check_file(path)
    if format_of(path) not in JSON:
        return open_table(path, SourceOptions(title_column=options.title_column, item_id_column=options.item_id_column))
    first = decoded(path, first_line(path))
    value = parse_json(first)
    if isinstance(value, dict) and not (value and all(isinstance(field, dict) for field in value.values())):
        if known(list(value)):
            return JsonLinesFile.open(path)
    elif isinstance(value, str) and isinstance(parse_literal(first), dict):
        return JsonLinesFile.open(path, literals=True)
    return ObjectFile.open(path)


def check_file(path: Path) -> None:
    """Raises UserError unless `path` is a file."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a file; name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")


def _open_text(path: Path, options: SourceOptions) -> DelimitedFile:
    line = decoded(path, first_line(path))
    separator = {"tab": "\t", "\\t": "\t"}.get(options.separator or "", options.separator) or _separator(path, line)
    quoted = separator in _QUOTED or (separator == "\t" and uses_quotes(path, separator))
    names = next(csv.reader([line], delimiter=separator)) if quoted else line.split(separator)
    names = [name.strip() for name in names]
    header = options.header if options.header is not None else _is_header(names, options)
    if not header:
        return DelimitedFile(path, tuple(str(i + 1) for i in range(len(names))), separator, False, quoted)
    if len(set(names)) < len(names) or "" in names[1:]:
        raise UserError(f"{path}: the header {line[:200]!r} has a name twice or none; mend it, or give --header False")
    return DelimitedFile(path, tuple(names), separator, True, quoted)


def _separator(path: Path, line: str) -> str:
    counts = {separator: line.count(separator) for separator in _SEPARATORS}
    best = max(_SEPARATORS, key=lambda separator: counts[separator])
    if not counts[best]:
        raise UserError(f"{path}: no separator in the first line {line[:100]!r}; name it with --separator")
    return best


def _is_header(names: Sequence[str], options: SourceOptions) -> bool:
    """A header has a usual name, or one that was given; numbers are columns of a file without."""
    given = [value for value in (getattr(options, name) for name in options.given()) if isinstance(value, str)]
    return known(names) or any(name in names for name in given if not name.isdigit())
