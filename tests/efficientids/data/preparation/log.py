"""An interaction log written by hand, as a `Source`, and what `prepare` makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from efficientids.data.dataset import Dataset
from efficientids.data.preparation.prepare import Recipe, prepare_files
from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.workplace import workplace
from efficientids.data.sources.base import CHUNK_SCHEMA, BadRows

Row = tuple[str, str, float | None, int | None]  # user, item, rating, timestamp


@dataclasses.dataclass
class Log:
    """A `Source` of `rows`, `chunk` at a time; `split` gives the split of each row, `titles` the item table."""

    rows: Sequence[Row]
    titles: Mapping[str, str | None] | None = None
    split: Sequence[int] | None = None
    timed: bool = True
    default_core: int = 5
    chunk: int = 3
    user_table: pl.DataFrame | None = None
    bad: Sequence[tuple[int, str]] = ()
    name: str = "tiny"
    kind: str = "test"
    files: tuple[Path, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def presplit(self) -> bool:
        return self.split is not None

    def interactions(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        columns = ("user_id", "item_id", "rating", "timestamp")
        table = pl.DataFrame(self.rows, schema={name: CHUNK_SCHEMA[name] for name in columns}, orient="row")
        table = table.with_columns(pl.col("timestamp") * 1000)
        if self.split is not None:
            table = table.with_columns(pl.Series("split", self.split, dtype=pl.UInt8))
        for line, reason in self.bad:
            bad.add(Path("log.csv"), line, reason)
        for start in range(0, len(table), self.chunk):
            yield table[start : start + self.chunk]

    def items(self, bad: BadRows) -> Iterator[pl.DataFrame]:
        titles = list((self.titles or {}).items())
        for start in range(0, len(titles), self.chunk):
            part = titles[start : start + self.chunk]
            yield pl.DataFrame(part, schema={"item_id": pl.String, "title": pl.String}, orient="row")

    def users(self, bad: BadRows) -> pl.DataFrame | None:
        return self.user_table


def prepared(folder: Path, log: Log, recipe: Recipe, name: str = "data") -> Dataset:
    """The data set that `recipe` makes of `log`, in `folder`/`name`."""
    output = folder / name
    with workplace(output, "test") as place:
        place.put(prepare_files(log, recipe, place, {}, BadRows(), Progress(quiet=True)), output)
    return Dataset.open(output)


def external(dataset: Dataset) -> dict[str, list[str]]:
    """External ids of every user's history."""
    names = ["", *dataset.items["item_id"]]
    return {
        user_id: [names[item] for item in dataset.history(user, "all")]
        for user, user_id in enumerate(dataset.users["user_id"])
    }
