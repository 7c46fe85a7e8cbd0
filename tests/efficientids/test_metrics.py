"""Ranks and ranking metrics against `ranx`, and at their edges."""

from __future__ import annotations

import numpy as np
import pytest

from efficientids.evaluation.metrics import MISSED, ranking_metrics, target_ranks
from efficientids.recommenders.base import Ranked

USERS, ITEMS, CUTOFFS = 50, 40, (1, 5, 10)


def top(scores_BN: np.ndarray, k: int) -> Ranked:
    """The k best of a table of scores over items 1 … N; ties in the order of the table."""
    order = np.argsort(-scores_BN, axis=1, kind="stable")[:, :k]
    return Ranked(order.astype(np.int32) + 1, np.take_along_axis(scores_BN, order, axis=1).astype(np.float32))


@pytest.fixture
def plain_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """ranx compiles with numba when it is used first: half a minute, for a second's work in plain Python."""
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")


def by_ranx(order_key_BN: np.ndarray, targets_B: np.ndarray) -> dict[str, float]:
    """The same metrics by ranx, from a table without ties."""
    ranx = pytest.importorskip("ranx", reason="ranx is not installed: pip install -r requirements-dev.txt")
    wanted = {f"u{u}": {f"i{target}": 1} for u, target in enumerate(targets_B)}
    found = {f"u{u}": {f"i{i + 1}": float(key) for i, key in enumerate(row)} for u, row in enumerate(order_key_BN)}
    names = {"hit_rate": "hr", "ndcg": "ndcg", "mrr": "mrr", "recall": "recall"}
    asked = [f"{name}@{k}" for name in names for k in CUTOFFS]
    values = ranx.evaluate(ranx.Qrels(wanted), ranx.Run(found), asked)
    return {f"{names[key.split('@')[0]]}@{key.split('@')[1]}": float(value) for key, value in values.items()}


@pytest.mark.usefixtures("plain_numba")
@pytest.mark.parametrize("levels", [None, 25], ids=["no ties", "ties, the target last in its group"])
def test_metrics_equal_ranx(levels: int | None) -> None:
    rng = np.random.default_rng(0)
    targets_B = rng.integers(1, ITEMS + 1, USERS)
    if levels is None:
        scores_BN = rng.standard_normal((USERS, ITEMS))
        order_key_BN = scores_BN
    else:
        scores_BN = rng.integers(0, levels, (USERS, ITEMS)).astype(float)
        # ranx breaks ties as it likes: it gets the order that we promise, the target after all that tie with it.
        order_key_BN = scores_BN - 1e-3 * rng.random((USERS, ITEMS))
        order_key_BN[np.arange(USERS), targets_B - 1] -= 1e-2
    ranks_B = target_ranks(top(scores_BN, max(CUTOFFS) + 1), targets_B)
    ours, theirs = ranking_metrics(ranks_B, CUTOFFS), by_ranx(order_key_BN, targets_B)
    assert 0 < ours["hr@5"] < 1
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], abs=1e-9), name
    for k in CUTOFFS:
        assert ours[f"hr@{k}"] == pytest.approx(theirs[f"recall@{k}"], abs=1e-9)


def ranked(items: list[int], scores: list[float]) -> Ranked:
    return Ranked(np.array([items], np.int32), np.array([scores], np.float32))


@pytest.mark.parametrize(
    ("items", "scores", "target", "rank"),
    [
        ([4, 2, 7], [3, 2, 1], 2, 2),
        ([4, 2, 7], [3, 3, 1], 4, 2),  # a tie counts against the model wherever the target is listed
        ([4, 2, 7], [3, 2, 1], 5, MISSED),  # not listed
        ([4, 2, 7], [3, 2, 2], 2, MISSED),  # ties with item k + 1: with how many more, the list cannot tell
        ([4, 2, 7], [3, 2, 1], 7, MISSED),  # is item k + 1 itself
        ([4, 2, 7], [1, 1, 1], 4, MISSED),
        ([4, 2, 0], [3, 2, -np.inf], 2, 2),  # fewer items left than asked for: the list hides nothing
        ([4, 2, 0], [3, 3, -np.inf], 2, 2),
        ([4, 0, 0], [3, -np.inf, -np.inf], 9, MISSED),
        ([0, 0, 0], [-np.inf] * 3, 9, MISSED),
        ([4, 2, 0], [3, 2, -np.inf], 0, MISSED),  # a row without a target, as padding has it
    ],
)
def test_rank(items: list[int], scores: list[float], target: int, rank: int) -> None:
    assert target_ranks(ranked(items, scores), np.array([target])).tolist() == [rank]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_fails_wherever_it_stands(place: int) -> None:
    scores = [3.0, 2.0, 1.0]
    scores[place] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        target_ranks(ranked([1, 2, 3], scores), np.array([1]))


def test_scores_out_of_order_fail() -> None:
    with pytest.raises(ValueError, match="descending"):
        target_ranks(ranked([1, 2, 3], [1, 2, 0]), np.array([1]))


def test_missed_targets_count_as_zero() -> None:
    metrics = ranking_metrics(np.array([1, 2, MISSED, 3]), (2,))
    expected = {"hr@2": 0.5, "ndcg@2": (1 + 1 / np.log2(3)) / 4, "mrr@2": (1 + 0.5) / 4}
    assert metrics == pytest.approx(expected)


def test_no_users_is_an_error() -> None:
    with pytest.raises(ValueError, match="no users"):
        ranking_metrics(np.array([], np.int64), (10,))
