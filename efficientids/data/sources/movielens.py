"""MovieLens folders in both forms that GroupLens publishes.

    ratings.dat, movies.dat, users.dat (may be absent)     fields parted by "::", no header: ml-1m, ml-10m
    ratings.csv, movies.csv                                comma-separated with a header: ml-latest-small, ml-25m, …

Text of movies.dat and users.dat is UTF-8 where the bytes are valid UTF-8 and Latin-1 otherwise (ml-1m).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from efficientids.data.sources.delimited import DelimitedFile
from efficientids.data.sources.item_table import ItemTable
from efficientids.data.sources.log_source import LogSource, RowsPart, RowsTable
from efficientids.data.sources.reading import decoded, first_line, line_blocks
from efficientids.data.sources.times import Clock
from efficientids.errors import UserError

DEFAULT_CORE = 5

_RATING = ("userId", "movieId", "rating", "timestamp")
_MOVIE = ("movieId", "title", "genres")
_USER = ("userId", "gender", "age", "occupation", "zipCode")
_NO_GENRES = "(no genres listed)"
_FORMS = "a MovieLens folder holds ratings.dat and movies.dat, or ratings.csv and movies.csv"


def open_movielens(folder: Path) -> LogSource:
    """The MovieLens folder `folder`, in whichever form it is.

    Items have `title` and `genres` (list of strings, empty where none is listed); users of a `.dat` folder have
    `gender`, `age` and `occupation` (the README's codes) and `zip_code`. Raises UserError for missing or empty files
    and other columns.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {_FORMS}. Give --input, or --download to fetch one into it")
    suffix = _form(folder)
    ratings = _file(folder / f"ratings{suffix}", _RATING)
    movies = _file(folder / f"movies{suffix}", _MOVIE)
    part = RowsPart(ratings, *_RATING[:2], time="timestamp", rating="rating", clock=Clock("number"), whole_ids=True,
                    needs_rating=True)  # fmt: skip
    items = ItemTable(movies, "movieId", "title", ("genres",), 0, True, parted={"genres": "|"}, nothing=_NO_GENRES)
    users = None
    if suffix == ".dat" and (folder / "users.dat").is_file():
        names = {"userId": "user_id", "gender": "gender", "age": "age", "occupation": "occupation"}
        whole = frozenset(("userId", "age", "occupation"))
        users = RowsTable(_file(folder / "users.dat", _USER), {**names, "zipCode": "zip_code"}, whole)
    files = (ratings.path, movies.path, *([users.rows.path] if users is not None else []))
    return LogSource(folder.resolve().name, "movielens", files, True, False, DEFAULT_CORE, [part], items, users)


def _form(folder: Path) -> str:
    found = [suffix for suffix in (".dat", ".csv") if (folder / f"ratings{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: holds ratings.dat and ratings.csv; keep the one that is meant")
    if not found:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder}: no ratings.dat and no ratings.csv (it holds {held}); {_FORMS}")
    if not (folder / f"movies{found[0]}").is_file():
        raise UserError(f"{folder}: ratings{found[0]} is there, movies{found[0]} is missing; {_FORMS}")
    return found[0]


def _file(path: Path, fields: Sequence[str]) -> DelimitedFile:
    line = decoded(path, first_line(path)) if path.suffix == ".csv" else ""
    if path.suffix == ".csv":
        found = next(csv.reader([line]), [])
        if found != list(fields):
            raise UserError(
                f"{path}: the first line must name the columns {','.join(fields)}; it is {','.join(found)[:200]!r}"
            )
        return DelimitedFile(path, tuple(fields))
    encoding: Literal["utf-8", "latin-1"] = "utf-8" if path.name == "ratings.dat" or _is_unicode(path) else "latin-1"
    return DelimitedFile(path, tuple(fields), "::", False, False, encoding)


def _is_unicode(path: Path) -> bool:
    try:
        for _, block in line_blocks(path):
            block.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
