"""`prepare` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficientids.__main__ import run
from efficientids.data.dataset import Dataset
from efficientids.data.preparation import cli
from efficientids.data.preparation.cli import main
from efficientids.data.preparation.download import Archive
from efficientids.data.process import has_oracle
from efficientids.errors import UserError

pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    """3 users × 4 films, each rated once by each, film 4 badly."""
    folder = tmp_path / "ml"
    folder.mkdir()
    rows = [f"{user}::{film}::{2 if film == 4 else 5}::{1000 - film}" for user in (1, 2, 3) for film in (1, 2, 3, 4)]
    (folder / "ratings.dat").write_text("\n".join(rows) + "\n")
    (folder / "movies.dat").write_text("".join(f"{film}::Film {film} (1999)::Drama\n" for film in (1, 2, 3, 4)))
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """3 users × 4 items as a CSV file."""
    file = tmp_path / "log.csv"
    rows = [f"u{user},i{item},{1000 + 10 * item}" for user in (1, 2, 3) for item in (1, 2, 3, 4)]
    file.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    return file


def _run(*flags: str) -> int:
    return main(flags)


def test_movielens_to_data_set(movielens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ("--input", str(movielens), "--output", str(out), "--core", "2", "--min_rating", "3")
    assert _run(*flags) == 0
    text = capsys.readouterr().out
    assert "3 with an interaction" in text and "3 rows by min_rating" in text and f"Written to {out}" in text
    dataset = Dataset.open(out)
    assert dataset.history(0, "all").tolist() == [3, 2, 1]
    assert dataset.items["title"].to_list() == ["Film 1 (1999)", "Film 2 (1999)", "Film 3 (1999)"]
    assert json.loads((out / "report.json").read_text())["dropped"]["min_rating"] == 3
    with pytest.raises(UserError, match="give --overwrite"):
        _run(*flags, "--order", "file")
    assert _run(*flags, "--order", "file", "--overwrite") == 0
    assert Dataset.open(out).history(0, "all").tolist() == [1, 2, 3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ml", "out"]


def test_the_same_again_is_no_work(
    movielens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--input", str(movielens), "--output", str(tmp_path / "out"), "--core", "0")
    _run(*flags)
    first = capsys.readouterr().out
    made = (tmp_path / "out" / "manifest.json").stat()
    _run(*flags)
    assert capsys.readouterr().out == first.replace(
        f"Written to {tmp_path / 'out'}",
        f"{tmp_path / 'out'} holds this already (same input, same flags); nothing was done",
    )
    assert (tmp_path / "out" / "manifest.json").stat() == made
    # Other bytes, or a damaged data set, are other content.
    (movielens / "ratings.dat").write_text((movielens / "ratings.dat").read_text().replace("::5::", "::4::"))
    with pytest.raises(UserError, match="holds a data set already; give --overwrite"):
        _run(*flags)
    _run(*flags, "--overwrite")
    (tmp_path / "out" / "offsets.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match="holds a data set already; give --overwrite"):
        _run(*flags)


def test_json_alone_on_standard_output(movielens: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _run("--input", str(movielens), "--output", str(tmp_path / "out"), "--core", "0", "--json")
    printed = capfd.readouterr()
    report = json.loads(printed.out)
    assert (report["users"], report["items"], report["interactions"]) == (3, 4, 12)
    manifest = Dataset.open(tmp_path / "out").manifest
    for name in ("num_users", "num_items", "catalogue_size", "num_interactions"):
        assert report[name] == manifest[name]
    assert printed.err == ""
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())


def test_progress_on_standard_error(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("efficientids.data.preparation.progress._SECONDS", 0.0)
    _run("--source", "table", "--input", str(table), "--output", str(tmp_path / "out"), "--core", "0")
    assert "12 rows read" in capsys.readouterr().err


def test_five_core_is_the_default(movielens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no interaction is left of 12 \(dropped: core 12\)"):
        _run("--input", str(movielens), "--output", str(tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["ml"]


def test_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--source", "generated", "--output", str(tmp_path / "out"), "--seed", "4")
    assert _run(*flags) == 0
    assert "Data set generated-4" in capsys.readouterr().out
    assert has_oracle(Dataset.open(tmp_path / "out"))
    assert _run(*flags) == 0
    assert "nothing was done" in capsys.readouterr().out
    with pytest.raises(UserError, match="give --overwrite"):
        _run(*flags[:-1], "5")


def test_split_by_time_and_a_table(table: Path, tmp_path: Path) -> None:
    flags = ["--source", "table", "--input", str(table), "--core", "0", "--split", "time"]
    flags += ["--validation_start", "1030", "--test_start", "1970-01-01T00:17:20"]  # 1040 s
    _run(*flags, "--output", str(tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.train_lengths.tolist() == [2, 2, 2]
    assert dataset.examples("test").targets.tolist() == [4, 4, 4]


def test_hashed_users(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with table.open("a") as file:
        file.write("u1,i1,secret-of-u1\n")
    flags = ["--source", "table", "--input", str(table), "--core", "0", "--max_bad_share", "0.1", "--hash_users"]
    ids = {}
    for name, salt in (("a", "0123456789abcdef"), ("b", "0123456789abcdef"), ("c", "another secret, long")):
        monkeypatch.setenv("EFFICIENTIDS_USER_SALT", salt)
        _run(*flags, "--output", str(tmp_path / name))
        ids[name] = Dataset.open(tmp_path / name).users["user_id"].to_list()
        held = b"".join(entry.read_bytes() for entry in (tmp_path / name).iterdir())
        assert salt.encode() not in held and b"secret-of-u1" not in held
    assert ids["a"] == ids["b"] == sorted(ids["a"]) and not set(ids["a"]) & set(ids["c"])
    # HMAC-SHA256 of "u1" under the first salt, by `openssl dgst -sha256 -hmac`.
    assert "5162bddb18bda0082a7b39c472f7d118" in ids["a"]
    with pytest.raises(UserError, match="give --overwrite"):  # another salt is another request
        _run(*flags, "--output", str(tmp_path / "a"))
    for salt, message in (("short", "has 5 bytes"), ("", "is not set")):
        monkeypatch.setenv("EFFICIENTIDS_USER_SALT", salt)
        with pytest.raises(UserError, match=f"EFFICIENTIDS_USER_SALT {message}"):
            _run(*flags, "--output", str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--input is missing"),
        (["--input", "nowhere"], "nowhere: no such"),
        (["--source", "generated", "--core", "5"], "--core has no meaning with --source generated"),
        (["--source", "generated", "--title_column", "t"], "--title_column has no meaning with --source generated"),
        (["--source", "generated", "--download"], "--download has no meaning"),
        (["--seed", "3", "--input", "nowhere"], "--seed has no meaning with --source movielens"),
        (["--source", "table", "--download", "--input", "nowhere"], "--download has no meaning with --source table"),
        (["--input", "LOG", "--source", "table", "--core", "-1"], "--core: -1 is negative"),
        (["--input", "LOG", "--source", "table", "--test_share", ".1"], "--test_share has no meaning without --split"),
        (["--input", "LOG", "--source", "table", "--split", "time", "--test_start", "1"], "not a mixture"),
        (["--input", "LOG", "--source", "table", "--split", "time", "--test_share", "1"], "below 1 together"),
        (["--input", "LOG", "--source", "table", "--split", "time", "--order", "file"], "needs the order of time"),
        (["--input", "LOG", "--source", "table", "--max_bad_share", "7"], "--max_bad_share: 7.0 is no share"),
        (["--input", "LOG", "--source", "table", "--title_column", "name"], "title_column"),
        (["--input", "UNTIMED", "--source", "table", "--order", "time"], "--order time: .* has no times"),
    ],
)
def test_flags_that_do_not_fit(table: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    untimed = tmp_path / "untimed.csv"
    untimed.write_text("user_id,item_id\nu,i\n")
    flags = [{"LOG": str(table), "UNTIMED": str(untimed)}.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=message):
        _run("--output", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_every_source_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run("--help")
    text = capsys.readouterr().out
    for source in ("movielens", "amazon", "table", "sequences", "recbole", "pixelrec", "generated"):
        assert f"--source {source} " in text
    assert "--user_column" in text and "EFFICIENTIDS_USER_SALT" in text


def test_a_destination_in_use_is_refused_before_the_work(movielens: Path) -> None:
    with pytest.raises(UserError, match="not empty and not a prepared data set"):
        _run("--input", str(movielens), "--output", str(movielens), "--core", "0", "--overwrite")
    assert sorted(entry.name for entry in movielens.iterdir()) == ["movies.dat", "ratings.dat"]


def test_a_bad_file_is_one_line_and_exit_code_2(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write_text(table.read_text() + "u1,i1,yesterday\n")
    assert run(main, ["--source", "table", "--input", str(table), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "log.csv:14" in error and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.csv"]


def test_download_goes_first(movielens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="leave out --download"):
        _run("--input", str(movielens), "--output", str(tmp_path / "out"), "--download")
    fetched: list[tuple[str, Path]] = []

    def stand_in(name: str, folder: Path, **_: Archive) -> Path:
        fetched.append((name, folder))
        return movielens.rename(folder)

    monkeypatch.setattr(cli, "fetch", stand_in)
    flags = ("--download", "--archive", "ml-latest-small", "--core", "0", "--input", str(tmp_path / "new"))
    assert _run(*flags, "--output", str(tmp_path / "out")) == 0
    assert fetched == [("ml-latest-small", tmp_path / "new")]
    assert Dataset.open(tmp_path / "out").num_users == 3
