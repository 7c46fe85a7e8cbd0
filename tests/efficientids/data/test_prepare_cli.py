"""`prepare` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficientids.data import cli
from efficientids.data.cli import main
from efficientids.data.dataset import Dataset
from efficientids.data.download import Archive
from efficientids.data.process import has_oracle
from efficientids.errors import UserError


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    """3 users × 4 films, each rated once by each, film 4 badly."""
    folder = tmp_path / "ml"
    folder.mkdir()
    rows = [f"{user}::{film}::{2 if film == 4 else 5}::{1000 - film}" for user in (1, 2, 3) for film in (1, 2, 3, 4)]
    (folder / "ratings.dat").write_text("\n".join(rows) + "\n")
    (folder / "movies.dat").write_text("".join(f"{film}::Film {film} (1999)::Drama\n" for film in (1, 2, 3, 4)))
    return folder


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
    assert dataset.manifest["filters"] == {"min_rating": 3.0, "core": 2}
    assert json.loads((out / "report.json").read_text())["dropped"]["min_rating"] == 3
    with pytest.raises(UserError, match="give --overwrite"):
        _run(*flags)
    assert _run(*flags, "--order", "file", "--overwrite") == 0
    assert Dataset.open(out).history(0, "all").tolist() == [1, 2, 3]


def test_json_alone_on_standard_output(movielens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("--input", str(movielens), "--output", str(tmp_path / "out"), "--core", "0", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["users"], report["items"], report["interactions"]) == (3, 4, 12)


def test_five_core_is_the_default(movielens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no interaction is left of 12 \(dropped: core 12\)"):
        _run("--input", str(movielens), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--source", "generated", "--output", str(tmp_path / "out"), "--seed", "4") == 0
    assert "Data set generated-4" in capsys.readouterr().out
    assert has_oracle(Dataset.open(tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--input is missing"),
        (["--input", "nowhere"], "nowhere: no such folder"),
        (["--source", "generated", "--core", "5"], "--core has no meaning with --source generated"),
        (["--source", "generated", "--download"], "--download has no meaning"),
        (["--seed", "3", "--input", "nowhere"], "--seed has no meaning with --source movielens"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _run("--output", str(tmp_path / "out"), *flags)


def test_a_destination_in_use_is_refused_before_the_work(movielens: Path) -> None:
    with pytest.raises(UserError, match="not empty and not a prepared data set"):
        _run("--input", str(movielens), "--output", str(movielens), "--core", "0", "--overwrite")
    assert sorted(entry.name for entry in movielens.iterdir()) == ["movies.dat", "ratings.dat"]


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
