"""An interaction log → the files of a data set, out of core.

    spool     the source's chunks as codes on disk; the item table                        `encode.py`
    order     each user's rows in order, users one after another; immediate repeats go    `ordering.py`
    core      k-core                                                                      `core_filter.py`
    dataset   dense numbers, split, tables, report, manifest

Filters work in this order: rating, missing title, immediate repeats, k-core. A repeat is immediate among the rows that
the filters before left; one that only the k-core brings about stays. The split is cut out of what is left at the end.
A finished stage is taken up by a later run of the same work. Memory holds counts by user and item, their ids and what
is known of items, and a block of rows.

The order is part of the evaluation protocol (half of MovieLens 1M's rows share their timestamp with another row of the
same user), so the tie-break is fixed, kept in the manifest and printed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from efficientids.data import layout
from efficientids.data.layout import Contents
from efficientids.data.manifest import map_array
from efficientids.data.preparation import encode, splits
from efficientids.data.preparation.compact import Left, compact, item_table, user_table
from efficientids.data.preparation.core_filter import k_core
from efficientids.data.preparation.ordering import Ranking, order_rows
from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.report import DataReport
from efficientids.data.preparation.splits import TimeSplit
from efficientids.data.preparation.workplace import Workplace
from efficientids.data.sources.base import BadRows, Source
from efficientids.data.writing import fill
from efficientids.errors import UserError

Order = Literal["time", "file"]
MissingTitle = Literal["keep", "drop", "error"]
Repeats = Literal["keep", "drop_immediate"]
Catalogue = Literal["interactions", "table"]
_SPOOL, _ORDER, _CORE, _DATASET = "spool", "order", "core", "dataset"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to a log. `salt`: of the hashes of user ids; None keeps the ids. `split`: a rule of `layout`.

    `catalogue` None: the whole item table where the source comes filtered (its default core is 0) and no filter is
    asked for; else the items with an interaction.
    """

    core: int = 0
    min_rating: float | None = None
    missing_title: MissingTitle = "keep"
    repeats: Repeats = "keep"
    order: Order = "time"
    catalogue: Catalogue | None = None
    split: str = layout.LEAVE_ONE_OUT
    time_split: TimeSplit = dataclasses.field(default_factory=TimeSplit)
    salt: bytes | None = dataclasses.field(default=None, repr=False)

    def flags(self) -> dict[str, Any]:
        """Everything but the salt, as plain values."""
        values = dataclasses.asdict(dataclasses.replace(self, salt=None))
        del values["salt"]
        return {**values, "hash_users": self.salt is not None}

    def whole_table(self, source: Source) -> bool:
        """Whether the catalogue is the whole item table, should there be one."""
        if self.catalogue is None:
            return source.default_core == 0 and not any(
                value not in (None, "error") for value in self.filters().values()
            )
        return self.catalogue == "table"

    def filters(self) -> dict[str, Any]:
        """For manifest and report; None for what was not asked for."""
        return {
            "min_rating": self.min_rating,
            "missing_title": None if self.missing_title == "keep" else self.missing_title,
            "repeats": None if self.repeats == "keep" else self.repeats,
            "core": self.core if self.core > 1 else None,
        }


def prepare_files(
    source: Source, recipe: Recipe, place: Workplace, request: dict[str, Any], bad: BadRows, progress: Progress
) -> Path:
    """Makes the data set's folder inside `place`, with the report beside; returns it.

    Users are numbered from 0, items from 1, by external id: numerically where all of the log are integers, else by
    their UTF-8 bytes. Raises UserError when no row is left and for what readers, filters and splits refuse.
    """
    facts = place.facts(_SPOOL)
    if facts is None:
        options = encode.SpoolOptions(recipe.min_rating, recipe.salt, recipe.whole_table(source))
        facts = encode.spool(source, options, place.folder(_SPOOL), bad, progress)
        facts = place.finish(_SPOOL, facts)
    spooled = place.path / _SPOOL
    if facts["rows"] == 0:
        raise _nothing_left(source, facts["read"], {"min_rating": facts["min_rating"]})
    has_items = facts["item_table"] is not None
    keep_item = encode.check_titles(spooled, recipe.missing_title, has_items)
    if recipe.catalogue == "table" and not has_items:
        raise UserError("--catalogue table: the source has no item table; give --items, or leave it out")
    user_rank, _ = encode.ranks(pl.read_parquet(spooled / encode.USERS)["id"])
    item_rank, item_order = encode.ranks(pl.read_parquet(spooled / encode.ITEMS)["id"])
    _ordered(place, recipe, source, Ranking(user_rank, item_rank, keep_item), progress)
    left = _core(place, recipe, len(item_rank), progress)
    dropped = _dropped(recipe, facts, left)
    if not left.user_rows.any():
        raise _nothing_left(source, facts["read"], dropped)
    folder = place.folder(_DATASET)
    progress.say("writing the data set")
    whole_table = recipe.whole_table(source) and has_items
    items = item_table(spooled, item_rank, left, keep_item, whole_table)
    compact(left, items["rank"].to_numpy(), folder)
    contents = Contents(
        name=source.name,
        source=source.kind,
        items=items.drop("rank"),
        users=user_table(spooled, user_rank, left),
        item_ids=map_array(folder / layout.ITEM_IDS),
        timestamps=map_array(folder / layout.TIMESTAMPS),
        offsets=map_array(folder / layout.OFFSETS),
        order=_describe_order(recipe, source, item_order),
        filters=recipe.filters(),
        timed=source.timed,
        catalogue="table" if whole_table else "interactions",
        request=request,
    )
    contents = _split(contents, recipe, left)
    report = DataReport.of(contents, dropped, facts["bad_rows"], facts["notes"], facts["item_table"])
    from efficientids.data.preparation import report_page  # it loads a plotting library

    fill(folder, contents, beside=report_page.files(report))
    return folder


def _ordered(place: Workplace, recipe: Recipe, source: Source, ranking: Ranking, progress: Progress) -> None:
    if place.facts(_ORDER) is not None:
        return
    folder = place.folder(_ORDER)
    ordered = order_rows(
        place.path / _SPOOL,
        ranking,
        folder,
        by_time=recipe.order == "time",
        by_split=_by_split(recipe, source),
        drop_repeats=recipe.repeats == "drop_immediate",
        progress=progress,
    )
    np.save(folder / "user_rows.npy", ordered.user_rows)
    place.finish(_ORDER, {"untitled": ordered.untitled, "repeats": ordered.repeats})
    for name in encode.COLUMNS:  # the rows are in order now; ids and tables are still wanted
        (place.path / _SPOOL / name).unlink(missing_ok=True)


def _core(place: Workplace, recipe: Recipe, num_items: int, progress: Progress) -> Left:
    ordered, folder = place.path / _ORDER, place.path / _CORE
    user_rows = np.load(ordered / "user_rows.npy", allow_pickle=False)
    if place.facts(_CORE) is None:
        folder = place.folder(_CORE)
        left = k_core(ordered / encode.ITEM, user_rows, num_items, recipe.core, folder / "keep", progress)
        for name, rows in zip(("user_rows.npy", "item_rows.npy"), left, strict=True):
            np.save(folder / name, rows)
        place.finish(_CORE, {"core": int(user_rows.sum() - left[0].sum())})
    facts = {**(place.facts(_ORDER) or {}), **(place.facts(_CORE) or {})}
    users_left, items_left = (np.load(folder / name, allow_pickle=False) for name in ("user_rows.npy", "item_rows.npy"))
    return Left(ordered, folder / "keep", user_rows, users_left, items_left, facts)


def _dropped(recipe: Recipe, facts: dict[str, Any], left: Left) -> dict[str, int]:
    """Rows taken out by each filter that was asked for."""
    counts = {
        "min_rating": facts["min_rating"],
        "missing_title": left.dropped["untitled"],
        "repeats": left.dropped["repeats"],
        "core": left.dropped["core"],
    }
    return {name: counts[name] for name, value in recipe.filters().items() if value not in (None, "error")}


def _split(contents: Contents, recipe: Recipe, left: Left) -> Contents:
    if recipe.split == layout.LEAVE_ONE_OUT:
        return contents
    if recipe.split == layout.TIME:
        held_out, facts = splits.by_time(contents.timestamps, contents.offsets, recipe.time_split)
    else:
        held_out, facts = splits.as_given(np.fromfile(left.split, np.uint8), contents.offsets)
    return dataclasses.replace(contents, held_out=held_out, split=facts)


def _nothing_left(source: Source, read: int, dropped: dict[str, int]) -> UserError:
    taken = ", ".join(f"{name} {count:,}" for name, count in dropped.items() if count) or "none"
    return UserError(
        f"{source.name}: no interaction is left of {read:,} (dropped: {taken}); lower core or min_rating, or see that "
        "the right files are read"
    )


def _by_split(recipe: Recipe, source: Source) -> bool:
    """Whether training rows come first, whatever their times: for a given split, and where only it tells an order."""
    return source.presplit and (recipe.split == layout.GIVEN or not source.timed)


def _describe_order(recipe: Recipe, source: Source, item_order: str) -> dict[str, str]:
    first = {"first": "train, validation, test"} if _by_split(recipe, source) else {}
    if recipe.order == "file":
        return {**first, "rule": "file", "tie_break": "none: rows as they stood in the file"}
    return {**first, "rule": "time", "tie_break": f"external item id, {item_order}"}
