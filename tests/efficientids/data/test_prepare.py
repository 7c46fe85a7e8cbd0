"""Filters, order, id maps and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence

import polars as pl
import pytest

from efficientids.data.log import BadRow, InteractionLog
from efficientids.data.prepare import k_core, ordered_ids, prepare_log
from efficientids.errors import UserError

Row = tuple[str, str, float, int]  # user, item, rating, timestamp


def _log(rows: Sequence[Row], titles: dict[str, str | None] | None = None) -> InteractionLog:
    schema = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}
    titles = titles or {}
    items = pl.DataFrame(
        {"item_id": list(titles), "title": list(titles.values())}, schema_overrides={"title": pl.String}
    )
    if not titles:
        items = pl.DataFrame(schema={"item_id": pl.String, "title": pl.String})
    bad = [BadRow("ratings.dat", 7, "3 fields, expected 4")]
    return InteractionLog("tiny", "test", pl.DataFrame(rows, schema=schema, orient="row"), items, None, bad)


def _histories(log: InteractionLog, **options: object) -> dict[str, list[str]]:
    """External ids of every user's history."""
    contents, _ = prepare_log(log, **{"core": 0, "min_rating": None, "order": "time", **options})  # type: ignore[arg-type]
    names = [None, *contents.items["item_id"]]
    bounds = contents.offsets.tolist()
    return {
        user: [names[item] for item in contents.item_ids[start:end]]
        for user, start, end in zip(contents.users["user_id"], bounds[:-1], bounds[1:], strict=True)
    }


def test_ties_break_by_number_where_all_ids_are_integers() -> None:
    rows = [("2", "100", 5, 50), ("2", "20", 5, 50), ("10", "3", 5, 9), ("2", "3", 5, 50), ("2", "7", 5, 40)]
    assert _histories(_log(rows)) == {"2": ["7", "3", "20", "100"], "10": ["3"]}


def test_ties_break_by_text_where_one_id_is_none() -> None:
    rows = [("u2", "100", 5, 50), ("u2", "20", 5, 50), ("u10", "b3", 5, 9), ("u2", "3", 5, 50)]
    assert _histories(_log(rows)) == {"u10": ["b3"], "u2": ["100", "20", "3"]}


def test_file_order_keeps_the_rows_as_they_stood() -> None:
    rows = [("2", "100", 5, 50), ("1", "3", 5, 60), ("2", "20", 5, 10), ("1", "3", 5, 50)]
    log = _log(rows)
    assert _histories(log, order="file") == {"1": ["3", "3"], "2": ["100", "20"]}
    contents, _ = prepare_log(log, core=0, min_rating=None, order="file")
    assert contents.timestamps.tolist() == [60, 50, 50, 10]
    assert contents.order["rule"] == "file"


@pytest.mark.parametrize(
    ("ids", "expected", "kind"),
    [
        (["10", "9", "9", "-1"], ["-1", "9", "10"], "numeric"),
        (["7", "07", "8"], ["07", "7", "8"], "numeric"),
        (["10", "9", "9x"], ["10", "9", "9x"], "lexicographic"),
        (["1" * 19, "9"], ["1" * 19, "9"], "lexicographic"),  # too large for int64 to be sure of
        (["b", "B", "é"], ["B", "b", "é"], "lexicographic"),
    ],
)
def test_ordered_ids(ids: list[str], expected: list[str], kind: str) -> None:
    distinct, found = ordered_ids(pl.Series(ids))
    assert (distinct.to_list(), found) == (expected, kind)


def test_k_core_is_taken_until_nothing_more_falls() -> None:
    # Item x has one row, so it falls; then user c is left with one row, and falls; then item z.
    rows = [("a", "p", 1, 1), ("a", "q", 1, 2), ("b", "p", 1, 3), ("b", "q", 1, 4), ("b", "z", 1, 5), ("c", "z", 1, 6)]
    kept = k_core(_log([*rows, ("c", "x", 1, 7)]).interactions, 2)
    assert kept["timestamp"].to_list() == [1, 2, 3, 4]
    assert kept.select(pl.len().over("item_id").min(), pl.len().over("user_id").min().alias("u")).row(0) == (2, 2)


def test_filters_are_counted_and_named() -> None:
    rows = [(u, i, 4.0, 1) for u in ("1", "2") for i in ("1", "2")] + [("1", "3", 3.5, 2), ("3", "1", 4.0, 3)]
    contents, report = prepare_log(_log(rows), core=2, min_rating=4.0, order="time")
    assert report.dropped == {"min_rating": 1, "core": 1}
    assert (report.users, report.items, report.interactions) == (2, 2, 4)
    assert contents.filters == {"min_rating": 4.0, "core": 2}
    assert "1 rows by min_rating" in report.to_text() and "min-rating 4.0, core 2" in report.to_text()


def test_report_counts_ties_repeats_titles_and_bad_rows() -> None:
    rows = [
        ("1", "1", 5, 10),
        ("1", "2", 5, 10),
        ("1", "1", 5, 30),
        ("1", "3", 5, 40),
        ("2", "2", 5, 10),
        ("2", "3", 5, 99),
    ]
    contents, report = prepare_log(_log(rows, {"1": "One", "2": None}), core=0, min_rating=None, order="time")
    assert contents.items["title"].to_list() == ["One", None, None]
    values = json.loads(report.to_json())
    assert (
        values
        | {
            "users": 2,
            "items": 3,
            "catalogue": 3,
            "interactions": 6,
            "length_min": 2,
            "length_median": 3.0,
            "length_mean": 3.0,
            "length_max": 4,
            "density": 1.0,
            "repeats": 1,
            "untitled_items": 2,
            "train_only_users": 1,
            "bad_rows": {"count": 1, "first": ["ratings.dat:7: 3 fields, expected 4"]},
        }
        == values
    )
    assert values["tied_share"] == pytest.approx(2 / 6)
    text = report.to_text()
    assert "ratings.dat:7: 3 fields, expected 4" in text and "2 items have no title" in text
    assert "tie-break external item id, numeric" in text and "33.3% of rows share" in text


def test_nothing_left_and_negative_core_are_refused() -> None:
    log = _log([("1", "1", 3.0, 1), ("1", "2", 3.0, 2)])
    with pytest.raises(UserError, match=r"no interaction is left of 2 \(dropped: core 2\); lower core"):
        prepare_log(log, core=5, min_rating=None, order="time")
    with pytest.raises(UserError, match="dropped: min_rating 2"):
        prepare_log(log, core=0, min_rating=4.0, order="time")
    with pytest.raises(UserError, match="core: -1 is negative"):
        prepare_log(log, core=-1, min_rating=None, order="time")
