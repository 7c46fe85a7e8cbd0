"""Metrics by group, and among sampled items, against counts by hand and by drawing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from flax import nnx

from efficientids.data.dataset import Dataset
from efficientids.data.layout import Contents
from efficientids.data.writing import write_dataset
from efficientids.errors import UserError
from efficientids.evaluation import cli, sampled
from efficientids.evaluation.evaluate import Evaluation, Seen, evaluate
from efficientids.evaluation.groups import group_tables, popularity_classes
from efficientids.evaluation.sampled import sampled_metrics
from efficientids.evaluation.text import groups_as_text
from tests.efficientids.conftest import Trained
from tests.efficientids.test_evaluate import Table
from tests.efficientids.tiny import FROZEN

ITEMS, USERS, CUTOFFS = 40, 60, (1, 5, 10)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Item 40 is in no training history; users have a gender (some none), an age, a city, and a list."""
    rng = np.random.default_rng(4)
    chances = 1 / np.arange(1, ITEMS)
    lengths = rng.integers(4, 60, USERS)
    histories = [rng.choice(np.arange(1, ITEMS), n, p=chances / chances.sum()) for n in lengths]
    for history in histories[:5]:
        history[-1] = ITEMS
    genders = rng.choice(np.array(["F", "M", None], object), USERS)
    users = pl.DataFrame(
        {
            "user": np.arange(USERS, dtype=np.int32),
            "user_id": [f"u{u}" for u in range(USERS)],
            "gender": pl.Series(genders.tolist(), dtype=pl.String),
            "age": pl.Series([None, *range(20, 20 + USERS - 1)], dtype=pl.Int32),
            "tags": [["a"]] * USERS,
            "city": [f"c{max(0, u - 19)}" if u < 35 else "c0" for u in range(USERS)],
        }
    )
    items = pl.DataFrame(
        {"item": np.arange(1, ITEMS + 1, dtype=np.int32), "item_id": [f"i{i}" for i in range(1, ITEMS + 1)]}
    )
    contents = Contents(
        "groups", "test", items, users, np.concatenate(histories).astype(np.int32),
        np.concatenate([np.arange(n) for n in lengths]).astype(np.int64), np.cumsum([0, *lengths]),
        {"rule": "time", "tie_break": "none"}, {},
    )  # fmt: skip
    return write_dataset(tmp_path_factory.mktemp("groups") / "data", contents)


@pytest.fixture(scope="module")
def recommender() -> Table:
    rng = np.random.default_rng(5)
    return Table(rng.integers(0, 60, (ITEMS + 1, ITEMS + 1)).astype(float), max_items=60)


@pytest.fixture(scope="module")
def found(dataset: Dataset, recommender: Table) -> Evaluation:
    return evaluate(recommender, nnx.Module(), dataset, "test", seen="keep", cutoffs=CUTOFFS)


@pytest.mark.parametrize("table", ["history_length", "target_popularity", "gender", "age", "city"])
def test_groups_make_up_the_whole(dataset: Dataset, found: Evaluation, table: str) -> None:
    rows = group_tables(found, dataset, table if table in dataset.users.columns else None)[table]
    assert 1 < len(rows) <= 12
    assert sum(row["examples"] for row in rows) == found.examples
    for name in ("hr@5", "ndcg@10"):
        mean = sum(row["examples"] * row["metrics"][name] for row in rows) / found.examples
        assert mean == pytest.approx(found.metrics[name])
        for row in rows:
            assert (row["intervals"] is None) == (row["users"] < 30)
            if row["intervals"] is not None:
                low, high = row["intervals"][name]
                assert low <= row["metrics"][name] <= high
    text = groups_as_text({table: rows})
    few = [row for row in rows if row["users"] < 30]
    assert len(text.splitlines()) == len(rows) + 1 + bool(few) and all(row["group"] in text for row in rows)
    assert text.count(" –") == 2 * len(few) and ("fewer than 30 users" in text) == bool(few)
    assert max(map(len, text.splitlines())) <= 120


def test_who_is_in_which_group(dataset: Dataset, found: Evaluation) -> None:
    tables = group_tables(found, dataset, "gender")
    lengths = dataset.lengths - 1
    for row in tables["history_length"]:
        low, _, high = row["group"].removesuffix("+").partition("–")
        assert row["examples"] == ((lengths >= int(low)) & (lengths <= int(high or 10**9))).sum() > 0
    genders = dataset.users["gender"]
    expected = {"F": (genders == "F").sum(), "M": (genders == "M").sum(), "no value": genders.null_count()}
    assert {row["group"]: row["users"] for row in tables["gender"]} == expected
    ages = group_tables(found, dataset, "age")["age"]
    assert [row["users"] for row in ages] == [12, 12, 11, 12, 12, 1]
    assert [row["group"] for row in ages][::5] == ["20 to under 31.6", "no value"]
    names = [row["group"] for row in group_tables(found, dataset, "city")["city"]]
    assert names[-1] == "other values" and len(names) == 12


def test_popularity_classes(dataset: Dataset) -> None:
    """By the training part alone, most popular first."""
    names, classes = popularity_classes(dataset)
    counts = np.zeros(ITEMS + 1, int)
    for user in range(USERS):
        np.add.at(counts, dataset.item_ids[dataset.offsets[user] : dataset.offsets[user + 1] - 2], 1)
    assert names == ["head", "middle", "tail", "never in training"] and classes[ITEMS] == 3
    share, before = counts / counts.sum(), 0.0
    for item in sorted(range(1, ITEMS + 1), key=lambda i: (-counts[i], i)):
        if counts[item]:
            assert classes[item] == (0 if before < 0.5 else 1 if before < 0.8 else 2), item
        before += share[item]
    assert set(classes[1:]) == {0, 1, 2, 3}


def test_columns_that_do_not_group_are_refused(dataset: Dataset, found: Evaluation) -> None:
    with pytest.raises(UserError, match="gender, age"):
        group_tables(found, dataset, "sex")
    with pytest.raises(UserError, match="List"):
        group_tables(found, dataset, "tags")
    with pytest.raises(UserError, match=r"user_id: 60 distinct values, and the commonest has 1 users .*gender, age"):
        group_tables(found, dataset, "user_id")


@pytest.mark.parametrize("seen", ["mask", "keep"])
def test_sampled_metrics_are_the_mean_over_samples(dataset: Dataset, recommender: Table, seen: Seen) -> None:
    negatives, draws, rng = 10, 300, np.random.default_rng(6)
    exact = sampled_metrics(
        recommender, nnx.Module(), dataset, "test", negatives=negatives, seen=seen, batch_size=7, cutoffs=CUTOFFS
    )
    sums, examples = {"hr@5": 0.0, "ndcg@5": 0.0}, dataset.examples("test")
    for user, length, target in zip(*examples, strict=True):
        history = dataset.item_ids[dataset.offsets[user] : dataset.offsets[user] + length]
        if seen == "mask" and target in history:
            continue
        scores = recommender.scores_NN[history[-1]]
        unseen = np.setdiff1d(np.arange(1, ITEMS + 1), [*history, target])
        for _ in range(draws):
            drawn = rng.choice(unseen, min(negatives, len(unseen)), replace=False)
            rank = 1 + (scores[drawn] >= scores[target]).sum()
            sums["hr@5"] += rank <= 5
            sums["ndcg@5"] += (rank <= 5) / np.log2(rank + 1)
    for name, total in sums.items():
        assert exact["metrics"][name] == pytest.approx(total / draws / len(examples.users), abs=0.01), name
    assert "KDD 2020" in exact["warning"]


def test_sampling_is_refused_where_it_makes_no_sense(
    dataset: Dataset, recommender: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="at least 20"):
        sampled_metrics(recommender, nnx.Module(), dataset, "test", negatives=19)
    monkeypatch.setattr(sampled, "LARGEST_CATALOGUE", ITEMS - 1)
    with pytest.raises(UserError, match="40 items"):
        sampled_metrics(recommender, nnx.Module(), dataset, "test", negatives=20)


@pytest.mark.usefixtures("quick_compile")
def test_evaluate_keeps_groups_and_warns(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run: Path = trained(*FROZEN)
    capsys.readouterr()
    assert cli.main(["--run", str(run / "2"), "--split", "validation", "--sampled_negatives", "20"]) == 0
    text = capsys.readouterr().out
    assert "WARNING" in text and text.index("95% intervals") < text.index("WARNING")
    record = json.loads((run / "evaluation" / "validation-mask-step2.json").read_text())
    assert set(record["groups"]) == {"history_length", "target_popularity"} and record["run"] == str(run)
    assert record["sampled"]["negatives"] == 20
    assert record["sampled"]["metrics"]["hr@10"] >= record["metrics"]["hr@10"]
    rows = pl.read_parquet(run / "evaluation" / "validation-mask-step2.parquet")
    assert rows.columns == ["user", "target", "history_length", "rank"] and len(rows) == record["examples"]
    assert (rows["rank"].drop_nulls() <= 10).sum() / len(rows) == pytest.approx(record["metrics"]["hr@10"])
    # A plain evaluation takes nothing of this away.
    assert cli.main(["--run", str(run / "2"), "--split", "validation"]) == 0
    again = json.loads((run / "evaluation" / "validation-mask-step2.json").read_text())
    assert again == record
    with pytest.raises(UserError, match="--group_by nothing"):
        cli.main(["--run", str(run), "--group_by", "nothing"])
