"""Rows with a history each: a user's sequence is put together again, and rows that do not fit are told."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from efficientids.data.sources.base import TEST, TRAIN, VALIDATION
from tests.efficientids.data.sources.conftest import ReadSource

HEADER = "user_id,history_item_title,history_item_id,item_id\n"


def _write(folder: Path, **files: str) -> None:
    for name, rows in files.items():
        (folder / f"{name}.csv").write_text(HEADER + rows, encoding="utf-8")


def test_sequences_are_put_together_and_split(tmp_path: Path, read: ReadSource) -> None:
    _write(
        tmp_path,
        train='A,"[\'é, x\']",[1],2\nA,"[]","[1, 2]",3\n',
        valid='A,"[]","[2, 3]",4\nB,"[]","[9, 8]",9\n',
        test='A,"[]","[3, 4]",5\nB,"[]","[8, 9]",1\nA,"[]","[4, 5]",5\n',
    )
    found = read("table", tmp_path)
    assert found.source.presplit and not found.source.timed and found.source.default_core == 0
    rows = found.frame.filter(pl.col("user_id") == "A").select("item_id", "split").rows()
    assert rows == [("1", TRAIN), ("2", TRAIN), ("3", TRAIN), ("4", VALIDATION), ("5", TEST), ("5", TEST)]
    rows = found.frame.filter(pl.col("user_id") == "B").select("item_id", "split").rows()
    assert rows == [("9", TRAIN), ("8", TRAIN), ("9", VALIDATION), ("1", TEST)]
    assert found.count == 0


def test_folders_named_by_split(tmp_path: Path, read: ReadSource) -> None:
    for split, row in {"valid": "A,[],[1],2\n", "test": 'A,[],"[1, 2]",3\n'}.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "Games.csv").write_text(HEADER + row)
    found = read("table", tmp_path)
    assert found.frame.select("item_id", "split").rows() == [("1", TRAIN), ("2", VALIDATION), ("3", TEST)]
    assert found.source.name == tmp_path.name or found.source.name == "Games"


def test_rows_that_do_not_fit(tmp_path: Path, read: ReadSource) -> None:
    _write(tmp_path, valid="A,[],[1],2\n", test='A,[],"[1, 3]",4\nB,[],what,1\nC,[],"[{}]",1\nD,[],[1],\n,[],[1],2\n')
    found = read("table", tmp_path)
    assert found.frame["item_id"].to_list() == ["1", "2"]
    assert found.bad == [
        "test.csv:2: the history ends with [1, 3], the user's earlier rows with [1, 2]: a row between them is missing",
        "test.csv:3: history is 'what', expected a list of items",
        "test.csv:4: history is '[{}]', expected a list of items",
        "test.csv:5: item_id is empty",
        "test.csv:6: user_id is empty",
    ]


def test_lists_of_python_and_of_json(tmp_path: Path, read: ReadSource) -> None:
    rows = 'A,[],"[\'x\', \'ÿ\']",z\nA,[],"[""x"", ""ÿ"", ""z""]",w\nB,[],[],q\nC,[],"__import__(\'os\').getcwd()",q\n'
    _write(tmp_path, log=rows)
    found = read("table", tmp_path / "log.csv")
    assert not found.source.presplit
    assert found.rows == [(user, item, None, None) for user, item in zip("AAAAB", "xÿzwq", strict=True)]
    assert found.count == 1 and "expected a list of items" in found.bad[0]


def test_lists_of_json_lines(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"user": 1, "past": [5, 6], "item": 7}\n{"user": 1, "past": [6, 7], "item": 8}\n')
    found = read("table", path, history_column="past")
    assert found.frame["item_id"].to_list() == ["5", "6", "7", "8"]


def test_industrial(real_data: Path, read: ReadSource) -> None:
    found = read("table", real_data / "amazon-industrial-2018", max_share=0)
    assert found.frame["user_id"].n_unique() == 3_285
    assert found.frame["item_id"].n_unique() == 3_541
    assert found.frame["split"].value_counts().sort("split")["count"].to_list() == [13_678, 4_532, 4_533]
    assert found.items is not None and found.items.height == 3_686
    assert found.items["title"][0].startswith("SUPCO SPP6")
    # No offset: the test file says which title item 114 has.
    assert found.items.filter(pl.col("item_id") == "114")["title"].to_list() == ["Super Glue 15187 Super Glue, 12-Pack"]
