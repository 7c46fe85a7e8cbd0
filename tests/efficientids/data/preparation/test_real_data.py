"""Every real data set prepares to exactly the counts that are known of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.preparation.cli import main

pytestmark = pytest.mark.usefixtures("no_page")

# flags after --source, {input} being the folder → users, items with an interaction, interactions, catalogue
COUNTS: dict[str, tuple[list[str], tuple[int, int, int, int]]] = {
    "ml-1m": (["movielens", "--input", "{ml-1m}"], (6_040, 3_416, 999_611, 3_416)),
    "ml-1m raw": (["movielens", "--input", "{ml-1m}", "--core", "0"], (6_040, 3_706, 1_000_209, 3_706)),
    "ml-latest-small": (["movielens", "--input", "{ml-latest-small}"], (610, 3_650, 90_274, 3_650)),
    "ml-latest-small raw": (
        ["movielens", "--input", "{ml-latest-small}", "--core", "0"],
        (610, 9_724, 100_836, 9_724),
    ),
    "ml-1m-lrurec": (["sequences", "--input", "{ml-1m-lrurec}"], (6_040, 3_416, 999_611, 3_416)),
    "beauty 2014": (["sequences", "--input", "{amazon-beauty-2014}/Beauty.txt"], (22_363, 12_101, 198_502, 12_101)),
    "beauty llamarec": (["sequences", "--input", "{amazon-beauty-llamarec}"], (22_332, 12_086, 198_215, 12_086)),
    "instruments": (
        ["sequences", "--input", "{amazon-instruments-2018}/Instruments.inter.json"],
        (24_772, 9_922, 206_153, 9_922),
    ),
    "yelp": (["sequences", "--input", "{yelp}/Yelp.txt"], (30_431, 20_033, 316_354, 20_033)),
    # 13,678 rows that are in a first history, and the 4,532 + 4,533 items to predict.
    "industrial": (["table", "--input", "{amazon-industrial-2018}"], (3_285, 3_541, 22_743, 3_686)),
}


def _prepared(real_data: Path, output: Path, flags: list[str]) -> Dataset:
    folders = {entry.name: str(entry) for entry in real_data.iterdir()}
    assert main(["--source", *(flag.format(**folders) for flag in flags), "--output", str(output), "--json"]) == 0
    return Dataset.open(output)


@pytest.mark.parametrize(("flags", "counts"), COUNTS.values(), ids=COUNTS)
def test_counts(
    real_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    counts: tuple[int, int, int, int],
) -> None:
    dataset = _prepared(real_data, tmp_path / "out", flags)
    report = json.loads(capsys.readouterr().out)
    names = ("num_users", "num_items", "num_interactions", "catalogue_size")
    assert tuple(dataset.manifest[name] for name in names) == counts
    assert tuple(report[name] for name in names) == counts
    assert report["bad_rows"]["count"] == 0


def test_industrial_is_split_as_given(real_data: Path, tmp_path: Path) -> None:
    dataset = _prepared(real_data, tmp_path / "out", COUNTS["industrial"][0])
    examples = {split: dataset.examples(split) for split in ("validation", "test")}
    assert [len(found.targets) for found in examples.values()] == [4_532, 4_533]
    assert dataset.items["title"].null_count() == 0


def test_yelp_repeats_its_test_targets(real_data: Path, tmp_path: Path) -> None:
    dataset = _prepared(real_data, tmp_path / "out", COUNTS["yelp"][0])
    examples = dataset.examples("test")
    seen = [
        target in dataset.item_ids[dataset.offsets[user] : dataset.offsets[user] + length]
        for user, length, target in zip(*examples, strict=True)
    ]
    assert sum(seen) == 2_027
    assert dataset.items["title"].null_count() == 0


def test_the_order_of_ml_1m_is_that_of_lrurec(real_data: Path, tmp_path: Path) -> None:
    ours = _prepared(real_data, tmp_path / "ours", COUNTS["ml-1m"][0])
    theirs = _prepared(real_data, tmp_path / "theirs", COUNTS["ml-1m-lrurec"][0])
    movies = json.loads((real_data / "ml-1m-lrurec" / "item_ids.json").read_text())
    assert theirs.users["user_id"].to_list() == ours.users["user_id"].to_list()
    assert np.array_equal(ours.offsets, theirs.offsets)
    our_movies = ours.items["item_id"].to_numpy()[ours.item_ids - 1]
    their_movies = np.array([str(movies[item]) for item in theirs.items["item_id"]], object)[theirs.item_ids - 1]
    assert np.array_equal(our_movies, their_movies)
    report = json.loads((ours.path / "report.json").read_text())
    assert 0.48 < report["tied_share"] < 0.50  # why the tie-break matters
    # And so is the split: their lists hold out the last two.
    for split in ("validation", "test"):
        for found, expected in zip(ours.examples(split), theirs.examples(split), strict=True):
            assert len(found) == len(expected) == 6_040
        assert ours.examples(split).lengths.tolist() == theirs.examples(split).lengths.tolist()
