"""`evaluate` against plain loops over the same table of scores, and what it shows to the recommender."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import polars as pl
import pytest
from flax import nnx

from efficientids.data.dataset import Dataset
from efficientids.data.layout import Contents, HeldOut
from efficientids.data.writing import write_dataset
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import evaluate
from efficientids.evaluation.metrics import MISSED
from efficientids.evaluation.samples import sample_recommendations
from efficientids.evaluation.text import as_text
from efficientids.recommenders.base import Histories, Phase, Ranked

ITEMS, CUTOFFS, MAX_ITEMS, BATCH = 12, (1, 3, 5), 4, 4
Seen = Literal["mask", "keep"]


@dataclasses.dataclass
class Table:
    """A recommender whose scores hang on the last item of a history alone: scores_NN[last, item]."""

    scores_NN: np.ndarray
    shown: list[tuple[Histories, np.ndarray | None]] = dataclasses.field(default_factory=list)
    max_items: int = MAX_ITEMS
    history: str = f"newest {MAX_ITEMS} items"
    spec: None = None

    def init(self, key: jax.Array) -> nnx.Module:
        return nnx.Module()

    def plan(self) -> Sequence[Phase]:
        return []

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        self.shown.append((histories, exclude))
        rows = np.arange(len(histories.lengths))
        scores_BN = self.scores_NN[histories.item_ids[rows, histories.lengths - 1]].copy()
        scores_BN[:, 0] = -np.inf
        if exclude is not None:
            np.put_along_axis(scores_BN, exclude, -np.inf, axis=1)
        order_Bk = np.argsort(-scores_BN, axis=1, kind="stable")[:, :k]
        best_Bk = np.take_along_axis(scores_BN, order_Bk, axis=1)
        return Ranked(np.where(np.isneginf(best_Bk), 0, order_Bk).astype(np.int32), best_Bk.astype(np.float32))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten users, one with a single item (no target) and one who has seen all items but the target; items repeat."""
    rng = np.random.default_rng(1)
    histories = [rng.integers(1, ITEMS + 1, n).tolist() for n in (3, 9, 4, 7, 3, 5, 11, 6)]
    histories += [[5], [*range(1, ITEMS + 1)]]
    lengths = [len(history) for history in histories]
    contents = Contents(
        name="repeats",
        source="test",
        items=pl.DataFrame(
            {
                "item": np.arange(1, ITEMS + 1, dtype=np.int32),
                "item_id": [f"i{i}" for i in range(1, ITEMS + 1)],
                "title": [f"Film {i}" for i in range(1, ITEMS + 1)],
            }
        ),
        users=pl.DataFrame(
            {"user": np.arange(len(lengths), dtype=np.int32), "user_id": [f"u{u}" for u in range(len(lengths))]}
        ),
        item_ids=np.concatenate(histories).astype(np.int32),
        timestamps=np.concatenate([np.arange(n) for n in lengths]).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        order={"rule": "time", "tie_break": "none"},
        filters={},
    )
    return write_dataset(tmp_path_factory.mktemp("evaluate") / "data", contents)


def table(ties: bool) -> Table:
    rng = np.random.default_rng(2)
    shape = (ITEMS + 1, ITEMS + 1)
    return Table(rng.integers(0, 12, shape).astype(float) if ties else rng.standard_normal(shape))


def by_loops(scores_NN: np.ndarray, dataset: Dataset, split: Any, seen: Seen) -> tuple[dict[str, float], float]:
    """The metrics and the share of unhittable targets, one user and one item at a time."""
    sums = dict.fromkeys([f"{m}@{k}" for k in CUTOFFS for m in ("hr", "ndcg", "mrr")], 0.0)
    listed: dict[int, set[int]] = {}
    users = unhittable = 0
    for user in range(dataset.num_users):
        whole = dataset.history(user, "all").tolist()
        if len(whole) < 3:
            continue
        users += 1
        cut = len(whole) - (1 if split == "test" else 2)
        history, target = whole[:cut], whole[cut]
        allowed = [i for i in range(1, ITEMS + 1) if seen == "keep" or i not in history]
        score = {i: scores_NN[history[-1], i] for i in allowed}
        best = sorted(allowed, key=lambda i: (-score[i], i))
        for k in CUTOFFS:
            listed.setdefault(k, set()).update(best[:k])
        if target not in allowed:
            unhittable += 1
            continue
        rank = sum(score[i] >= score[target] for i in allowed)
        for k in CUTOFFS:
            if rank <= k:
                sums[f"hr@{k}"] += 1
                sums[f"ndcg@{k}"] += 1 / np.log2(rank + 1)
                sums[f"mrr@{k}"] += 1 / rank
    metrics = {name: value / users for name, value in sums.items()}
    metrics |= {f"coverage@{k}": len(items) / ITEMS for k, items in listed.items()}
    return metrics, unhittable / users


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seen", ["mask", "keep"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_equals_plain_loops(dataset: Dataset, split: Any, seen: Seen, ties: bool) -> None:
    recommender, calls = table(ties), list[tuple[int, int]]()
    result = evaluate(
        recommender, nnx.Module(), dataset, split, seen=seen, batch_size=BATCH, cutoffs=CUTOFFS,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    metrics, unhittable = by_loops(recommender.scores_NN, dataset, split, seen)
    assert 0 < metrics["hr@5"] < 1
    assert result.metrics == pytest.approx(metrics, abs=1e-12)
    # Nine users in batches of four: the last batch has three rows of padding, which count for nothing.
    assert result.users == 9
    assert calls == [(4, 9), (8, 9), (9, 9)]
    protocol = result.protocol
    assert protocol["seen"] == seen
    assert protocol["unhittable_share"] == pytest.approx(unhittable)
    assert (unhittable > 0) == (seen == "mask")
    assert f"{protocol['unhittable_share']:.1%} of targets unhittable" in as_text(result)


def test_some_users_alone(dataset: Dataset) -> None:
    whole, calls = evaluate(table(False), nnx.Module(), dataset, "test"), list[tuple[int, int]]()
    users = whole.rows.users[[1, 4, 6, 7, 8]]
    some = evaluate(
        table(False), nnx.Module(), dataset, "test", users=users, batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    np.testing.assert_array_equal(some.rows.ranks, whole.rows.ranks[[1, 4, 6, 7, 8]])
    assert some.protocol["split"].endswith("test, 5 users drawn") and calls[-1] == (5, 5)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_recommender_is_shown_nothing_of_the_target_or_after(dataset: Dataset, split: Any) -> None:
    recommender = table(ties=False)
    evaluate(recommender, nnx.Module(), dataset, split, batch_size=BATCH, cutoffs=CUTOFFS)
    rows = iter([user for user in range(dataset.num_users) if dataset.lengths[user] >= 3])
    for histories, exclude in recommender.shown:
        assert exclude is not None
        for items, length, seen in zip(histories.item_ids, histories.lengths, exclude, strict=True):
            if not length:
                assert not items.any() and not seen.any()
                continue
            known = dataset.history(next(rows), "all")[: -1 if split == "test" else -2]
            # The newest end to look at, but the whole history to leave out.
            assert items.tolist() == known[-MAX_ITEMS:].tolist() + [0] * (MAX_ITEMS - length)
            assert sorted(seen[seen > 0]) == sorted(known)
    assert next(rows, None) is None


def test_seen_items_are_excluded_only_where_they_are_masked(dataset: Dataset) -> None:
    recommender = table(ties=False)
    evaluate(recommender, nnx.Module(), dataset, "test", seen="keep", cutoffs=CUTOFFS)
    assert [exclude for _, exclude in recommender.shown] == [None]


def test_nan_scores_fail(dataset: Dataset) -> None:
    broken = Table(np.full((ITEMS + 1, ITEMS + 1), np.nan))
    with pytest.raises(UserError, match=r"split test: .*NaN"):
        evaluate(broken, nnx.Module(), dataset, "test", seen="keep", cutoffs=CUTOFFS)


def test_a_split_without_targets_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    contents = Contents(
        "short", "test", dataset.items, dataset.users.head(1), np.array([1, 2], np.int32), np.arange(2),
        np.array([0, 2]), {"rule": "time", "tie_break": "none"}, {},
    )  # fmt: skip
    short = write_dataset(tmp_path / "short", contents)
    with pytest.raises(UserError, match="at least 3 interactions"):
        evaluate(table(ties=False), nnx.Module(), short, "test", cutoffs=CUTOFFS)


def test_a_user_with_several_examples(dataset: Dataset, tmp_path: Path) -> None:
    """A split by time: two examples of user 0, one of user 2, none of others; the history is all that came before."""
    items = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 2], np.int32)
    contents = Contents(
        "timed", "test", dataset.items, dataset.users.head(3), items, np.arange(12), np.array([0, 5, 8, 12]),
        {"rule": "time", "tie_break": "none"}, {}, {"rule": "time"},
        HeldOut(np.array([2, 3, 2]), np.array([2]), np.array([3, 4, 11])),
    )  # fmt: skip
    timed = write_dataset(tmp_path / "timed", contents)
    recommender = table(ties=False)
    found = evaluate(recommender, nnx.Module(), timed, "test", cutoffs=CUTOFFS)
    assert found.rows.users.tolist() == [0, 0, 2] and found.rows.targets.tolist() == [4, 5, 2]
    assert found.rows.history_lengths.tolist() == [3, 4, 3]
    assert (found.users, found.examples) == (2, 3)
    expected = [sum(recommender.scores_NN[last, i] >= recommender.scores_NN[last, target]
                    for i in range(1, ITEMS + 1) if i not in seen)
                for last, target, seen in ((3, 4, (1, 2, 3)), (4, 5, (1, 2, 3, 4)))]  # fmt: skip
    assert [rank if rank <= 5 else MISSED for rank in expected] + [MISSED] == found.rows.ranks.tolist()
    assert found.protocol["unhittable_share"] == pytest.approx(1 / 3)
    assert as_text(found).startswith("split by time, test: 3 examples of 2 users; ranked over")
    text = sample_recommendations(recommender, nnx.Module(), timed, users=3)
    assert text.count("user u") == 2 and text.count("    1. ") == 2


def test_samples_show_titles_and_no_empty_places(dataset: Dataset) -> None:
    """The last user has one item left to recommend: one line, not five."""
    text = sample_recommendations(table(ties=False), nnx.Module(), dataset, users=2)
    first, last = text.split("user u9 chose")
    assert first.startswith("user u0 chose … Film ") and first.count("\n") == 6
    assert last.splitlines() == [" … Film 8 · Film 9 · Film 10 · Film 11", "    1. Film 12  ← chosen next"]
