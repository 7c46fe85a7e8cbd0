"""MovieLens folders as GroupLens publishes them, and as people break them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from efficientids.errors import UserError
from tests.efficientids.data.sources.conftest import ReadSource

RATINGS = "1::10::5::978300760\n1::20::3::978302109\n2::10::4::978301968\n"
MOVIES = "10::Toy Story (1995)::Animation|Comedy\n20::Léon (1994)::Action\n"
USERS = "1::F::1::10::48067\n2::M::56::16::02460\n"
STRICT = 0.01


@pytest.fixture
def dat(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-tiny"
    folder.mkdir()
    (folder / "ratings.dat").write_text(RATINGS)
    (folder / "movies.dat").write_text(MOVIES, encoding="latin-1")
    (folder / "users.dat").write_text(USERS)
    return folder


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-csv"
    folder.mkdir()
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.5,964982703\n1,20,3.0,964981247\n")
    movies = (
        'movieId,title,genres\n10,"American President, The (1995)",Comedy|Drama\n20,Léon (1994),(no genres listed)\n'
    )
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return folder


def test_dat_folder(dat: Path, read: ReadSource) -> None:
    found = read("movielens", dat)
    source = found.source
    assert (source.name, source.kind, source.timed, source.presplit) == ("ml-tiny", "movielens", True, False)
    assert source.default_core == 5
    assert [path.name for path in source.files] == ["ratings.dat", "movies.dat", "users.dat"]
    assert found.rows == [("1", "10", 978300760, 5.0), ("1", "20", 978302109, 3.0), ("2", "10", 978301968, 4.0)]
    assert found.items is not None and found.items.rows() == [
        ("10", "Toy Story (1995)", ["Animation", "Comedy"]),
        ("20", "Léon (1994)", ["Action"]),
    ]
    assert found.users is not None and found.users.row(1, named=True) == {
        "user_id": "2",
        "gender": "M",
        "age": 56,
        "occupation": 16,
        "zip_code": "02460",
    }
    assert found.count == 0


def test_dat_folder_without_users_or_last_newline_and_with_windows_line_ends(dat: Path, read: ReadSource) -> None:
    (dat / "users.dat").unlink()
    (dat / "ratings.dat").write_bytes(RATINGS.rstrip("\n").replace("\n", "\r\n").encode())
    found = read("movielens", dat)
    assert found.users is None
    assert [row[2] for row in found.rows] == [978300760, 978302109, 978301968]


def test_csv_folder(csv: Path, read: ReadSource) -> None:
    found = read("movielens", csv)
    assert found.rows == [("1", "10", 964982703, 4.5), ("1", "20", 964981247, 3.0)]
    assert found.items is not None and found.items.rows() == [
        ("10", "American President, The (1995)", ["Comedy", "Drama"]),
        ("20", "Léon (1994)", []),
    ]


def test_quotes_are_csv_in_csv_and_text_in_dat(csv: Path, dat: Path, read: ReadSource) -> None:
    (csv / "ratings.csv").write_text('"userId","movieId","rating","timestamp"\n"1","10","4.5","964982703"\n')
    (csv / "movies.csv").write_text('movieId,title,genres\n10,"""Great Performances"" Cats (1998)",Musical\n')
    (dat / "movies.dat").write_text('10::"Great Performances" Cats (1998)::Musical\n')
    assert read("movielens", csv).rows == [("1", "10", 964982703, 4.5)]
    for folder in (csv, dat):
        items = read("movielens", folder).items
        assert items is not None and items["title"].to_list() == ['"Great Performances" Cats (1998)']


def test_a_few_unreadable_rows_are_passed_over_and_told(dat: Path, read: ReadSource) -> None:
    good = "".join(f"{user}::10::4::{1000 + user}\n" for user in range(1, 298))
    (dat / "ratings.dat").write_text(good + "1::20::4\n\nx::20::4::5\n")
    found = read("movielens", dat, max_share=STRICT)
    assert len(found.rows) == 297
    assert found.bad == [
        "ratings.dat:298: 3 fields, expected 4 (userId, movieId, rating, timestamp)",
        "ratings.dat:299: 1 fields, expected 4 (userId, movieId, rating, timestamp)",
        "ratings.dat:300: userId is 'x', expected a whole number",
    ]
    (dat / "ratings.dat").write_text(good + "1::20::4\n" * 4)
    with pytest.raises(UserError, match=r"4 of 301 rows cannot be read \(1\.3%, at most 1%"):
        read("movielens", dat, max_share=STRICT)


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


DAT_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no ratings": (
        lambda f: (f / "ratings.dat").unlink(),
        r"no ratings\.dat and no ratings\.csv \(it holds movies\.dat",
    ),
    "no movies": (lambda f: (f / "movies.dat").unlink(), r"movies\.dat is missing"),
    "both forms": (_write("ratings.csv", ""), "holds ratings.dat and ratings.csv"),
    "empty": (_write("ratings.dat", ""), r"ratings\.dat: the file is empty"),
    "blank": (_write("movies.dat", "\n\n"), r"movies\.dat: the file is empty"),
    "tabs": (_write("ratings.dat", RATINGS.replace("::", "\t")), r"ratings\.dat:1: 1 fields, expected 4"),
    "five fields": (_write("ratings.dat", "1::1::5::9::9\n"), r"ratings\.dat:1: 5 fields, expected 4"),
    "item text": (_write("ratings.dat", "1::Toy Story::5::9\n"), "movieId is 'Toy Story', expected a whole number"),
    "rating text": (_write("ratings.dat", "1::1::good::9\n"), "rating is 'good', expected a number"),
    "rating nan": (_write("ratings.dat", "1::1::nan::9\n"), "rating is 'nan', expected a number"),
    "no rating": (_write("ratings.dat", "1::1::::9\n"), "rating is '', expected a number"),
    "date": (_write("ratings.dat", "1::1::5::2001-01-01\n"), "timestamp is '2001-01-01', expected a time in s"),
    "no id": (_write("ratings.dat", "::1::5::9\n"), "userId is '', expected a whole number"),
    "movie twice": (_write("movies.dat", MOVIES + "10::Again::Drama\n"), r"movies\.dat:3: movieId 10 occurs twice"),
    "movie fields": (_write("movies.dat", "10::Toy Story\n"), r"movies\.dat:1: 2 fields, expected 3"),
    "user fields": (_write("users.dat", "1::F::1\n"), r"users\.dat:1: 3 fields, expected 5"),
    "user twice": (_write("users.dat", USERS + "1::F::1::1::1\n"), r"users\.dat:3: userId 1 occurs twice"),
}


@pytest.mark.parametrize(("fault", "message"), DAT_FAULTS.values(), ids=DAT_FAULTS)
def test_dat_faults_are_named(dat: Path, read: ReadSource, fault: Callable[[Path], object], message: str) -> None:
    fault(dat)
    with pytest.raises(UserError, match=message):
        read("movielens", dat, max_share=STRICT)


CSV_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other columns": (
        _write("ratings.csv", "user,item,stars\n1,2,3\n"),
        "must name the columns userId.*'user,item,stars'",
    ),
    "no header": (_write("ratings.csv", "1,10,4.5,964982703\n"), r"ratings\.csv: the first line must name the columns"),
    "header alone": (_write("ratings.csv", "userId,movieId,rating,timestamp\n"), r"ratings\.csv: no rows"),
    "movie header": (
        _write("movies.csv", "id,name\n1,x\n"),
        r"movies\.csv: the first line must name the columns movieId",
    ),
    "no quotes": (_write("movies.csv", "movieId,title,genres\n1,President, The,Drama\n"), r"movies\.csv:2: 4 fields"),
    "open quote": (_write("movies.csv", 'movieId,title,genres\n1,"' + "x" * 200_000), "not CSV .*quote"),
}


@pytest.mark.parametrize(("fault", "message"), CSV_FAULTS.values(), ids=CSV_FAULTS)
def test_csv_faults_are_named(csv: Path, read: ReadSource, fault: Callable[[Path], object], message: str) -> None:
    fault(csv)
    with pytest.raises(UserError, match=message):
        read("movielens", csv, max_share=STRICT)


def test_missing_and_empty_folders_and_other_inputs(tmp_path: Path, read: ReadSource) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read("movielens", tmp_path / "nowhere")
    with pytest.raises(UserError, match="it holds nothing"):
        read("movielens", tmp_path)
    with pytest.raises(UserError, match="--items has no meaning with --source movielens"):
        read("movielens", tmp_path, items=tmp_path / "items.csv")
    with pytest.raises(UserError, match="reads one folder"):
        read("movielens", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "counts", "movies"),
    [("ml-1m", (6_040, 3_706, 1_000_209), 3_883), ("ml-latest-small", (610, 9_724, 100_836), 9_742)],
)
def test_real_counts(real_data: Path, read: ReadSource, name: str, counts: tuple[int, int, int], movies: int) -> None:
    found = read("movielens", real_data / name, max_share=0)
    frame = found.frame
    assert (frame["user_id"].n_unique(), frame["item_id"].n_unique(), frame.height) == counts
    assert found.items is not None and found.items.height == movies
    assert found.items["title"].null_count() == 0
    assert any("é" in title for title in found.items["title"])
