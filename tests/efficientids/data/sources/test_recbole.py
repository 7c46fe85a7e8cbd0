"""RecBole's atomic files and benchmark files."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientids.data.sources.base import TEST, TRAIN, VALIDATION
from efficientids.errors import UserError
from tests.efficientids.data.sources.conftest import ReadSource

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nü\ta b\t5\t9.7830076e8\r\nü\tc\t\t978300761\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "anything"
    folder.mkdir()
    (folder / "ml.inter").write_text(INTER, newline="")
    (folder / "ml.item").write_text('item_id:token\tmovie_title:token_seq\tgenre:token_seq\nc\t"Léon"\tAction Drama\n')
    (folder / "ml.user").write_text("user_id:token\tage:token\nü\t25\n")
    return folder


def test_atomic_files(folder: Path, read: ReadSource) -> None:
    for path in (folder, folder / "ml.inter"):
        found = read("recbole", path)
        assert found.rows == [("ü", "a b", 978300760, 5.0), ("ü", "c", 978300761, None)]
        assert (found.source.name, found.source.kind, found.source.default_core) == ("ml", "recbole", 5)
        assert found.items is not None and found.items.rows() == [("c", '"Léon"', "Action Drama")]
        assert found.users is not None and found.users.rows() == [("ü", "25")]
        assert [path.name for path in found.source.files] == ["ml.inter", "ml.user", "ml.item"]


def test_benchmark_files_with_histories(tmp_path: Path, read: ReadSource) -> None:
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    for split, row in {"train": "u\t1\t2", "valid": "u\t1 2\t3", "test": "u\t1 2 3\t4\nv\t9 9\t8\nu\t1 5\t6"}.items():
        (tmp_path / f"x.{split}.inter").write_text(header + row + "\n")
    found = read("recbole", tmp_path)
    assert found.source.presplit and not found.source.timed and found.source.default_core == 0
    assert found.frame.select("user_id", "item_id", "split").rows() == [
        ("u", "1", TRAIN),
        ("u", "2", TRAIN),
        ("u", "3", VALIDATION),
        ("u", "4", TEST),
        ("v", "9", TRAIN),
        ("v", "9", TRAIN),
        ("v", "8", TEST),
    ]
    assert found.count == 1 and "x.test.inter:4: the history ends with [1, 5]" in found.bad[0]


def test_benchmark_files_with_rows(tmp_path: Path, read: ReadSource) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"x.{split}.inter").write_text(f"user_id:token\titem_id:token\nu\t{split}\n")
    found = read("recbole", tmp_path)
    assert found.frame.select("item_id", "split").rows() == [("train", TRAIN), ("valid", VALIDATION), ("test", TEST)]


def test_refused(folder: Path, read: ReadSource) -> None:
    (folder / "ml.inter").write_text("user_id\titem_id\n1\t2\n")
    with pytest.raises(UserError, match=r"ml\.inter: the header must name columns as name:type.*found 'user_id'"):
        read("recbole", folder)
    (folder / "ml.inter").write_text(INTER + "ü\tc\n\tc\t1\t1\n")
    found = read("recbole", folder)
    assert found.bad == [
        "ml.inter:4: 2 fields, expected 4 (user_id, item_id, rating, timestamp)",
        "ml.inter:5: user_id is empty",
    ]
    (folder / "ml.inter").write_text("user_id:token\ta:token_seq\tb:token_seq\titem_id:token\nu\t1\t2\t3\n")
    with pytest.raises(UserError, match="a, b may each be the history; give --history_column"):
        read("recbole", folder)
    assert [row[1] for row in read("recbole", folder, history_column="b").rows] == ["2", "3"]
