"""Amazon reviews of 2014, 2018 and 2023, as published by McAuley's group, and their metadata.

2014   reviews_X.json[.gz] (JSON lines), ratings_X.csv (no header: user, item, rating, time);
       meta_X.json[.gz]: a Python literal a line
2018   X.json[.gz], X_5.json[.gz] (JSON lines), X.csv (no header: item, user, rating, time);
       meta_X.json[.gz]: JSON lines
2023   X.jsonl[.gz] (JSON lines, times in ms), X.csv and X.{train,valid,test}.csv (header user_id,parent_asin,…);
       meta_X.jsonl[.gz]: JSON lines
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from efficientids.data.sources.base import BadRows
from efficientids.data.sources.columns import listed
from efficientids.data.sources.delimited import DelimitedFile
from efficientids.data.sources.files import log_files
from efficientids.data.sources.json_lines import JsonLinesFile
from efficientids.data.sources.log_source import LogSource
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.reading import decoded, first_line
from efficientids.data.sources.rows import Rows
from efficientids.data.sources.table import rows_source, with_items
from efficientids.data.sources.tables import JSON, check_file, format_of
from efficientids.errors import UserError

_COLUMNS_2023 = ("user_id", "parent_asin", "timestamp", "rating")
_COLUMNS_OLD = ("reviewerID", "asin", "unixReviewTime", "overall")
_COLUMNS_RATINGS = ("user", "item", "timestamp", "rating")
_ASIN = r"^[0-9A-Z]{10}$"
_CLEAR_SHARE = 0.99


def open_amazon(inputs: Sequence[Path], items: Path | None, options: SourceOptions) -> LogSource:
    """Reviews or ratings of one category; the year is told by their fields. Metadata beside them are found by name.

    HTML entities of the metadata's texts are replaced; of rows that repeat an item the first counts. Raises UserError
    for other fields.
    """
    files = log_files(inputs, (*JSON, ".csv"))
    opened = [_open(file.path) for file in files]
    year, (user, item, time, rating) = opened[0][1:]
    columns = dataclasses.replace(options, user_column=user, item_column=item, time_column=time, rating_column=rating)
    source = rows_source(files, [table for table, *_ in opened], columns, f"amazon-{year}")
    source.name = re.sub(r"^(reviews|ratings)_", "", source.name)
    found = items if items is not None else _metadata(files[0].path)
    source = with_items(source, files, found, options, unescape=True, repeats=True)
    source.notes.append(f"read as Amazon reviews of {year}, by their fields")
    return source


def _open(path: Path) -> tuple[Rows, int, tuple[str, ...]]:
    """The file, its year, and its columns of users, items, times and ratings."""
    check_file(path)
    if format_of(path) in JSON:
        lines = JsonLinesFile.open(path)
        if set(_COLUMNS_2023) <= set(lines.columns):
            return lines, 2023, _COLUMNS_2023
        if set(_COLUMNS_OLD) <= set(lines.columns):
            return lines, 2014 if "helpful" in lines.columns else 2018, _COLUMNS_OLD
        raise UserError(
            f"{path}: reviews have {', '.join(_COLUMNS_2023)} (2023) or {', '.join(_COLUMNS_OLD)} (2014, 2018); found "
            f"{listed(lines.columns)}. For other tables use --source table"
        )
    names = decoded(path, first_line(path)).split(",")
    if set(_COLUMNS_2023) <= set(names):
        return DelimitedFile(path, tuple(names)), 2023, _COLUMNS_2023
    if len(names) != len(_COLUMNS_RATINGS) or not names[2].replace(".", "").isdigit():
        raise UserError(
            f"{path}: ratings are user,item,rating,time (2014) or item,user,rating,time (2018) without a header, or "
            f"have one with {', '.join(_COLUMNS_2023)} (2023); the first line is {','.join(names)[:200]!r}. For other "
            "tables use --source table"
        )
    if _items_first(path):
        return DelimitedFile(path, ("item", "user", "rating", "timestamp"), header=False), 2018, _COLUMNS_RATINGS
    return DelimitedFile(path, ("user", "item", "rating", "timestamp"), header=False), 2014, _COLUMNS_RATINGS


def _items_first(path: Path) -> bool:
    """Whether the first column has the items: ids of items have 10 characters, those of users nearly always more."""
    rows = DelimitedFile(path, ("1", "2", "3", "4"), header=False)
    frame = next(rows.frames(["1", "2"], BadRows(max_share=1)), None)
    if frame is None:
        raise UserError(f"{path}: no rows that can be read; check that it is the right file")
    shares = [float(frame.select(pl.col(name).str.contains(_ASIN).mean()).item()) for name in ("1", "2")]
    if (shares[0] >= _CLEAR_SHARE) == (shares[1] >= _CLEAR_SHARE):
        raise UserError(
            f"{path}: {shares[0]:.0%} of the first column and {shares[1]:.0%} of the second look like ids of items (10 "
            "characters), so it is not clear which holds the items. Say it: --source table --header False "
            "--user_column 1 --item_column 2 --rating_column 3 --time_column 4"
        )
    return shares[0] >= _CLEAR_SHARE


def _metadata(path: Path) -> Path | None:
    category = re.sub(r"^(reviews|ratings)_", "", path.name.split(".")[0])
    names = dict.fromkeys((category, re.sub(r"_(5|10)$", "", category)))
    endings = [ending + packed for ending in (".json", ".jsonl") for packed in ("", ".gz")]
    places = [path.with_name(f"meta_{name}{ending}") for name in names for ending in endings]
    return next((place for place in places if place.is_file()), None)
