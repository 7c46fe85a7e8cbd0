"""Reads MovieLens folders in both forms that GroupLens publishes.

    ratings.dat, movies.dat, users.dat (may be absent)     fields parted by "::", no header: ml-1m, ml-10m
    ratings.csv, movies.csv                                comma-separated with a header: ml-latest-small, ml-25m, …

Text is UTF-8 where the bytes are valid UTF-8 and Latin-1 otherwise (ml-1m).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from efficientids.data.log import BadRow, InteractionLog, check_bad_rows
from efficientids.errors import UserError

_RATING = ("userId", "movieId", "rating", "timestamp")
_MOVIE = ("movieId", "title", "genres")
_USER = ("userId", "gender", "age", "occupation", "zipCode")
_NO_GENRES = "(no genres listed)"
_WHOLE = (pl.Int64, "a whole number")
_FORMS = "a MovieLens folder holds ratings.dat and movies.dat, or ratings.csv and movies.csv"


def read_movielens(folder: str | Path) -> InteractionLog:
    """Reads the MovieLens folder `folder`, in whichever form it is.

    Items have `title` and `genres` (list of strings, empty where none is listed); users of a `.dat` folder have
    `gender`, `age` and `occupation` (the README's codes) and `zip_code`. Up to 1% of a file's rows may be unreadable:
    they are passed over and listed in `bad_rows`. Raises UserError for missing or empty files, other columns, and more
    unreadable rows than that.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {_FORMS}. Give --input, or --download to fetch one into it")
    suffix = _form(folder)
    ratings, bad_ratings = _ratings(folder / f"ratings{suffix}")
    movies, bad_movies = _movies(folder / f"movies{suffix}")
    users: pl.DataFrame | None = None
    bad_users: list[BadRow] = []
    if suffix == ".dat" and (folder / "users.dat").is_file():
        users, bad_users = _users(folder / "users.dat")
    bad_rows = [*bad_ratings, *bad_movies, *bad_users]
    return InteractionLog(folder.resolve().name, "movielens", ratings, movies, users, bad_rows)


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


def _ratings(path: Path) -> tuple[pl.DataFrame, list[BadRow]]:
    # No field of ratings.csv can hold a comma, so lines are split at commas there as well; quotes are taken off.
    table = _split(path, _RATING, "," if path.suffix == ".csv" else "::", header=path.suffix == ".csv")
    numbers = {"userId": _WHOLE, "movieId": _WHOLE, "rating": (pl.Float64, "a number"), "timestamp": _WHOLE}
    good, bad = _typed(path, table, numbers)
    columns = (
        pl.col("userId").cast(pl.String).alias("user_id"),
        pl.col("movieId").cast(pl.String).alias("item_id"),
        "rating",
        "timestamp",
    )
    return good.select(columns), bad


def _movies(path: Path) -> tuple[pl.DataFrame, list[BadRow]]:
    table = _quoted_csv(path, _MOVIE) if path.suffix == ".csv" else _split(path, _MOVIE, "::", header=False)
    good, bad = _typed(path, table, {"movieId": _WHOLE}, unique="movieId")
    genres = pl.col("genres").str.split("|").list.eval(pl.element().filter(~pl.element().is_in(["", _NO_GENRES])))
    title = pl.col("title").str.strip_chars().replace("", None)
    return good.select(pl.col("movieId").cast(pl.String).alias("item_id"), title, genres), bad


def _users(path: Path) -> tuple[pl.DataFrame, list[BadRow]]:
    table = _split(path, _USER, "::", header=False)
    good, bad = _typed(path, table, {"userId": _WHOLE, "age": _WHOLE, "occupation": _WHOLE}, unique="userId")
    user_id = pl.col("userId").cast(pl.String).alias("user_id")
    return good.select(user_id, "gender", "age", "occupation", pl.col("zipCode").alias("zip_code")), bad


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if not text.strip():
        raise UserError(f"{path}: the file is empty; fetch or copy it again")
    return text


def _split(path: Path, fields: Sequence[str], separator: str, *, header: bool) -> pl.DataFrame:
    """The file's rows as columns `line` (from 1), `count` (of fields) and one of text a field."""
    # Split inside polars: 25 million Python strings would need gigabytes.
    lines = pl.DataFrame({"text": [_text(path)]}).select(pl.col("text").str.split("\n").explode())
    if lines["text"][-1] == "":
        lines = lines.head(-1)
    lines = lines.select(pl.col("text").str.strip_suffix("\r")).with_row_index("line", offset=1)
    if header:
        _check_header(path, [name.strip('"') for name in lines["text"][0].split(separator)], fields)
        lines = lines.slice(1)
    parts = pl.col("text").str.split(separator)
    columns = [parts.list.get(i, null_on_oob=True).alias(name) for i, name in enumerate(fields)]
    if separator == ",":
        columns = [column.str.strip_chars('"') for column in columns]
    return lines.select("line", parts.list.len().cast(pl.Int64).alias("count"), *columns)


def _quoted_csv(path: Path, fields: Sequence[str]) -> pl.DataFrame:
    """As `_split`, for fields that may be quoted and hold commas."""
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        _check_header(path, next(reader), fields)
        rows = [(reader.line_num, len(row), *(row + [""] * len(fields))[: len(fields)]) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}); look for a quote that is not closed") from error
    numbers = {"line": pl.Int64, "count": pl.Int64}
    return pl.DataFrame(rows, schema={**numbers, **dict.fromkeys(fields, pl.String)}, orient="row")


def _check_header(path: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    if list(found) != list(expected):
        raise UserError(
            f"{path}: the first line must name the columns {','.join(expected)}; it is {','.join(found)[:200]!r}"
        )


def _typed(
    path: Path, table: pl.DataFrame, numbers: Mapping[str, tuple[type[pl.DataType], str]], unique: str | None = None
) -> tuple[pl.DataFrame, list[BadRow]]:
    """The rows with all fields, numbers where `numbers` wants them and no id of `unique` twice; and the other rows."""
    if table.is_empty():
        raise UserError(f"{path}: no rows; fetch or copy the file again")
    fields = table.columns[2:]
    typed = table.with_columns(
        pl.col(name).cast(dtype, strict=False).alias(f"{name} typed") for name, (dtype, _) in numbers.items()
    )
    # The first reason that holds is given; `coalesce` passes over those that do not.
    wrong = [
        pl.when(pl.col("count") != len(fields)).then(
            pl.format("{} fields, expected {} ({})", "count", pl.lit(len(fields)), pl.lit(", ".join(fields)))
        )
    ]
    for name, (dtype, meaning) in numbers.items():
        value = pl.col(f"{name} typed")
        usable = value.is_not_null() & (value.is_finite() if dtype == pl.Float64 else pl.lit(True))
        wrong.append(pl.when(~usable).then(pl.format("{} is '{}', expected {}", pl.lit(name), name, pl.lit(meaning))))
    if unique is not None:
        again = ~pl.col(f"{unique} typed").is_first_distinct()
        wrong.append(pl.when(again).then(pl.format("{} {} occurs twice", pl.lit(unique), unique)))
    typed = typed.with_columns(pl.coalesce(wrong).alias("wrong"))
    unusable = typed.filter(pl.col("wrong").is_not_null())
    bad = [BadRow(path.name, line, reason) for line, reason in unusable.select("line", "wrong").iter_rows()]
    check_bad_rows(path, bad, len(table))
    good = typed.filter(pl.col("wrong").is_null())
    return good.select(pl.col(f"{name} typed").alias(name) if name in numbers else name for name in fields), bad
