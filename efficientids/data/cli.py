"""`python -m efficientids prepare`: a source → a data set folder and a report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from efficientids.data import generated, layout
from efficientids.data.download import download as fetch
from efficientids.data.layout import Contents
from efficientids.data.movielens import read_movielens
from efficientids.data.prepare import Order, prepare_log
from efficientids.data.report import DataReport
from efficientids.data.writing import check_destination, write_dataset
from efficientids.errors import UserError

DEFAULT_CORE = 5


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Prepares a data set folder from an interaction log and reports what is in it."""

    output: Path
    """The data set folder to make."""
    source: Literal["movielens", "generated"] = "movielens"
    """What --input holds; "generated" needs no input: an invented catalogue whose best hit rate is known."""
    input: Path | None = None
    """The folder of the source's files."""
    download: bool = False
    """Fetch the public archive into --input first."""
    archive: Literal["ml-1m", "ml-latest-small"] = "ml-1m"
    """Which archive --download fetches."""
    core: int | None = None
    """Keep users and items with at least this many interactions (default 5; 0 keeps all)."""
    min_rating: float | None = None
    """Keep ratings of at least this."""
    order: Order | None = None
    """A user's order: "time" (the default; ties by external item id) or "file"."""
    seed: int | None = None
    """Seed of --source generated (default 0)."""
    overwrite: bool = False
    """Replace the data set that --output holds."""
    json: bool = False
    """Print the report as JSON."""


def prepare(config: PrepareConfig) -> int:
    """Makes the data set and prints its report; returns the exit code 0. Raises UserError."""
    check_destination(config.output, config.overwrite)  # before the long work
    if config.source == "generated":
        report = _generated(config)
    else:
        contents, report = _movielens(config)
        write_dataset(config.output, contents, overwrite=config.overwrite)
    (config.output / layout.REPORT).write_text(report.to_json() + "\n")
    print(report.to_json() if config.json else f"{report.to_text()}\nWritten to {config.output}")
    return 0


def _generated(config: PrepareConfig) -> DataReport:
    given = [flag for flag in ("input", "core", "min_rating", "order") if getattr(config, flag) is not None]
    if given or config.download:
        flag = given[0] if given else "download"
        raise UserError(f"--{flag} has no meaning with --source generated; leave it out")
    data = generated.generate(config.seed or 0)
    data.write(config.output, overwrite=config.overwrite)
    return DataReport.of(data.contents)


def _movielens(config: PrepareConfig) -> tuple[Contents, DataReport]:
    if config.seed is not None:
        raise UserError("--seed has no meaning with --source movielens; leave it out")
    if config.input is None:
        raise UserError("--input is missing: give the MovieLens folder (with --download: the folder to fetch it into)")
    if config.download:
        print(f"Fetching {config.archive} into {config.input}", file=sys.stderr)
        fetch(config.archive, config.input)
    log = read_movielens(config.input)
    core = DEFAULT_CORE if config.core is None else config.core
    return prepare_log(log, core=core, min_rating=config.min_rating, order=config.order or "time")


def main(arguments: Sequence[str]) -> int:
    """The command `prepare`: parses flags, prepares, returns the exit code."""
    return prepare(tyro.cli(PrepareConfig, args=arguments, prog="efficientids prepare", use_underscores=True))
