"""Item tables in every form, whether found or given; and ids that count from another number. PixelRec's csv."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from efficientids.errors import UserError
from tests.efficientids.data.sources.conftest import ReadSource


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Items 1 to 3."""
    path = tmp_path / "log.txt"
    path.write_text("u 1 2\nv 3 1\n")
    return path


def _table(path: Path, ids: list[object]) -> Path:
    frame = pl.DataFrame({"item_id": ids, "name": [f"Título {i}" for i in ids], "price": 1, "brand": ""})
    if path.suffix == ".parquet":
        frame.with_columns(pl.lit(["a", "b"]).alias("tags")).write_parquet(path)
    elif path.suffix == ".jsonl":
        frame.with_columns(pl.lit(["a", "b"]).alias("tags")).write_ndjson(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({str(i): {"name": f"Título {i}", "brand": "", "tags": ["a", "b"]} for i in ids}))
    else:
        frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl", "t.json"])
def test_forms(tmp_path: Path, log: Path, read: ReadSource, name: str) -> None:
    found = read("sequences", log, items=_table(tmp_path / name, [1, 2, 3]))
    assert found.items is not None
    lists = ["a", "b"] if name.endswith(("parquet", "jsonl", "json")) else None
    expected = {"item_id": "2", "title": "Título 2", "brand": None, **({"tags": lists} if lists else {})}
    assert found.items.row(1, named=True) == expected
    assert found.source.files[-1].name == name
    assert not any("added" in note for note in found.source.notes)


@pytest.mark.parametrize("name", ["items.csv", "item_titles.tsv", "log.item.json", "Other.item.json"])
def test_found_beside_the_log(tmp_path: Path, log: Path, read: ReadSource, name: str) -> None:
    _table(tmp_path / name, [1, 2, 3])
    found = read("sequences", log)
    assert found.items is not None and found.items["title"].to_list() == ["Título 1", "Título 2", "Título 3"]
    assert any(name in note and note.endswith("found beside the log") for note in found.source.notes)
    _table(tmp_path / "items.parquet", [1])
    with pytest.raises(UserError, match="may each be the item table; give --items"):
        read("sequences", log)


@pytest.mark.parametrize(
    ("ids", "first"),
    [
        ([0, 1, 2], "1"),  # all of 1..N in the log, exactly 0..N-1 in the table: the one case where it is certain
        ([1, 2, 3], "1"),
        ([0, 1, 2, 3], "0"),
        ([0, 1, 3], "0"),
        (["a", "b", "c"], "a"),
    ],
)
def test_offset_is_chosen_on_complete_evidence_alone(
    tmp_path: Path, log: Path, read: ReadSource, ids: list[object], first: str
) -> None:
    found = read("sequences", log, items=_table(tmp_path / "t.csv", ids))
    assert found.items is not None and found.items.row(0) == (first, f"Título {ids[0]}", None)
    assert any("1 is added to its ids" in note for note in found.source.notes) == (ids == [0, 1, 2])


def test_a_log_that_has_item_0_is_never_shifted(tmp_path: Path, log: Path, read: ReadSource) -> None:
    log.write_text("u 0 1\nv 2 1\n")
    found = read("sequences", log, items=_table(tmp_path / "t.csv", [0, 1, 2]))
    assert found.items is not None and found.items["item_id"].to_list() == ["0", "1", "2"]


def test_half_evidence_must_be_settled_by_the_user(tmp_path: Path, log: Path, read: ReadSource) -> None:
    log.write_text("u 1 3\n")  # item 3 is beyond the table, item 2 does not occur
    table = _table(tmp_path / "t.csv", [0, 1, 2])
    with pytest.raises(UserError, match=r"numbered 0 to 2, the log's 1 to 3 with gaps.*--item_id_offset 1"):
        read("sequences", log, items=table)
    for offset, ids in ((1, ["1", "2", "3"]), (0, ["0", "1", "2"])):
        found = read("sequences", log, items=table, item_id_offset=offset)
        assert found.items is not None and found.items["item_id"].to_list() == ids
        assert found.items["title"].to_list() == ["Título 0", "Título 1", "Título 2"]
    found = read("sequences", log, items=_table(tmp_path / "t.csv", ["0", "x"]), item_id_offset=1)
    assert found.bad == ["t.csv:3: item_id is 'x', expected a whole number"]


def test_columns(tmp_path: Path, log: Path, read: ReadSource) -> None:
    path = tmp_path / "t.csv"
    path.write_text('asin,what,"long, text"\n1,One,"a ""b""\r\nc"\n2,,\n3,Three,\n3,again,\n,none,\n')
    found = read("sequences", log, items=path, item_id_column="asin", title_column="what", text_columns=("long, text",))
    assert found.items is not None and found.items.rows() == [
        ("1", "One", 'a "b"\nc'),
        ("2", None, None),
        ("3", "Three", None),
    ]
    assert found.bad == ["t.csv:6: asin 3 occurs twice", "t.csv:7: asin is empty"]
    with pytest.raises(UserError, match="no column is known to hold titles or other text; it has asin, what"):
        read("sequences", log, items=path)
    with pytest.raises(UserError, match=r"--text_columns nothing: .* has no such column"):
        read("sequences", log, items=path, text_columns=("nothing",))
    with pytest.raises(UserError, match=r"--title_column nothing: .* has no such column"):
        read("sequences", log, items=path, title_column="nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": 17, "1": 18}', "a map of ids to ids, titles or codes is not an item table"),
        ('{\n "0": ["<a_1>", "<b_2>"]\n}', "a map of ids to ids, titles or codes"),
        ('{"0": "B004756YJA"}', "a map of ids to ids, titles or codes"),
        ("[1]", "expected a JSON object"),
        ("{", "not JSON"),
        ("", "the file is empty"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, log: Path, read: ReadSource, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read("sequences", log, items=path)


def test_missing_item_table(tmp_path: Path, log: Path, read: ReadSource) -> None:
    with pytest.raises(UserError, match=r"t\.csv: no such file"):
        read("sequences", log, items=tmp_path / "t.csv")
    with pytest.raises(UserError, match="a folder, expected a file"):
        read("sequences", log, items=tmp_path)


def test_pixelrec(tmp_path: Path, read: ReadSource) -> None:
    for folder in ("dataset", "information"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "dataset" / "Pixel200K.csv"
    path.write_bytes(
        b"item_id,user_id,timestamp\r\nv1,u1,1630000000\r\nv2,u2,1630000001\r\nv2,u1,2021-08-26 17:46:41\r\nv2,u1\r\n"
    )
    information = tmp_path / "information" / "Pixel200K.csv"
    information.write_text(
        'item_id,title,tag,description\nv1,"視頻, ""1""",tech,"two\nlines"\nv2,,,\n', encoding="utf-8"
    )
    found = read("pixelrec", path)
    assert (found.source.name, found.source.kind, found.source.default_core) == ("Pixel200K", "pixelrec", 0)
    assert found.rows == [("u1", "v1", 1630000000, None), ("u2", "v2", 1630000001, None)]
    assert found.bad == [
        "Pixel200K.csv:4: timestamp is '2021-08-26 17:46:41', expected a time in s",
        "Pixel200K.csv:5: 2 fields, expected 3 (item_id, user_id, timestamp)",
    ]
    assert found.items is not None and found.items.rows() == [
        ("v1", '視頻, "1"', "tech", "two\nlines"),
        ("v2", None, None, None),
    ]
    path.write_text("user,item\n1,2\n")
    with pytest.raises(UserError, match="no column item_id; PixelRec's interactions have item_id, user_id, timestamp"):
        read("pixelrec", path)
