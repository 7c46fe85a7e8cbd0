"""Tables with one interaction a row, in every format and with every way to say what a column is."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from efficientids.data.sources import SourceOptions, open_source, reading
from efficientids.data.sources.base import TEST, TRAIN, VALIDATION, BadRows
from efficientids.errors import UserError
from tests.efficientids.data.sources.conftest import ReadSource

ROWS = [("ü1", "a,b", 978300760, 4.5), ("ü1", "c", 978300761, 3.0), ("u2", "c", 978300762, None)]
CSV = 'user_id,item_id,rating,timestamp\r\nü1,"a,b",4.5,978300760\r\nü1,c,3,978300761\r\nu2,c,,978300762\r\n'


def test_csv(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "shop.csv"
    path.write_bytes(CSV.encode())
    found = read("table", path)
    assert found.rows == ROWS
    assert (found.source.name, found.source.kind, found.source.files) == ("shop", "table", (path,))
    assert (found.source.timed, found.source.presplit, found.source.default_core) == (True, False, 5)
    assert found.source.notes == [
        "columns: users user_id, items item_id, times timestamp, ratings rating",
        "times are numbers of s since 1970",
        "no item table",
    ]
    assert (found.items, found.users, found.count) == (None, None, 0)


def test_every_format_reads_the_same(tmp_path: Path, read: ReadSource) -> None:
    frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    frame.write_parquet(tmp_path / "x.parquet")
    frame.write_csv(tmp_path / "x.tsv", separator="\t")
    frame.write_ndjson(tmp_path / "x.jsonl")
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    for name in ("x.parquet", "x.tsv", "x.jsonl", "x.csv.gz", "x.json.gz"):
        assert read("table", tmp_path / name).rows == ROWS, name


def test_small_blocks_read_the_same(tmp_path: Path, read: ReadSource, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"user": f"é{i % 7}", "asin": i, "time": 1.5e9 + i, "stars": i % 5, "text": 'a "b"\n'} for i in range(60)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"user": 1}\n[]\n{"user"\n')
    (tmp_path / "x.csv").write_text(
        "user,item,time\n" + "".join(f'"u{i}",{i},{10**9 + i}\n' for i in range(60)) + "1\n"
    )
    whole = [read("table", tmp_path / name) for name in ("x.jsonl", "x.csv")]
    assert [len(found.rows) for found in whole] == [60, 60]
    assert [found.count for found in whole] == [3, 1]
    for size in (64, 1024):
        monkeypatch.setattr(reading, "BLOCK_BYTES", size)
        for name, found in zip(("x.jsonl", "x.csv"), whole, strict=True):
            again = read("table", tmp_path / name)
            assert (again.rows, again.bad, again.count) == (found.rows, found.bad, found.count)


def test_bad_rows_are_passed_over_and_told(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.csv"
    good = "".join(f"u{i},i,1,100\n" for i in range(20))
    path.write_text(f"user,item,rating,time\n{good},i,1,5\nu, ,1,5\nu,i,x,5\nu,i,inf,5\nu,i,1,\nu,i,1\n")
    found = read("table", path)
    assert len(found.rows) == 20
    assert found.count == 6
    assert found.bad == [
        "x.csv:22: user is empty",
        "x.csv:23: item is empty",
        "x.csv:24: rating is 'x', expected a number",
        "x.csv:25: rating is 'inf', expected a number",
        "x.csv:26: time is '', expected a time in s",
    ]
    with pytest.raises(UserError, match=r"x\.csv: 6 of 26 rows cannot be read \(23\.1%, at most 1%"):
        read("table", path, max_share=0.01)


def test_bad_lines_of_json(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"user": "a", "item": "b"}\n{"user": "a"}\n\n7\n{"user": "\xff", "item": "b"}\n{"user": "c", \n')
    found = read("table", path)
    assert found.rows == [("a", "b", None, None)]
    assert found.bad[:4] == [
        "x.jsonl:2: item is empty",
        "x.jsonl:3: a blank line",
        "x.jsonl:4: expected an object, found '7'",
        "x.jsonl:5: not UTF-8; convert the file to UTF-8",
    ]
    assert "x.jsonl:6: not JSON" in found.bad[4]


def test_columns_by_flag_and_without_header(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.txt"
    path.write_text("u1;i1;5\nu2;i2;6\n")
    found = read("table", path, user_column="1", item_column="2", time_column="3", header=False)
    assert found.rows == [("u1", "i1", 5, None), ("u2", "i2", 6, None)]
    assert read("table", path, user_column="2", item_column="1").rows[0][:2] == ("i1", "u1")
    path.write_text("who what\nu1 i1\n")
    found = read("table", path, user_column="who", item_column="what", separator=" ")
    assert found.rows == [("u1", "i1", None, None)]
    assert not found.source.timed
    assert "no times: rows stand in file order" in found.source.notes
    path.write_text("a\tb\n")
    assert read("table", path, user_column="1", item_column="2", separator="tab").rows == [("a", "b", None, None)]


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (
            "who,what,when",
            {},
            r"no column is known to hold user ids; it has 1, 2, 3\. Name it with --user_column; a file",
        ),
        ("user_id,what", {}, "no column is known to hold item ids; it has user_id, what. Name it with --item_column$"),
        ("user_id,userId,item", {}, "user_id, userId may each hold user ids; name one with --user_column"),
        ("user,item,date,time", {}, "date, time may each hold times; name one with --time_column"),
        ("user,item", {"time_column": "t"}, "--time_column t: .* has no such column; it has user, item"),
        ("user,item,item", {}, "has a name twice"),
        ("user", {}, "no separator in the first line 'user'; name it with --separator"),
        ("user,item,time", {}, "column time holds '1'.*expected seconds|rows"),
    ],
)
def test_unclear_columns_are_refused(tmp_path: Path, header: str, options: dict[str, str], message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(header + "\n")
    with pytest.raises(UserError, match=message):
        open_source("table", [path], None, SourceOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("times", "milliseconds", "said"),
    [
        (["978300760", "978300761.875"], [978300760000, 978300761875], "numbers of s"),
        (["978300760123", "978300761000"], [978300760123, 978300761000], "numbers of ms"),
        (["978300760123456", "978300761000000"], [978300760123, 978300761000], "numbers of µs"),
        (["978300760123456789"], [978300760123], "numbers of ns"),
        (["-5", "0"], [-5000, 0], "numbers of s"),
        (["1970-01-02", "1970-01-01T00:01", "1969-12-31 23:59:59.5"], [86400000, 60000, -500], "ISO dates"),
        (["1970-01-01T01:00:00+01:00", "1970-01-01 00:00:07Z"], [0, 7000], "ISO dates"),
        (["19700102"], [86400000], "dates as 20140723"),
    ],
)
def test_times(tmp_path: Path, read: ReadSource, times: list[str], milliseconds: list[int], said: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"u,i,{time}\n" for time in times))
    found = read("table", path)
    assert found.frame["timestamp"].to_list() == milliseconds
    assert said in found.source.notes[1]


def test_one_unit_a_file(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp\n" + "u,i,978300760123\n" * 3 + "u,i,978300760\nu,i,2001-01-01\n")
    found = read("table", path)
    assert found.frame["timestamp"].to_list() == [978300760123] * 3
    assert found.bad == [
        "x.csv:5: timestamp is '978300760', expected a time in ms",
        "x.csv:6: timestamp is '2001-01-01', expected a time in ms",
    ]
    path.write_text('user,item,timestamp\nu,i,"07 23, 2014"\n')
    with pytest.raises(UserError, match=r"column timestamp holds '07 23, 2014'; expected seconds"):
        read("table", path)


def test_types_of_parquet(tmp_path: Path, read: ReadSource) -> None:
    time = datetime.datetime(1970, 1, 1, 0, 1, 30, 900000)
    frame = pl.DataFrame(
        {"user": [1.0, None, 2.5], "item": [7, 8, 9], "time": [time] * 3, "rating": [1.0, None, float("nan")]}
    )
    frame.write_parquet(tmp_path / "x.parquet")
    found = read("table", tmp_path / "x.parquet")
    assert found.rows == [("1", "7", 90, 1.0), ("2.5", "9", 90, None)]
    assert found.bad == ["x.parquet:2: user is empty"]
    (tmp_path / "y.parquet").write_text("no")
    with pytest.raises(UserError, match=r"y\.parquet: not a Parquet file"):
        read("table", tmp_path / "y.parquet")


def test_split_by_column(tmp_path: Path, read: ReadSource) -> None:
    path = tmp_path / "x.csv"
    path.write_text("user,item,split\nu,a,train\nu,b,Valid\nu,c,test\nu,d,other\n")
    found = read("table", path)
    assert found.source.presplit and found.source.default_core == 0
    assert found.frame["split"].to_list() == [TRAIN, VALIDATION, TEST]
    assert found.bad == ["x.csv:5: split is 'other', expected train, valid or test"]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("x.train", "x.validation", "x.test")])
def test_split_by_files(tmp_path: Path, read: ReadSource, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        (tmp_path / f"{name}.csv").write_text(f"user,item,time\nu,i{number},{number}\n")
    (tmp_path / "items.csv").write_text("item,title\ni0,Zero\n")
    inputs = [tmp_path / f"{name}.csv" for name in names]
    for found in (read("table", tmp_path), read("table", *reversed(inputs))):
        assert found.source.presplit
        assert found.frame.select("item_id", "split").rows() == [("i0", TRAIN), ("i1", VALIDATION), ("i2", TEST)]
        assert found.items is not None and found.items.rows() == [("i0", "Zero")]
    inputs[0].unlink()
    with pytest.raises(UserError, match="no train file"):
        read("table", tmp_path)
    with pytest.raises(UserError, match="some names say train, valid or test and others do not"):
        read("table", inputs[1], tmp_path / "items.csv")


def test_a_folder_must_be_clear(tmp_path: Path, read: ReadSource) -> None:
    with pytest.raises(UserError, match=r"no file is a log .*it holds nothing"):
        read("table", tmp_path)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("user,item\nu,i\n")
    with pytest.raises(UserError, match=r"several files may be the log \(it holds a\.csv, b\.csv\); name the file"):
        read("table", tmp_path)
    assert len(read("table", tmp_path / "a.csv", tmp_path / "b.csv").rows) == 2
    with pytest.raises(UserError, match="a folder among several --input"):
        read("table", tmp_path, tmp_path / "a.csv")
    with pytest.raises(UserError, match="no such file or folder"):
        read("table", tmp_path / "c.csv")


def test_options_without_meaning_are_refused(tmp_path: Path) -> None:
    for kind, options, flag in (
        ("movielens", {"user_column": "u"}, "user_column"),
        ("sequences", {"rating_column": "r"}, "rating_column"),
        ("table", {"sequence_column": "s"}, "sequence_column"),
        ("amazon", {"header": False}, "header"),
        ("table", {"title_column": "t"}, "title_column: there is no item table"),
    ):
        (tmp_path / "x.csv").write_text("user,item\nu,i\n")
        with pytest.raises(UserError, match=f"--{flag}"):
            open_source(kind, [tmp_path / "x.csv"], None, SourceOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--source csv: none of amazon"):
        open_source("csv", [tmp_path], None, SourceOptions())
    with pytest.raises(UserError, match="--input is missing"):
        open_source("table", [], None, SourceOptions())


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("user,item\n")
    source = open_source("table", [tmp_path / "x.csv"], None, SourceOptions())
    with pytest.raises(UserError, match=r"x\.csv: no rows"):
        list(source.interactions(BadRows()))
