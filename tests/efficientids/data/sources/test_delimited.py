"""Text tables in blocks: however the bytes are cut, the same rows and the same bad rows come out."""

from __future__ import annotations

import csv
import gzip
import io
import random
from pathlib import Path

import polars as pl
import pytest

from efficientids.data.sources import reading
from efficientids.data.sources.base import BadRows
from efficientids.data.sources.delimited import DelimitedFile, quoted_layout, uses_quotes
from efficientids.errors import UserError

NAMES = ("a", "b", "c")


def _read(path: Path, *, separator: str = ",", quoted: bool = True, header: bool = False) -> tuple[list, list[str]]:
    bad = BadRows()
    frames = list(DelimitedFile(path, NAMES, separator, header, quoted).frames(NAMES, bad))
    # `first` keeps a few rows alone; these files have few.
    return (pl.concat(frames).rows() if frames else []), [str(row) for row in bad.first] + [str(bad.count)]


def _random_csv(seed: int) -> bytes:
    """Fields with separators, quotes, line ends and signs beyond ASCII; a few rows broken on purpose."""
    rng = random.Random(seed)
    out = []
    for _ in range(60):
        fields = ["".join(rng.choices(["x", "é", "😀", ",", '"', "\n", " ", "7"], k=rng.randrange(5))) for _ in NAMES]
        text = io.StringIO()
        csv.writer(text, lineterminator=rng.choice(["\n", "\r\n"])).writerow(fields)
        line = text.getvalue()
        if rng.random() < 0.05:
            line = rng.choice(["1,2\n", "1,2,3,4\n", 'x"y,2,3\n', '"x"y,2,3\n', "\n", "\u20ac,5\n"])
        out.append(line.encode())
    return b"".join(out)


@pytest.mark.parametrize("seed", range(12))
def test_blocks_of_any_size_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(_random_csv(seed))
    whole = _read(path)
    assert len(whole[0]) > 40
    for size in (1, 7, 64, 1024):
        monkeypatch.setattr(reading, "BLOCK_BYTES", size)
        assert _read(path) == whole


@pytest.mark.parametrize("seed", range(6))
def test_well_formed_csv_is_read_as_the_csv_module_reads_it(tmp_path: Path, seed: int) -> None:
    rng = random.Random(100 + seed)
    rows = [["".join(rng.choices(["x", "é", ",", '"', "\n"], k=rng.randrange(6))) for _ in NAMES] for _ in range(50)]
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    found, bad = _read(path)
    assert [list(row[1:]) for row in found] == rows
    assert bad == ["0"]


def test_bad_rows_are_named_by_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes('a,b,c\r\n1,"é,\r\n2",3\r\n4,5\r\n\r\n6,7,8,9\r\n'.encode() + b"\xff,2,3\r\n7,8,9")
    rows, bad = _read(path, header=True)
    assert rows == [(2, "1", "é,\n2", "3"), (8, "7", "8", "9")]
    assert bad == [
        "x.csv:4: 2 fields, expected 3 (a, b, c)",
        "x.csv:5: 1 fields, expected 3 (a, b, c)",
        "x.csv:6: 4 fields, expected 3 (a, b, c)",
        "x.csv:7: not UTF-8; convert the file to UTF-8",
        "4",
    ]


def test_every_line_that_an_open_quote_swallows_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('1,2,3\n"4,5,6\n7,8,9\n1,"2",3\n4,5,6\n')
    rows, bad = _read(path)
    assert [row[0] for row in rows] == [1, 5]
    assert bad[-1] == "3" and "runs over 3 lines" in bad[0]


def test_quotes_are_text_where_they_are_not_csvs(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('1\t"Great" film\t3\n2\t5" nail\t3\n')
    assert not uses_quotes(path, "\t")
    assert _read(path, separator="\t", quoted=False)[0] == [(1, "1", '"Great" film', "3"), (2, "2", '5" nail', "3")]
    path.write_text('1\t"Great ""film"""\t3\n')
    assert uses_quotes(path, "\t")
    path.write_text("1\tplain\t3\n")
    assert not uses_quotes(path, "\t")


def test_long_separators_and_packed_files(tmp_path: Path) -> None:
    path = tmp_path / "x.dat.gz"
    path.write_bytes(gzip.compress("\ufeff1::é::3\n4:: ::6\n\n\n".encode()))
    assert _read(path, separator="::", quoted=False) == ([(1, "1", "é", "3"), (2, "4", " ", "6")], ["0"])
    path.write_bytes(gzip.compress(b"1::2::3\n" * 2000)[:-30])
    with pytest.raises(UserError, match=r"x\.dat\.gz: cannot be read"):
        _read(path, separator="::", quoted=False)
    path.write_bytes(b"1::2::3\n")
    with pytest.raises(UserError, match="Not a gzipped file"):
        _read(path, separator="::", quoted=False)


def test_empty_files_and_files_without_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"
    for content in (b"", b"\n\r\n\n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.csv: the file is empty"):
            _read(path)
    path.write_bytes(b"x" * 500)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 200)
    with pytest.raises(UserError, match="no line ends within"):
        _read(path)


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ('"a",b\n', True),
        ('"a""b",""\n', True),
        ('""""\n', True),
        ('"a\nb",c\n', True),
        ('a"b,c\n', False),
        ('"a"b,c\n', False),
        ('""a"",c\n', False),
        ('a,b "c"\n', False),
    ],
)
def test_layout_tells_well_formed_quotes(text: str, well_formed: bool) -> None:
    assert (quoted_layout(text.encode(), b",") is not None) == well_formed
