"""A user's items in a row, in all forms."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from efficientids.data.sources import reading
from efficientids.data.sources.base import TEST, TRAIN, VALIDATION
from efficientids.errors import UserError
from tests.efficientids.data.sources.conftest import ReadSource

PAIRS = [("ü", "b"), ("ü", "a"), ("ü", "b"), ("2", "10")]


def _pairs(rows: list) -> list:
    return [row[:2] for row in rows]


def test_all_forms_read_the_same(tmp_path: Path, read: ReadSource) -> None:
    (tmp_path / "x.txt").write_bytes("ü  b a\tb\r\n2 10\r\n\r\n".encode())
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress("ü b a b\n2 10".encode()))
    (tmp_path / "x.jsonl").write_text('{"user": "ü", "items": ["b", "a", "b"]}\n{"user": 2, "items": [10]}\n')
    (tmp_path / "x.inter.json").write_text(json.dumps({"ü": ["b", "a", "b"], "2": [10]}, indent=4))
    (tmp_path / "y.json").write_text(json.dumps({"ü": ["b", "a", "b"], "2": [10]}))
    for name in ("x.txt", "x.txt.gz", "x.jsonl", "x.inter.json", "y.json"):
        found = read("sequences", tmp_path / name)
        assert _pairs(found.rows) == PAIRS, name
        source = found.source
        assert (source.timed, source.presplit, source.default_core, source.kind) == (False, False, 0, "sequences")
        assert found.count == 0
        assert source.name == name[0]


def test_lists_that_are_split(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "sequences.jsonl"
    path.write_text(
        '{"user": 1, "train": [3, 4], "val": [5], "test": [6]}\n{"user": 2, "train": [7], "val": [], "test": []}\n'
    )
    found = read("sequences", path)
    assert found.source.presplit and found.source.name == tmp_path.name
    assert found.frame.select("user_id", "item_id", "split").rows() == [
        ("1", "3", TRAIN),
        ("1", "4", TRAIN),
        ("1", "5", VALIDATION),
        ("1", "6", TEST),
        ("2", "7", TRAIN),
    ]


def test_files_that_are_split(tmp_path: Path, read: ReadSource) -> None:
    (tmp_path / "train.txt").write_text("1 3 4\n")
    (tmp_path / "test.txt").write_text("1 5\n")
    found = read("sequences", tmp_path)
    assert found.frame.select("item_id", "split").rows() == [("3", TRAIN), ("4", TRAIN), ("5", TEST)]


def test_bad_rows(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.jsonl"
    lines = ['{"user": 1, "items": [1, 2]}', '{"user": 2, "items": []}', '{"user": 1, "items": [3]}']
    lines += ['{"user": 3, "items": [1, null]}', '{"user": null, "items": [1]}', '{"user": 4']
    path.write_text("\n".join(lines))
    found = read("sequences", path)
    assert _pairs(found.rows) == [("1", "1"), ("1", "2")]
    assert found.bad[:4] == [
        "x.jsonl:2: user 2 has no items",
        "x.jsonl:3: user 1 occurs twice",
        "x.jsonl:4: user 3 has an empty item",
        "x.jsonl:5: the user is empty",
    ]
    (tmp_path / "x.txt").write_bytes(b"1 2\n\n3\n\xff 4\n5 6")
    found = read("sequences", tmp_path / "x.txt")
    assert _pairs(found.rows) == [("1", "2"), ("5", "6")]
    assert found.bad == [
        "x.txt:2: the user is empty",
        "x.txt:3: user 3 has no items",
        "x.txt:4: not UTF-8; convert the file to UTF-8",
    ]
    (tmp_path / "x.json").write_text('{"1": [2], "3": "4", "5": [[6]]}')
    found = read("sequences", tmp_path / "x.json")
    assert _pairs(found.rows) == [("1", "2")]
    assert found.bad[0] == "x.json:2: user '3': expected a list of items, found '4'"


def test_small_blocks_read_the_same(tmp_path: Path, read: ReadSource, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("".join(f"{i} " + " ".join(map(str, range(i % 9))) + "\n" for i in range(99)))
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"uid": i, "history": list(range(i % 9))}) + "\n" for i in range(99))
    )
    whole = {name: read("sequences", tmp_path / name) for name in ("x.txt", "x.jsonl")}
    assert whole["x.txt"].rows == whole["x.jsonl"].rows
    assert whole["x.txt"].count == whole["x.jsonl"].count == 11
    for size in (16, 64, 1024):
        monkeypatch.setattr(reading, "BLOCK_BYTES", size)
        for name, found in whole.items():
            again = read("sequences", tmp_path / name)
            assert (again.rows, again.bad) == (found.rows, found.bad)


def test_refused(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"user": 1, "stuff": [1]}\n')
    with pytest.raises(UserError, match="no field is known to hold a user's items; it has user, stuff"):
        read("sequences", path)
    assert _pairs(read("sequences", path, sequence_column="stuff").rows) == [("1", "1")]
    (tmp_path / "x.json").write_text('{"1": [2], "1": [3]}')
    with pytest.raises(UserError, match=r"x\.json: not JSON \(the key '1' occurs twice\)"):
        read("sequences", tmp_path / "x.json")
    (tmp_path / "x.txt").write_text("1 2\n")
    with pytest.raises(UserError, match="has no names of columns"):
        read("sequences", tmp_path / "x.txt", user_column="u")


@pytest.mark.parametrize(
    ("name", "counts", "items", "title"),
    [
        (
            "amazon-beauty-2014",
            (22_363, 12_101, 198_502),
            12_101,
            "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce",
        ),
        (
            "amazon-beauty-llamarec",
            (22_332, 12_086, 198_215),
            12_086,
            "As I Am Double Butter Rich Daily Moisturizer, 8 Ounce",
        ),
        ("amazon-instruments-2018", (24_772, 9_922, 206_153), None, None),
        ("yelp", (30_431, 20_033, 316_354), 20_033, "The Great Greek"),  # item 1 of the log is 0 of the item table
        ("ml-1m-lrurec", (6_040, 3_416, 999_611), None, None),
    ],
)
def test_real_data(
    real_data: Path, read: ReadSource, name: str, counts: tuple[int, ...], items: int | None, title: str | None
) -> None:
    found = read("sequences", real_data / name, max_share=0)
    frame = found.frame
    assert (frame["user_id"].n_unique(), frame["item_id"].n_unique(), frame.height) == counts
    assert found.source.presplit == (name == "ml-1m-lrurec")
    if items is None:
        assert found.items is None
        return
    assert found.items is not None and found.items.height == items
    assert found.items.row(0)[:2] == ("1", title)
    assert set(frame["item_id"]) <= set(found.items["item_id"])
    assert any("1 is added" in note for note in found.source.notes) == (name == "yelp")
