"""`python -m efficientids prepare`: a source → a data set folder and a report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from efficientids.data import generated, layout
from efficientids.data.preparation import request
from efficientids.data.preparation.download import download as fetch
from efficientids.data.preparation.prepare import Catalogue, MissingTitle, Order, Recipe, Repeats, prepare_files
from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.report import DataReport
from efficientids.data.preparation.splits import TimeSplit, parse_time
from efficientids.data.preparation.users import salt_from_environment
from efficientids.data.preparation.workplace import check_destination, recover, tidy, workplace
from efficientids.data.sources import SourceOptions, open_source
from efficientids.data.sources.base import MAX_BAD_SHARE, BadRows, Source
from efficientids.errors import UserError
from efficientids.flags import command_line


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Prepares a data set folder from an interaction log and reports what is in it.

    One example a source:

    movielens   --source movielens --input ml-1m --output data/ml-1m (with --download: fetched into --input first)

    amazon      --source amazon --input reviews_Beauty.json.gz --items meta_Beauty.json.gz --output data/beauty

    table       --source table --input log.csv --item_column product --items products.csv --output data/shop

    sequences   --source sequences --input Beauty.txt --items item_titles.tsv --output data/beauty

    recbole     --source recbole --input ml-100k --output data/ml-100k

    pixelrec    --source pixelrec --input Pixel200K.csv --items information.csv --output data/pixel

    generated   --source generated --output data/generated

    Made in a hidden folder beside --output and put there when whole: a run that was killed is taken up by the next one.
    The same input and flags again: nothing is done.
    """

    output: Path
    """The data set folder to make."""
    source: Literal["movielens", "amazon", "table", "sequences", "recbole", "pixelrec", "generated"] = "movielens"
    """What --input holds; "generated" needs no input: an invented catalogue whose best hit rate is known."""
    input: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """The file or folder to read; may be given several times (train, validation and test files, for one)."""
    items: Path | None = None
    """The item table; a usual one beside --input is found by itself."""
    columns: Annotated[SourceOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SourceOptions)
    max_bad_share: float = MAX_BAD_SHARE
    """The share of a file's rows that may be unreadable; they are passed over, counted, and the first ones shown."""
    download: bool = False
    """Fetch a public MovieLens archive into --input first."""
    archive: Literal["ml-1m", "ml-latest-small"] = "ml-1m"
    """Which archive --download fetches."""
    min_rating: float | None = None
    """Keep ratings of at least this."""
    missing_title: MissingTitle | None = None
    """Items without a title: "keep" (the default), "drop" them and their rows, or stop with an "error"."""
    repeats: Repeats | None = None
    """Of an item several times in a row of a user "drop_immediate" leaves one; "keep" (the default) leaves all."""
    core: int | None = None
    """Keep users and items with at least this many interactions, taken until none falls (0 keeps all; the default is 5
    for raw logs, 0 where the data come filtered)."""
    catalogue: Catalogue | None = None
    """Items that can be recommended: those with "interactions", or all of the item "table" (the default where the data
    come filtered and no filter is given)."""
    order: Order | None = None
    """A user's order: "time" (the default; ties by external item id) or "file" (where there are no times)."""
    split: Literal["leave_one_out", "time"] | None = None
    """With "leave_one_out" (the default, unless the data come split) a user's last item tests, the last but one
    validates. With "time" every interaction after a moment is a target."""
    validation_start: str | None = None
    """With --split time: validation from this date (2001-03-31, UTC) or second since 1970 on."""
    test_start: str | None = None
    """With --split time: test from here on."""
    validation_share: float | None = None
    """With --split time, without the two starts: share of interactions that validate (default 0.1)."""
    test_share: float | None = None
    """The same of test (default 0.1)."""
    hash_users: bool = False
    """Replace user ids by keyed hashes; the secret is read from the environment variable EFFICIENTIDS_USER_SALT."""
    seed: int | None = None
    """Seed of --source generated (default 0)."""
    overwrite: bool = False
    """Replace the data set that --output holds."""
    json: bool = False
    """Print the report as JSON, and nothing else."""


def prepare(config: PrepareConfig) -> int:
    """Makes the data set and prints its report; returns the exit code 0. Raises UserError."""
    recover(config.output.resolve())
    check_destination(config.output, overwrite=True)  # before the long work: nobody's files are in the way
    if config.source == "generated":
        report, last = _generated(config)
    else:
        report, last = _from_source(config)
    if config.json:
        print(report.to_json())
        return 0
    print(f"{report.to_text()}\n{last}")
    return 0


def _held_already(config: PrepareConfig, asked: dict[str, Any]) -> tuple[DataReport, str] | None:
    """Report and last line where --output holds what is asked for; its page is made again where it is missing."""
    report = None if config.overwrite else request.prepared_already(config.output, asked)
    if report is None:
        return None
    tidy(config.output)
    done = f"{layout.PAGE} was missing and is made again" if request.page_again(config.output, report) else None
    return report, f"{config.output} holds this already (same input, same flags); {done or 'nothing was done'}"


def _generated(config: PrepareConfig) -> tuple[DataReport, str]:
    _refuse(config, {"output", "source", "seed", "overwrite", "json"})
    seed = config.seed or 0
    asked = request.describe_generated(seed)
    if (held := _held_already(config, asked)) is not None:
        return held
    check_destination(config.output, config.overwrite)
    data = generated.generate(seed)
    data = dataclasses.replace(data, contents=dataclasses.replace(data.contents, request=asked))
    report = DataReport.of(data.contents)
    from efficientids.data.preparation import report_page  # it loads a plotting library

    data.write(config.output, beside=report_page.files(report), overwrite=config.overwrite)
    return report, f"Written to {config.output}"


def _from_source(config: PrepareConfig) -> tuple[DataReport, str]:
    without = {"seed"} if config.source == "movielens" else {"seed", "download", "archive"}
    _refuse(config, {field.name for field in dataclasses.fields(config)} - without)
    if not 0 <= config.max_bad_share <= 1:
        raise UserError(f"--max_bad_share: {config.max_bad_share} is no share; give 0 to 1")
    progress = Progress(quiet=config.json)
    if config.download:
        _download(config)
    source = open_source(config.source, config.input, config.items, config.columns)
    recipe = recipe_of(config, source)
    asked = request.describe(source, config.columns, recipe, config.max_bad_share, progress)
    if (held := _held_already(config, asked)) is not None:
        return held
    check_destination(config.output, config.overwrite)
    bad = BadRows(config.max_bad_share, secret=config.hash_users)
    output = config.output.resolve()
    try:
        with workplace(output, asked["fingerprint"][:16]) as place:
            folder = prepare_files(source, recipe, place, asked, bad, progress)
            report = DataReport.from_json((folder / layout.REPORT).read_text(encoding="utf-8"))
            place.put(folder, output, config.overwrite)
    except OSError as error:
        raise UserError(f"{config.output}: cannot be made ({error}); nothing there was changed") from error
    return report, f"Written to {config.output}"


def _download(config: PrepareConfig) -> None:
    if len(config.input) != 1:
        raise UserError("--download: give one --input, the folder to fetch the archive into")
    if not config.json:
        print(f"Fetching {config.archive} into {config.input[0]}", file=sys.stderr)
    fetch(config.archive, config.input[0])


def recipe_of(config: PrepareConfig, source: Source) -> Recipe:
    """What the flags ask for, and the source's own defaults where they say nothing. Raises UserError."""
    core = source.default_core if config.core is None else config.core
    if core < 0:
        raise UserError(f"--core: {core} is negative; give 0 for no filter, or the least number of rows of each")
    if config.order == "time" and not source.timed:
        raise UserError(f"--order time: {source.name} has no times; leave it out, or name --time_column")
    order: Order = config.order or ("time" if source.timed else "file")
    split = config.split or (layout.GIVEN if source.presplit else layout.LEAVE_ONE_OUT)
    if split == layout.TIME and order != "time":
        raise UserError("--split time needs the order of time: the data must have times, and --order file be left out")
    return Recipe(
        core=core,
        min_rating=config.min_rating,
        missing_title=config.missing_title or "keep",
        repeats=config.repeats or "keep",
        order=order,
        catalogue=config.catalogue,
        split=split,
        time_split=_time_split(config, split),
        salt=salt_from_environment() if config.hash_users else None,
    )


def _time_split(config: PrepareConfig, split: str) -> TimeSplit:
    flags = ("validation_start", "test_start", "validation_share", "test_share")
    given = [flag for flag in flags if getattr(config, flag) is not None]
    if given and split != layout.TIME:
        raise UserError(f"--{given[0]} has no meaning without --split time; leave it out, or give that")
    if config.validation_start is not None or config.test_start is not None:
        if config.validation_start is None or config.test_start is None or len(given) > 2:
            raise UserError("--split time: give --validation_start and --test_start, or the two shares, not a mixture")
        start, test = (parse_time(flag, getattr(config, flag)) for flag in flags[:2])
        return TimeSplit(start, test)
    shares = TimeSplit(
        validation_share=0.1 if config.validation_share is None else config.validation_share,
        test_share=0.1 if config.test_share is None else config.test_share,
    )
    if shares.validation_share <= 0 or shares.test_share <= 0 or shares.validation_share + shares.test_share >= 1:
        raise UserError("--validation_share and --test_share must be above 0 and below 1 together")
    return shares


def _refuse(config: PrepareConfig, meant: set[str]) -> None:
    """Raises UserError for the first flag that was given and is not among those `meant` for the source."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        unset = SourceOptions() if field.name == "columns" else field.default
        if field.name in meant or value == unset:
            continue
        name = config.columns.given()[0] if field.name == "columns" else field.name
        raise UserError(f"--{name} has no meaning with --source {config.source}; leave it out")


def main(arguments: Sequence[str]) -> int:
    """The command `prepare`: parses flags, prepares, returns the exit code."""
    return prepare(command_line(PrepareConfig, arguments, prog="efficientids prepare"))
