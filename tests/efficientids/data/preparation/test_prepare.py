"""Filters, order, id maps, splits: every stage on logs small enough to be done by hand, or against a plain oracle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from efficientids.data import layout
from efficientids.data.dataset import Dataset
from efficientids.data.preparation import cli
from efficientids.data.preparation.core_filter import k_core
from efficientids.data.preparation.encode import IdCodes, ordered_ids
from efficientids.data.preparation.prepare import Recipe
from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.splits import TimeSplit, parse_time
from efficientids.errors import UserError
from tests.efficientids.data.preparation.log import Log, Row, external, prepared

pytestmark = pytest.mark.usefixtures("no_page")

TIES = [("2", "100", 5, 50), ("2", "20", 5, 50), ("10", "3", 5, 9), ("2", "3", 5, 50), ("2", "7", 5, 40)]


def test_ties_break_by_number_where_all_ids_are_integers(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, Log(TIES), Recipe())
    assert external(dataset) == {"2": ["7", "3", "20", "100"], "10": ["3"]}
    assert dataset.manifest["order"] == {"rule": "time", "tie_break": "external item id, numeric"}


def test_ties_break_by_text_where_one_id_is_none(tmp_path: Path) -> None:
    rows: list[Row] = [("u2", "100", 5, 50), ("u2", "20", 5, 50), ("u10", "b3", 5, 9), ("u2", "3", 5, 50)]
    assert external(prepared(tmp_path, Log(rows), Recipe())) == {"u10": ["b3"], "u2": ["100", "20", "3"]}


def test_file_order_keeps_the_rows_as_they_stood(tmp_path: Path) -> None:
    rows: list[Row] = [("2", "100", 5, 50), ("1", "3", 5, 60), ("2", "20", 5, 10), ("1", "3", 5, 50)]
    dataset = prepared(tmp_path, Log(rows), Recipe(order="file"))
    assert external(dataset) == {"1": ["3", "3"], "2": ["100", "20"]}
    assert dataset.timestamps.tolist() == [60, 50, 50, 10]
    assert dataset.manifest["order"]["rule"] == "file"


def test_without_times_the_manifest_says_so(tmp_path: Path) -> None:
    rows: list[Row] = [("2", "b", 5, None), ("1", "a", 5, None), ("2", "a", 5, None)]
    dataset = prepared(tmp_path, Log(rows, timed=False), Recipe(order="file"))
    assert external(dataset) == {"1": ["a"], "2": ["b", "a"]}
    assert not dataset.timed and dataset.timestamps.tolist() == [0, 0, 0]
    assert dataset.manifest["timestamps"] is False


@pytest.mark.parametrize(
    ("ids", "expected", "kind"),
    [
        (["10", "9", "9", "-1"], ["-1", "9", "10"], "numeric"),
        (["7", "07", "8"], ["07", "7", "8"], "numeric"),
        (["10", "9", "9x"], ["10", "9", "9x"], "lexicographic"),
        (["1" * 19, "9"], ["1" * 19, "9"], "lexicographic"),  # too large for int64 to be sure of
        (["b", "B", "é"], ["B", "b", "é"], "lexicographic"),
    ],
)
def test_ordered_ids(ids: list[str], expected: list[str], kind: str) -> None:
    distinct, found = ordered_ids(pl.Series(ids))
    assert (distinct.to_list(), found) == (expected, kind)


def test_codes_outlive_the_chunks_they_were_made_for() -> None:
    codes, seen = IdCodes(), {}
    for start in range(0, 50, 5):
        ids = [f"id{number}" for number in range(start, start + 12)]
        for code, name in zip(codes.encode(pl.Series(ids)).tolist(), ids, strict=True):
            assert seen.setdefault(name, code) == code
    assert codes.ids().to_list() == sorted(seen, key=lambda name: seen[name])


def _core_oracle(rows: list[Row], core: int) -> list[Row]:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= core and items[row[1]] >= core]
        if len(kept) == len(rows):
            return rows
        rows = kept


@pytest.mark.parametrize("core", [0, 1, 2, 3, 4])
def test_k_core_is_taken_until_nothing_more_falls(tmp_path: Path, core: int) -> None:
    rng = np.random.default_rng(core)
    pairs = zip(rng.integers(0, 40, 150), rng.zipf(1.6, 150), strict=True)
    rows: list[Row] = [(f"u{user}", f"i{item}", 1.0, time) for time, (user, item) in enumerate(pairs)]
    left = _core_oracle(rows, core)
    dataset = prepared(tmp_path, Log(rows), Recipe(core=core))
    report = json.loads((dataset.path / "report.json").read_text())
    expected: dict[str, list[str]] = {}
    for user, item, _, _ in left:
        expected.setdefault(user, []).append(item)
    assert external(dataset) == expected
    assert report["dropped"] == ({"core": len(rows) - len(left)} if core > 1 else {})


def test_k_core_in_many_blocks_equals_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    user_rows = rng.integers(0, 6, 200)
    items = rng.integers(0, 60, int(user_rows.sum())).astype(np.uint32)
    items.tofile(tmp_path / "items")
    results = []
    for block in (1 << 20, 7):
        monkeypatch.setattr("efficientids.data.layout.user_blocks.__defaults__", (block,))
        left = k_core(tmp_path / "items", user_rows, 60, 4, tmp_path / "keep", Progress(quiet=True))
        results.append((*(part.tolist() for part in left), (tmp_path / "keep").read_bytes()))
    assert results[0] == results[1]
    assert 0 < sum(results[0][0]) < len(items)


def test_filters_are_counted_and_named(tmp_path: Path) -> None:
    rows: list[Row] = [(u, i, 4.0, 1) for u in ("1", "2") for i in ("1", "2")]
    rows += [("1", "3", 3.5, 2), ("3", "1", 4.0, 3), ("3", "2", None, 3)]
    dataset = prepared(tmp_path, Log(rows), Recipe(core=2, min_rating=4.0))
    report = json.loads((dataset.path / "report.json").read_text())
    assert report["dropped"] == {"min_rating": 2, "core": 1}
    assert (report["users"], report["items"], report["interactions"]) == (2, 2, 4)
    assert (report["num_users"], report["num_items"], report["catalogue_size"], report["num_interactions"]) == (
        2,
        2,
        2,
        4,
    )
    assert dataset.manifest["filters"] == {"min_rating": 4.0, "missing_title": None, "repeats": None, "core": 2}


def test_immediate_repeats_go_after_ordering_and_before_the_core(tmp_path: Path) -> None:
    rows: list[Row] = [("u", "a", 1, 30), ("u", "a", 1, 10), ("u", "b", 1, 40), ("u", "a", 1, 20), ("u", "a", 1, 50)]
    rows += [("v", "a", 1, 1), ("v", "b", 1, 2)]
    dataset = prepared(tmp_path, Log(rows), Recipe(repeats="drop_immediate"))
    assert external(dataset) == {"u": ["a", "b", "a"], "v": ["a", "b"]}
    assert json.loads((dataset.path / "report.json").read_text())["dropped"] == {"repeats": 2}
    assert external(prepared(tmp_path, Log(rows), Recipe(), "kept"))["u"] == ["a", "a", "a", "b", "a"]
    # Counted before the repeats go, "u" would have three rows of "a" and pass a 3-core; b's two rows fall then.
    with pytest.raises(UserError, match=r"no interaction is left of 7 \(dropped: repeats 2, core 5\)"):
        prepared(tmp_path, Log(rows), Recipe(repeats="drop_immediate", core=3), "core")


TITLES = {"a": "Apple", "b": None, "c": "Cherry", "z": "Zucchini", "y": ""}
TITLED_ROWS: list[Row] = [("u", "a", 1, 1), ("u", "b", 1, 2), ("u", "a", 1, 3), ("u", "c", 1, 4), ("v", "d", 1, 5)]


def test_items_without_a_title(tmp_path: Path) -> None:
    log = Log(TITLED_ROWS, titles=TITLES)
    kept = prepared(tmp_path, log, Recipe(), "kept")
    assert kept.items.select("item_id", "title").rows() == [("a", "Apple"), ("b", None), ("c", "Cherry"), ("d", None)]
    assert json.loads((kept.path / "report.json").read_text())["untitled_items"] == 2
    # Without b the two rows of a are next to each other: titles first, then repeats.
    recipe = Recipe(missing_title="drop", repeats="drop_immediate")
    dropped = prepared(tmp_path, log, recipe, "dropped")
    assert external(dropped) == {"u": ["a", "c"]}
    assert json.loads((dropped.path / "report.json").read_text())["dropped"] == {"missing_title": 2, "repeats": 1}
    with pytest.raises(UserError, match="error: 2 of 4 items have no title, such as b, d"):
        prepared(tmp_path, log, Recipe(missing_title="error"), "error")
    with pytest.raises(UserError, match="drop: the source has no item table"):
        prepared(tmp_path, Log(TITLED_ROWS), Recipe(missing_title="drop"), "none")


def test_the_catalogue_is_the_table_where_the_data_come_filtered(tmp_path: Path) -> None:
    filtered = Log(TITLED_ROWS, titles=TITLES, default_core=0)
    whole = prepared(tmp_path, filtered, Recipe(), "whole")
    assert whole.items["item_id"].to_list() == ["a", "b", "c", "d", "y", "z"]  # d is in the log alone
    assert (whole.num_items, whole.catalogue_size, whole.manifest["catalogue"]) == (4, 6, "table")
    assert prepared(tmp_path, filtered, Recipe(core=2), "core").items["item_id"].to_list() == ["a"]
    told = prepared(tmp_path, filtered, Recipe(catalogue="interactions"), "told")
    assert told.items["item_id"].to_list() == ["a", "b", "c", "d"]
    titled = prepared(tmp_path, filtered, Recipe(missing_title="drop"), "titled")
    assert titled.items["item_id"].to_list() == ["a", "c"]  # a filter was asked for: items with an interaction
    assert (
        prepared(tmp_path, Log(TITLED_ROWS, default_core=0), Recipe(), "bare").manifest["catalogue"] == "interactions"
    )
    with pytest.raises(UserError, match="--catalogue table: the source has no item table"):
        prepared(tmp_path, Log(TITLED_ROWS), Recipe(catalogue="table"), "none")


SPLIT_ROWS: list[Row] = [("u", i, 1, t) for t, i in enumerate("abcdef")] + [
    ("v", i, 1, t + 4) for t, i in enumerate("ab")
]
SPLIT_ROWS += [("w", "a", 1, 0), ("w", "b", 1, 1)]


def test_split_by_time(tmp_path: Path) -> None:
    recipe = Recipe(split="time", time_split=TimeSplit(3, 5))
    dataset = prepared(tmp_path, Log(SPLIT_ROWS), recipe)
    assert dataset.train_lengths.tolist() == [3, 0, 2]
    validation, test = dataset.examples("validation"), dataset.examples("test")
    # v's first row validates by its time, but nothing comes before it.
    assert (validation.users.tolist(), validation.lengths.tolist(), validation.targets.tolist()) == (
        [0, 0],
        [3, 4],
        [4, 5],
    )
    assert (test.users.tolist(), test.lengths.tolist(), test.targets.tolist()) == ([0, 1], [5, 1], [6, 2])
    everything = dataset.examples("all")
    assert everything.lengths.tolist() == [6, 2, 2] and everything.targets.tolist() == [0, 0, 0]
    assert dataset.train_only_users == 1
    assert dataset.manifest["split"] == {
        "rule": "time",
        "validation_start": 3,
        "test_start": 5,
        "without_history": {"validation": 1, "test": 0},
    }
    split = json.loads((dataset.path / "report.json").read_text())["split"]
    assert (split["train"], split["validation"], split["test"], split["test_users"]) == (5, 2, 2, 2)


def test_shares_of_a_split_by_time_keep_equal_times_together(tmp_path: Path) -> None:
    rows: list[Row] = [("u", f"i{n:02d}", 1, [0, 1, 2, 3, 4, 5, 6, 7, 7, 7][n]) for n in range(10)]
    shares = Recipe(split="time", time_split=TimeSplit(validation_share=0.1, test_share=0.1))
    with pytest.raises(UserError, match="validation would start at 1970-01-01T00:00:07, test at 1970-01-01T00:00:07"):
        prepared(tmp_path, Log(rows), shares, "too few")
    shares = Recipe(split="time", time_split=TimeSplit(validation_share=0.3, test_share=0.1))
    dataset = prepared(tmp_path, Log(rows), shares)
    assert dataset.train_lengths.tolist() == [6]
    assert dataset.examples("validation").lengths.tolist() == [6]
    assert dataset.examples("test").lengths.tolist() == [7, 8, 9]
    with pytest.raises(UserError, match="leaves no interaction to train on"):
        prepared(tmp_path, Log(rows), Recipe(split="time", time_split=TimeSplit(-5, 5)), "no train")


def test_given_split(tmp_path: Path) -> None:
    rows: list[Row] = [("u", "a", 1, 9), ("u", "b", 1, 3), ("u", "c", 1, 1), ("u", "d", 1, 2), ("v", "a", 1, 5)]
    log = Log(rows, split=[0, 0, 2, 1, 1])
    dataset = prepared(tmp_path, log, Recipe(split="given"))
    # By split first, then by time: what trains stays before what is held out.
    assert external(dataset) == {"u": ["b", "a", "d", "c"], "v": ["a"]}
    assert dataset.train_lengths.tolist() == [2, 0]
    assert dataset.examples("validation").targets.tolist() == [4]
    assert dataset.examples("test").lengths.tolist() == [3]
    assert dataset.manifest["split"]["without_history"] == {"validation": 1, "test": 0}
    by_time = prepared(tmp_path, log, Recipe(split="time", time_split=TimeSplit(3, 6)), "time")
    assert external(by_time)["u"] == ["c", "d", "b", "a"]
    last_out = prepared(tmp_path, log, Recipe(), "last out")
    assert external(last_out)["u"] == ["c", "d", "b", "a"] and last_out.held_out is None


def test_the_size_of_chunks_and_blocks_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows: list[Row] = [
        (f"u{u}", f"i{i}", float(r), int(t))
        for u, i, r, t in zip(*(rng.integers(0, top, 300) for top in (30, 40, 6, 20)), strict=True)
    ]
    recipe = Recipe(core=3, min_rating=2.0, repeats="drop_immediate", split="time")
    manifests = []
    for chunk, block in ((1000, 1 << 21), (7, 50), (64, 13)):
        monkeypatch.setattr("efficientids.data.preparation.ordering._ROWS", block)
        monkeypatch.setattr("efficientids.data.layout.user_blocks.__defaults__", (block,))
        log = Log(rows, titles={f"i{i}": f"Title {i}" for i in range(40)}, chunk=chunk)
        manifests.append((prepared(tmp_path, log, recipe, f"{chunk}").path / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1] == manifests[2]


def test_nothing_left(tmp_path: Path) -> None:
    log = Log([("1", "1", 3.0, 1), ("1", "2", 3.0, 2)])
    with pytest.raises(UserError, match=r"no interaction is left of 2 \(dropped: core 2\); lower core"):
        prepared(tmp_path, log, Recipe(core=5))
    with pytest.raises(UserError, match="dropped: min_rating 2"):
        prepared(tmp_path, log, Recipe(min_rating=4.0))
    with pytest.raises(UserError, match="no row of the source has a rating"):
        prepared(tmp_path, Log([("1", "1", None, 1)]), Recipe(min_rating=4.0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("978307200", 978307200), ("2001-01-01", 978307200), ("2001-01-01T01:00:00+01:00", 978307200), ("-5", -5)],
)
def test_times_of_a_split(text: str, seconds: int) -> None:
    assert parse_time("test_start", text) == seconds


def test_no_time() -> None:
    with pytest.raises(UserError, match="--test_start: 'May' is no time"):
        parse_time("test_start", "May")


def test_examples_of_leave_one_out(dataset: Dataset) -> None:
    for split in ("validation", "test"):
        examples = dataset.examples(split)
        held = np.flatnonzero(dataset.targets(split))
        assert examples.users.tolist() == held.tolist()
        assert examples.targets.tolist() == dataset.targets(split)[held].tolist()
        assert examples.lengths.tolist() == dataset.split_lengths(split)[held].tolist()
        assert (examples.users.dtype, examples.lengths.dtype, examples.targets.dtype) == (np.int32, np.int64, np.int32)
    assert dataset.train_lengths.tolist() == dataset.split_lengths("train").tolist()
    with pytest.raises(UserError, match="'train' has no examples"):
        dataset.examples("train")


def test_the_order_within_a_second_is_kept(tmp_path: Path) -> None:
    """Logs in milliseconds: item b came before item a, and both in the same second."""
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp\nu,a,978300760900\nu,b,978300760100\n")
    assert cli.main(["--source", "table", "--input", str(log), "--core", "0", "--output", str(tmp_path / "d")]) == 0
    dataset = Dataset.open(tmp_path / "d")
    assert [dataset.items["item_id"][int(i) - 1] for i in dataset.item_ids] == ["b", "a"]
    assert dataset.timestamps.tolist() == [978300760, 978300760]


def test_leave_one_out_of_data_with_a_split_column_goes_by_time(tmp_path: Path) -> None:
    """Asked for by name, it takes the last item, whatever the split column says."""
    log = Log([("u", "a", 5, 1), ("u", "b", 5, 2), ("u", "c", 5, 3), ("u", "d", 5, 4)], split=[2, 0, 1, 0])
    dataset = prepared(tmp_path, log, Recipe(split=layout.LEAVE_ONE_OUT))
    assert external(dataset) == {"u": ["a", "b", "c", "d"]}
    assert "first" not in dataset.manifest["order"]
    given = prepared(tmp_path / "given", log, Recipe(split=layout.GIVEN))
    assert external(given) == {"u": ["b", "d", "c", "a"]}
    report = json.loads((given.path / "report.json").read_text())
    assert report["misplaced_targets"] == {"validation": 1, "test": 1}


def test_targets_that_never_train_are_counted(tmp_path: Path) -> None:
    rows: list[Row] = [("u", "a", 5, 1), ("u", "b", 5, 2), ("u", "new", 5, 3), ("v", "a", 5, 1), ("v", "b", 5, 2)]
    dataset = prepared(tmp_path, Log([*rows, ("v", "a", 5, 3)]), Recipe())
    report = json.loads((dataset.path / "report.json").read_text())
    # u: b validates, new tests; v: b validates, a tests; a alone is trained on.
    assert report["cold_targets"] == {"validation": 2, "test": 1}
    assert report["misplaced_targets"] == {"validation": 0, "test": 0}


def test_an_item_table_of_another_log_is_refused_and_its_reach_is_told(tmp_path: Path) -> None:
    rows: list[Row] = [("u", "a", 5, 1), ("u", "b", 5, 2), ("v", "a", 5, 3)]
    with pytest.raises(UserError, match="none of the item table's 2 ids is in the log, whose items are 'a', 'b'"):
        prepared(tmp_path / "other", Log(rows, titles={"x": "X", "y": "Y"}), Recipe())
    dataset = prepared(tmp_path / "own", Log(rows, titles={"a": "A", "z": "Z", "y": "Y"}), Recipe())
    report = json.loads((dataset.path / "report.json").read_text())
    assert report["item_table"] == {"items": 3, "known": 1}


def test_ids_in_other_scripts_digits_are_text(tmp_path: Path) -> None:
    assert ordered_ids(pl.Series(["٣", "10", "9"]))[1] == "lexicographic"
