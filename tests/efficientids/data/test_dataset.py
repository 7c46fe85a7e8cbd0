"""The data set folder: what is written comes back, the splits hold out what they should, damage is named."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.layout import HeldOut
from efficientids.data.writing import write_dataset
from efficientids.errors import UserError


def test_round_trip(dataset: Dataset) -> None:
    assert (dataset.num_users, dataset.num_items, dataset.catalogue_size, dataset.num_interactions) == (5, 8, 9, 19)
    assert dataset.train_only_users == 2
    assert dataset.items["title"].to_list() == [f"Title {item}" for item in range(1, 10)]
    assert dataset.users["user_id"].to_list() == [f"u{user}" for user in range(5)]
    assert (dataset.item_ids.dtype, dataset.timestamps.dtype, dataset.offsets.dtype) == (np.int32, np.int64, np.int64)
    assert not dataset.item_ids.flags.writeable  # mapped from the file, never changed


@pytest.mark.parametrize(
    ("split", "histories", "targets"),
    [
        ("train", [[1, 2, 3], [6], [1, 2], [8, 7, 6, 5, 4, 3], [3]], [0, 0, 0, 0, 0]),
        ("validation", [[1, 2, 3], [6], [1, 2], [8, 7, 6, 5, 4, 3], [3]], [4, 7, 0, 2, 0]),
        ("test", [[1, 2, 3, 4], [6, 7], [1, 2], [8, 7, 6, 5, 4, 3, 2], [3]], [5, 8, 0, 1, 0]),
        ("all", [[1, 2, 3, 4, 5], [6, 7, 8], [1, 2], [8, 7, 6, 5, 4, 3, 2, 1], [3]], [0, 0, 0, 0, 0]),
    ],
)
def test_splits_leave_one_out(dataset: Dataset, split: str, histories: list[list[int]], targets: list[int]) -> None:
    assert [dataset.history(user, split).tolist() for user in range(5)] == histories
    assert dataset.split_lengths(split).tolist() == [len(history) for history in histories]
    assert dataset.targets(split).tolist() == targets
    assert dataset.history_times(3, split).tolist() == [10 * (t + 1) for t in range(len(histories[3]))]


@pytest.fixture
def held_out(tmp_path: Path, make_contents: Callable) -> Dataset:
    """Users with 5, 3 and 2 items; two validation targets, three test targets, two of them of the first user."""
    split = HeldOut(np.array([2, 1, 2]), np.array([2, 6]), np.array([3, 4, 7]))
    contents = make_contents([[1, 2, 3, 4, 5], [6, 7, 8], [1, 2]])
    contents = dataclasses.replace(contents, split={"rule": "given"}, held_out=split)
    return write_dataset(tmp_path / "held out", contents)


def test_a_split_with_several_targets_of_a_user(held_out: Dataset) -> None:
    assert held_out.train_lengths.tolist() == [2, 1, 2]
    users, lengths, targets = (array.tolist() for array in held_out.examples("test"))
    assert (users, lengths, targets) == ([0, 0, 1], [3, 4, 2], [4, 5, 8])
    users, lengths, targets = (array.tolist() for array in held_out.examples("validation"))
    assert (users, lengths, targets) == ([0, 1], [2, 1], [3, 7])
    assert held_out.examples("all").lengths.tolist() == [5, 3, 2]
    assert held_out.train_only_users == 1
    assert held_out.history(0, "train").tolist() == [1, 2]
    with pytest.raises(UserError, match="a user may have several examples in test"):
        held_out.targets("test")


def test_version_1_is_leave_one_out_with_times(dataset: Dataset) -> None:
    manifest = json.loads((dataset.path / "manifest.json").read_text())
    for field in ("split", "timestamps", "catalogue", "request"):
        del manifest[field]
    (dataset.path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    old = Dataset.open(dataset.path)
    assert old.timed and old.examples("test").targets.tolist() == [5, 8, 1]


def test_unknown_split_and_user(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="split: 'valid' is none of train, validation, test, all"):
        dataset.split_lengths("valid")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"user: 5 is outside 0\.\.4"):
        dataset.history(5, "test")


def _edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        np.save(folder / name, change(np.load(folder / name)))

    return damage


def _set(index: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def _manifest(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return damage


def _flip_a_bit(folder: Path) -> None:
    raw = bytearray((folder / "timestamps.npy").read_bytes())
    raw[-8] ^= 1
    (folder / "timestamps.npy").write_bytes(bytes(raw))


def _cut_short(folder: Path) -> None:
    (folder / "item_ids.npy").write_bytes((folder / "item_ids.npy").read_bytes()[:-6])


def _items(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        change(pl.read_parquet(folder / "items.parquet")).write_parquet(folder / "items.parquet")

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no array": (lambda f: (f / "offsets.npy").unlink(), r"offsets\.npy: missing"),
    "no table": (lambda f: (f / "items.parquet").unlink(), r"items\.parquet: missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"no prepared data set \(no manifest\.json\)"),
    "manifest cut": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: not JSON"),
    "other manifest": (lambda f: (f / "manifest.json").write_text("[1]"), "field format is not"),
    "version": (_manifest(format_version=99), "format_version is 99, this program reads 1 and 2"),
    "no count": (_manifest(num_users=None), "num_users is None"),
    "wrong count": (_manifest(num_items=9), "num_items is 9, but the files hold 8"),
    "empty": (_manifest(num_interactions=0), "the data set is empty"),
    "files": (_manifest(files={}), "does not list items.parquet"),
    "id 0": (_edit("item_ids.npy", _set(4, 0)), r"item_ids\.npy: row 4 is item 0, outside 1\.\.9"),
    "id beyond": (_edit("item_ids.npy", _set(18, 10)), r"item_ids\.npy: row 18 is item 10, outside 1\.\.9"),
    "negative id": (_edit("item_ids.npy", _set(0, -3)), r"item_ids\.npy: row 0 is item -3"),
    "wide ids": (_edit("item_ids.npy", lambda a: a.astype(np.int64)), r"item_ids\.npy: holds int64 .* expected int32"),
    "2-D": (_edit("timestamps.npy", lambda a: a[:, None]), r"timestamps\.npy: holds int64 of shape \[19, 1\]"),
    "few times": (_edit("timestamps.npy", lambda a: a[:-1]), r"timestamps\.npy: has 18 rows, item_ids\.npy has 19"),
    "offsets fall": (_edit("offsets.npy", _set(2, 4)), r"offsets\.npy: user 1 owns -1 rows"),
    "offsets short": (_edit("offsets.npy", _set(-1, 18)), r"offsets\.npy: runs from 0 to 18, expected 0 to 19"),
    "not an array": (lambda f: (f / "offsets.npy").write_text("hello"), r"offsets\.npy: not a readable \.npy"),
    "pickle": (_edit("offsets.npy", lambda a: a.astype(object)), r"offsets\.npy: not a readable \.npy"),
    "cut short": (_cut_short, r"item_ids\.npy: not a readable \.npy"),
    "not parquet": (lambda f: (f / "users.parquet").write_text("hello"), r"users\.parquet: not a readable parquet"),
    "no column": (_items(lambda t: t.drop("item_id")), r"items\.parquet: has no column item_id; it has item, title"),
    "unordered": (_items(lambda t: t.reverse()), "column item must count 1, 2, … 9"),
    "double id": (_items(lambda t: t.with_columns(item_id=pl.lit("x"))), "column item_id holds empty or repeated ids"),
    "title changed": (_items(lambda t: t.with_columns(title=pl.lit("x"))), r"items\.parquet: .*manifest"),
    "bit flip": (_flip_a_bit, r"timestamps\.npy: its sha256 is not the manifest's"),
}


SPLIT_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no split file": (lambda f: (f / "test_rows.npy").unlink(), r"test_rows\.npy: missing"),
    "unknown rule": (_manifest(split={"rule": "coin"}), "split has the rule 'coin'"),
    "no rule": (_manifest(split=None), "split has the rule None"),
    "times": (_manifest(timestamps="yes"), "timestamps is 'yes', expected true or false"),
    "narrow rows": (_edit("test_rows.npy", lambda a: a.astype(np.int32)), r"test_rows\.npy: holds int32"),
    "few users": (_edit("train_lengths.npy", lambda a: a[:-1]), r"train_lengths\.npy: has 2 rows"),
    "long train": (_edit("train_lengths.npy", _set(2, 3)), "user 2 trains on 3 rows of 2"),
    "rows fall": (_edit("test_rows.npy", _set(0, 4)), r"test_rows\.npy: must hold rising row numbers within 0\.\.9"),
    "row beyond": (_edit("test_rows.npy", _set(2, 10)), "must hold rising row numbers"),
    "target trains": (_edit("validation_rows.npy", _set(0, 1)), r"validation_rows\.npy: row 1 trains"),
    "first row": (lambda f: (_edit("train_lengths.npy", _set(1, 0))(f), _edit("validation_rows.npy", _set(1, 5))(f)),
                  "row 5 trains or is its user's first"),
    "in both": (_edit("validation_rows.npy", _set(1, 7)), r"test_rows\.npy: shares rows"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), SPLIT_DAMAGES.values(), ids=SPLIT_DAMAGES)
def test_damage_of_a_split_is_named(held_out: Dataset, damage: Callable[[Path], object], message: str) -> None:
    damage(held_out.path)
    with pytest.raises(UserError, match=message):
        Dataset.open(held_out.path)


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(dataset: Dataset, damage: Callable[[Path], object], message: str) -> None:
    damage(dataset.path)
    with pytest.raises(UserError, match=message):
        Dataset.open(dataset.path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Dataset.open(tmp_path / "nowhere")


def test_fingerprint_follows_the_content(tmp_path: Path, make_contents: Callable) -> None:
    first, same, other = (
        write_dataset(tmp_path / name, make_contents([[1, 2, last]])).fingerprint
        for name, last in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == same != other


def test_an_existing_data_set_is_replaced_only_when_told(dataset: Dataset, make_contents: Callable) -> None:
    new = make_contents([[1, 2, 3]])
    with pytest.raises(UserError, match="holds a data set already; give --overwrite"):
        write_dataset(dataset.path, new)
    assert Dataset.open(dataset.path).num_users == 5
    assert write_dataset(dataset.path, new, overwrite=True).num_users == 1
    assert os.listdir(dataset.path.parent) == [dataset.path.name]  # nothing temporary is left


def test_other_peoples_files_are_never_replaced(dataset: Dataset, make_contents: Callable, tmp_path: Path) -> None:
    contents = make_contents([[1, 2, 3]])
    (dataset.path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, no part of the data set"):
        write_dataset(dataset.path, contents, overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a prepared data set"):
        write_dataset(foreign, contents, overwrite=True)
    with pytest.raises(UserError, match="a file is in the way"):
        write_dataset(foreign / "thesis.tex", contents)
    assert (foreign / "thesis.tex").read_text() == (dataset.path / "notes.txt").read_text() == "mine"


def test_a_failed_write_leaves_the_old_data_set(
    dataset: Dataset, make_contents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"item 99, outside 1\.\.9"):
        write_dataset(dataset.path, make_contents([[1, 2, 99]]), overwrite=True)
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(UserError, match="cannot be written"):
        write_dataset(dataset.path, make_contents([[1, 2, 3]]), overwrite=True)
    monkeypatch.undo()
    assert Dataset.open(dataset.path).fingerprint == dataset.fingerprint
    assert os.listdir(dataset.path.parent) == [dataset.path.name]


def test_an_empty_folder_will_do_and_no_interactions_will_not(tmp_path: Path, make_contents: Callable) -> None:
    (tmp_path / "new").mkdir()
    assert write_dataset(tmp_path / "new", make_contents([[1]])).train_only_users == 1
    with pytest.raises(UserError, match="the data set is empty"):
        write_dataset(tmp_path / "empty", make_contents([]))
    assert not (tmp_path / "empty").exists()
