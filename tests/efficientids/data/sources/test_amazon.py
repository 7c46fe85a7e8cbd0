"""Amazon reviews and metadata of three years."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from efficientids.data.sources.base import TEST, TRAIN, VALIDATION
from efficientids.errors import UserError
from tests.efficientids.data.sources.conftest import ReadSource

OLD = {"reviewerID": "A1YJEY40YUW4SE", "asin": "7806397051", "overall": 5.0, "unixReviewTime": 1391040000}


def _lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_2014(tmp_path: Path, read: ReadSource) -> None:
    reviews = _lines(OLD | {"helpful": [0, 1], "reviewText": 'ü "x"\n'}, OLD | {"asin": "B00X", "helpful": [0, 0]})
    (tmp_path / "reviews_Beauty.json.gz").write_bytes(gzip.compress(reviews.encode()))
    literals = [
        "{'asin': 'B00X', 'title': 'Tom &amp; \"Léon\"\\'s', 'categories': [['Beauty', 'Skin &amp; Hair'], ['Gift']]}",
        "{'asin': 'B00X', 'title': 'again'}",
        "{'asin': __import__('os').getcwd()}",
        "{'asin': '7806397051', 'brand': 'WAWO', 'price': 1.5, 'related': {'also_bought': ['a']}}",
    ]
    (tmp_path / "meta_Beauty.json.gz").write_bytes(gzip.compress("\n".join(literals).encode()))
    found = read("amazon", tmp_path)
    source = found.source
    assert (source.name, source.kind, source.timed, source.default_core) == ("Beauty", "amazon-2014", True, 5)
    assert found.rows == [
        ("A1YJEY40YUW4SE", "7806397051", 1391040000, 5.0),
        ("A1YJEY40YUW4SE", "B00X", 1391040000, 5.0),
    ]
    assert found.items is not None and found.items.rows(named=True) == [
        {"item_id": "B00X", "title": 'Tom & "Léon"\'s', "categories": ["Beauty", "Skin & Hair", "Gift"], "brand": None},
        {"item_id": "7806397051", "title": None, "categories": None, "brand": "WAWO"},
    ]
    assert found.bad == ["meta_Beauty.json.gz:3: not a Python literal (ValueError)"]
    assert "meta_Beauty.json.gz: 1 rows repeat an item; the first of each counts" in source.notes


def test_deep_and_long_literals_are_bad_rows(tmp_path: Path, read: ReadSource) -> None:
    (tmp_path / "reviews_X.json").write_text(_lines(OLD))
    rows = ["{'asin': 'a', 'title': 't'}", "{'asin': " + "[" * 5000 + "]" * 5000 + "}"]
    rows += ["{'asin': '" + "x" * (1 << 20) + "'}", "['asin']", ""]
    (tmp_path / "meta_X.json").write_text("\n".join(rows) + "\n{'asin': 'b'}\n")
    found = read("amazon", tmp_path / "reviews_X.json")
    assert found.items is not None and found.items["item_id"].to_list() == ["a", "b"]
    assert found.count == 4


def test_2018(tmp_path: Path, read: ReadSource) -> None:
    (tmp_path / "Games_5.json").write_text(_lines(OLD | {"verified": True, "style": {"Size:": " 1"}}, OLD))
    meta = {"asin": "7806397051", "title": "T&#39;s", "category": ["a", "b"], "description": ["x", ""], "brand": "B"}
    (tmp_path / "meta_Games.json.gz").write_bytes(gzip.compress(_lines(meta, {"asin": "B1"}).encode()))
    found = read("amazon", tmp_path / "Games_5.json")
    assert (found.source.kind, found.source.name) == ("amazon-2018", "Games_5")
    assert found.items is not None and found.items.rows() == [
        ("7806397051", "T's", ["a", "b"], ["x", ""], "B"),
        ("B1", None, None, None, None),
    ]


@pytest.mark.parametrize(("year", "items_first"), [(2014, False), (2018, True)])
def test_ratings_without_header(tmp_path: Path, read: ReadSource, year: int, items_first: bool) -> None:
    path = tmp_path / "ratings_Books.csv"
    pairs = [("AH2L9G3DQHHAJ", "0000000116"), ("A2IIIDRK3PRRZY", "B00AA11BB2")]
    rows = [(item, user) if items_first else (user, item) for user, item in pairs]
    path.write_text("".join(f"{a},{b},4.0,1019865600\n" for a, b in rows) + "x,y\n")
    found = read("amazon", path)
    assert (found.source.kind, found.source.name) == (f"amazon-{year}", "Books")
    assert found.rows == [(user, item, 1019865600, 4.0) for user, item in pairs]
    assert found.bad == [
        "ratings_Books.csv:3: 2 fields, expected 4 "
        + ("(item, user, rating, timestamp)" if items_first else "(user, item, rating, timestamp)")
    ]
    path.write_text("a,b,4.0,1019865600\n")
    with pytest.raises(UserError, match=r"it is not clear which holds the items.*--source table --header False"):
        read("amazon", path)


def test_2023(tmp_path: Path, read: ReadSource) -> None:
    row = {"rating": 5.0, "title": "ü", "asin": "B1", "parent_asin": "B0", "user_id": "AE", "timestamp": 1588687728923}
    (tmp_path / "All.jsonl").write_text(_lines(row, row | {"user_id": None}))
    (tmp_path / "meta_All.jsonl").write_text(_lines({"parent_asin": "B0", "title": "x", "store": "S", "features": []}))
    found = read("amazon", tmp_path / "All.jsonl")
    assert found.source.kind == "amazon-2023"
    assert found.rows == [("AE", "B0", 1588687728, 5.0)]
    assert found.bad == ["All.jsonl:2: user_id is empty"]
    assert found.items is not None and found.items.rows() == [("B0", "x", "S", [])]
    assert "times are numbers of ms since 1970" in found.source.notes


def test_2023_split(tmp_path: Path, read: ReadSource) -> None:
    for number, split in enumerate(("train", "valid", "test")):
        (tmp_path / f"All.{split}.csv").write_text(
            f"user_id,parent_asin,rating,timestamp,history\nAE,B{number},5.0,{1588687728923 + number},B8 B9\n"
        )
    found = read("amazon", tmp_path)
    assert (found.source.presplit, found.source.timed, found.source.default_core) == (True, True, 0)
    assert found.frame["split"].to_list() == [TRAIN, VALIDATION, TEST]
    assert found.frame["item_id"].to_list() == ["B0", "B1", "B2"]


def test_other_files_are_refused(tmp_path: Path, read: ReadSource) -> None:
    (tmp_path / "x.json").write_text('{"user": 1, "item": 2}\n')
    with pytest.raises(UserError, match=r"x\.json: reviews have user_id, parent_asin.*found user, item"):
        read("amazon", tmp_path / "x.json")
    (tmp_path / "x.csv").write_text("user,item,rating,time\n")
    with pytest.raises(UserError, match=r"x\.csv: ratings are user,item,rating,time \(2014\)"):
        read("amazon", tmp_path / "x.csv")
