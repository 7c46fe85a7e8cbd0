"""The data report: what it counts, and its three forms."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from efficientids.data.preparation.cli import main
from efficientids.data.preparation.measure import length_histogram, popularity_curve
from efficientids.data.preparation.prepare import Recipe
from efficientids.data.preparation.report import DataReport
from tests.efficientids.data.preparation.log import Log, Row, prepared

ROWS: list[Row] = [
    ("1", "1", 5, 10),
    ("1", "2", 5, 10),
    ("1", "1", 5, 30),
    ("1", "3", 5, 40),
    ("2", "2", 5, 3_000_000),
    ("2", "3", 5, 3_000_099),
]


@pytest.fixture
def report(tmp_path: Path) -> DataReport:
    """Of six rows with a tie, a repeat and an unreadable row."""
    log = Log(ROWS, titles={"1": "One", "2": None}, bad=[(7, "3 fields, expected 4")], notes=["read by hand"])
    return DataReport.from_json((prepared(tmp_path, log, Recipe()).path / "report.json").read_text())


def test_report_counts_ties_repeats_titles_and_bad_rows(report: DataReport) -> None:
    values = json.loads(report.to_json())
    expected = {
        "users": 2,
        "items": 3,
        "catalogue": 3,
        "interactions": 6,
        "length_min": 2,
        "length_median": 3.0,
        "length_mean": 3.0,
        "length_max": 4,
        "density": 5 / 6,
        "repeats": 1,
        "untitled_items": 2,
        "train_only_users": 1,
        "bad_rows": {"count": 1, "first": ["log.csv:7: 3 fields, expected 4"]},
        "by_month": [["1970-01", 4], ["1970-02", 2]],
        "length_histogram": [[2, 2, 1], [3, 4, 1]],
        "notes": ["read by hand"],
    }
    assert {name: values[name] for name in expected} == expected
    assert values["tied_share"] == pytest.approx(2 / 6)
    assert values["split"] == {
        "rule": "leave_one_out",
        "train": 4,
        "validation": 1,
        "test": 1,
        "validation_users": 1,
        "test_users": 1,
    }


def test_report_in_words(report: DataReport) -> None:
    text = report.to_text()
    assert "log.csv:7: 3 fields, expected 4" in text and "2 items have no title" in text
    assert "tie-break external item id, numeric" in text and "33.3% of rows share" in text
    assert "leave-one-out: 4 rows train, 1 targets of 1 users validate" in text and "read by hand" in text
    assert "1 have fewer than 3 interactions" in text


def test_report_comes_back_from_json(report: DataReport) -> None:
    assert json.loads(DataReport.from_json(report.to_json()).to_json()) == json.loads(report.to_json())


def test_ties_are_counted_whatever_the_order(tmp_path: Path) -> None:
    rows: list[Row] = [("u", "a", 1, 5), ("u", "b", 1, 3), ("u", "c", 1, 5), ("v", "a", 1, 5)]
    found = prepared(tmp_path, Log(rows), Recipe(order="file")).path / "report.json"
    assert json.loads(found.read_text())["tied_share"] == 0.5


def test_without_times_there_are_no_ties_and_no_months(tmp_path: Path) -> None:
    rows: list[Row] = [("u", "a", 1, None), ("u", "b", 1, None)]
    path = prepared(tmp_path, Log(rows, timed=False), Recipe(order="file")).path / "report.json"
    report = DataReport.from_json(path.read_text())
    assert (report.timed, report.tied_share, report.by_month) == (False, 0.0, [])
    assert "same time" not in report.to_text()


def test_histogram_bins_double() -> None:
    lengths = np.array([1, 1, 2, 3, 4, 5, 8, 9, 40])
    expected = [(1, 1, 2), (2, 2, 1), (3, 4, 2), (5, 8, 2), (9, 16, 1), (17, 32, 0), (33, 64, 1)]
    assert length_histogram(lengths) == expected
    assert length_histogram(np.array([5, 6])) == [(5, 8, 2)]


def test_popularity_curve_counts_the_most_popular_first() -> None:
    assert popularity_curve(np.array([0, 2, 5, 0, 3])) == [(0.0, 0.0), (1 / 3, 0.5), (2 / 3, 0.8), (1.0, 1.0)]
    long = popularity_curve(np.arange(5000))
    assert len(long) == 101 and long[-1] == (1.0, 1.0)
    assert all(a[1] < b[1] for a, b in itertools.pairwise(long))


def test_same_input_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    """With the page of plots, and without a word of where it was made."""
    log = tmp_path / "in" / "log.csv"  # the folder gives the data set its name
    log.parent.mkdir()
    log.write_text("user_id,item_id,timestamp\n" + "".join(f"u{n % 3},i{n},{n}\n" for n in range(12)))
    for output in ("a", "b"):
        assert main(["--source", "table", "--input", str(log), "--output", str(tmp_path / output), "--core", "0"]) == 0
        (tmp_path / "elsewhere" / "in").mkdir(parents=True, exist_ok=True)
        log = log.rename(tmp_path / "elsewhere" / "in" / "log.csv")
    held = {entry.name: entry.read_bytes() for entry in (tmp_path / "a").iterdir()}
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "b").iterdir()} == held
    assert str(tmp_path).encode() not in b"".join(held.values())
    assert b"<html" in held["report.html"]
