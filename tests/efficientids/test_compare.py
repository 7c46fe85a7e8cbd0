"""The bootstrap over users, and comparisons whose answer is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientids.errors import UserError
from efficientids.evaluation import compare_cli, of_run
from efficientids.evaluation.bootstrap import holm, intervals, resampled_means, two_sided_p, wilson
from efficientids.evaluation.compare import Entry, as_text, compare
from efficientids.evaluation.evaluate import Evaluation, Rows
from efficientids.evaluation.metrics import MISSED, ranking_metrics
from efficientids.evaluation.records import load_evaluation, save_evaluation
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import FROZEN, best_step

CUTOFFS = (1, 10)
USERS = 500
PROTOCOL: dict[str, Any] = {
    "split": "leave-one-out, test", "candidates": "full catalogue, 30 items", "seen": "mask", "unhittable_share": 0.0,
    "ties": "against the model", "order": {"rule": "time"}, "unit": "fractions", "history": "newest 5 items",
}  # fmt: skip


def evaluation(ranks: np.ndarray, users: np.ndarray | None = None, **changes: Any) -> Evaluation:
    number = np.arange(len(ranks), dtype=np.int32)
    rows = Rows(number if users is None else users, number + 1, number % 7 + 1, ranks)
    coverage = {f"coverage@{k}": 0.5 for k in CUTOFFS}
    return dataclasses.replace(Evaluation(rows, coverage, PROTOCOL, "f" * 64, CUTOFFS), **changes)


def ranks_of(seed: int, share: float, users: int = USERS) -> np.ndarray:
    """Ranks of which `share` are up to 10, the others missed."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(users) < share, rng.integers(1, 11, users), MISSED)


def entries(*evaluations: Evaluation) -> list[Entry]:
    return [Entry(f"run{index}", index, one) for index, one in enumerate(evaluations)]


def test_resampled_means_have_the_bootstraps_mean_and_deviation() -> None:
    """Against the law of drawing users with replacement, one user a draw."""
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 40, 120))
    values = rng.random((120, 2)).round(1)
    means = resampled_means(values, users, resamples=20_000)
    present = np.unique(users)
    direct = []
    for _ in range(4_000):
        drawn = rng.choice(present, len(present))
        direct.append(np.concatenate([values[users == user] for user in drawn]).mean(axis=0))
    assert means.shape == (20_000, 2)
    assert means.mean(axis=0) == pytest.approx(np.mean(direct, axis=0), abs=2e-3)
    assert means.std(axis=0) == pytest.approx(np.std(direct, axis=0), rel=0.05)
    assert np.array_equal(means, resampled_means(values, users, resamples=20_000))


def test_chunks_of_resamples_cover_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientids.evaluation.bootstrap._DRAWS", 10)
    values = np.arange(6.0)[:, None]
    means = resampled_means(values, np.arange(6), resamples=101)
    assert means.shape == (101, 1) and len(np.unique(means)) > 10
    with pytest.raises(ValueError, match="no users"):
        resampled_means(values[:0], np.arange(0))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """300 samples of 200 users from a known population: 95% of the intervals hold its mean, give or take."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        hits = (rng.random((200, 1)) < 0.3).astype(float)
        low, high = intervals(resampled_means(hits, np.arange(200), resamples=500))[0]
        held += low <= 0.3 <= high
    assert 0.91 <= held / 300 <= 0.985


def test_wilson() -> None:
    """Wilson's interval of 0 of 100, and of 10 of 40, from his formula's usual tables."""
    assert wilson(0.0, 100) == pytest.approx((0, 0.03699), abs=1e-5)
    assert wilson(1.0, 100) == pytest.approx((0.96301, 1), abs=1e-5)
    assert wilson(0.25, 40) == pytest.approx((0.1419, 0.4019), abs=1e-4)


def test_no_hit_at_all_is_not_certain() -> None:
    """200 examples of 100 users: it is the users who are evidence."""
    users = np.repeat(np.arange(100, dtype=np.int32), 2)
    none = evaluation(np.full(200, MISSED), users=users).intervals
    assert none["hr@10"] == none["ndcg@10"] == wilson(0, 100)
    every = evaluation(np.ones(200, np.int64), users=users).intervals
    assert every["hr@1"] == every["mrr@10"] == wilson(1, 100)


def test_two_sided_p() -> None:
    means = np.array([[1.0, -1.0, 0.0], [2.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    assert two_sided_p(means) == pytest.approx([0.5, 1.0, 1.0])


def test_holm() -> None:
    """The smallest of three counts three times, the next twice; never less than a smaller one's."""
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])


def test_a_run_does_not_differ_from_itself() -> None:
    ranks = ranks_of(0, 0.4)
    result = compare(entries(evaluation(ranks), evaluation(ranks.copy())))
    for row in result["against_first"][0]["metrics"].values():
        assert row["difference"] == 0 and row["interval"] == [0, 0] and row["p"] == row["p_holm"] == 1
        assert (row["won"], row["lost"], row["tied"]) == (0, 0, 1)
    assert result["against_first"][0]["overlap"]["hr@10"] == 1


def test_a_planted_difference_is_found_where_it_is() -> None:
    """50 of 500 users are hit by the second run alone, first of all; the third run is the first with noise."""
    first = ranks_of(0, 0.3)
    better = first.copy()
    better[np.flatnonzero(first == MISSED)[:50]] = 1
    noisy, rng = first.copy(), np.random.default_rng(5)
    noisy[rng.permutation(USERS)[:40]] = first[rng.permutation(USERS)[:40]]
    result = compare(entries(evaluation(first), evaluation(better), evaluation(noisy)))
    row = result["against_first"][0]["metrics"]["hr@10"]
    assert row["difference"] == pytest.approx(0.1) and row["p"] < 0.001
    assert row["interval"][0] < 0.1 < row["interval"][1] and row["interval"][0] > 0.07
    assert (row["won"], row["lost"]) == pytest.approx((0.1, 0))
    hits = float((first <= 10).sum())
    assert result["against_first"][0]["overlap"]["hr@10"] == pytest.approx(hits / (hits + 50))
    other = result["against_first"][1]["metrics"]["hr@10"]
    assert other["p"] > 0.01 and other["p_holm"] >= other["p"] and other["won"] > 0 and other["lost"] > 0
    assert row["p_holm"] == pytest.approx(2 * row["p"])
    text = as_text(result, entries(evaluation(first), evaluation(better), evaluation(noisy)))
    assert "+0.1000" in text and "Holm" in text and "<0.001" in text


def test_users_with_many_examples_count_once_as_evidence() -> None:
    """100 users with 5 equal examples each: the interval is that of 100 users, √5 wider than of 500."""
    one = ranks_of(3, 0.3, 100)
    repeated = evaluation(np.repeat(one, 5), users=np.repeat(np.arange(100), 5))
    single, independent = evaluation(one), evaluation(np.repeat(one, 5))
    low, high = repeated.intervals["hr@10"]
    assert repeated.users == 100 and repeated.examples == 500
    assert (low, high) == single.intervals["hr@10"]
    narrow = independent.intervals["hr@10"]
    assert (high - low) / (narrow[1] - narrow[0]) == pytest.approx(5**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": {**PROTOCOL, "seen": "keep"}}, "seen mask ≠ keep"),
        ({"protocol": {**PROTOCOL, "split": "split by time, test"}}, "split leave-one-out, test ≠ split by time"),
        ({"fingerprint": "a" * 64}, "data set"),
        ({"cutoffs": (1, 5)}, "cutoffs"),
    ],
)
def test_what_was_measured_differently_is_refused(changes: dict[str, Any], named: str) -> None:
    ranks = ranks_of(0, 0.4)
    with pytest.raises(UserError, match=named):
        compare(entries(evaluation(ranks), evaluation(ranks, **changes)))


def test_other_examples_are_refused_and_another_history_is_not() -> None:
    ranks = ranks_of(0, 0.4)
    with pytest.raises(UserError, match="other examples"):
        compare(entries(evaluation(ranks), evaluation(ranks, users=np.arange(USERS) + 1)))
    same = entries(evaluation(ranks), evaluation(ranks))
    line, *table = as_text(compare(same), same).splitlines()
    assert "order of interactions: rule time" in line and "history the model looks at: newest 5 items" in line
    assert not any("newest" in row for row in table)
    other = entries(evaluation(ranks), evaluation(ranks, protocol={**PROTOCOL, "history": "newest 9 items"}))
    line, _, head, first, second, *_ = as_text(compare(other), other).splitlines()
    assert "newest" not in line and head.endswith("  history")
    assert first.endswith("  newest 5 items") and second.endswith("  newest 9 items")


def test_records_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    stored = evaluation(ranks_of(0, 0.4))
    path = save_evaluation(tmp_path, 7, "test", stored, {"groups": {}})
    assert path == tmp_path / "evaluation" / "test-mask-step7.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["test-mask-step7.json", "test-mask-step7.parquet"]
    record = json.loads(path.read_text())
    assert record["metrics"] == stored.metrics and record["step"] == 7 and record["groups"] == {}
    found = load_evaluation(tmp_path, 7, "test", "mask", stored.fingerprint)
    assert found is not None and found.metrics == stored.metrics and found.protocol == stored.protocol
    for one, other in zip(found.rows, stored.rows, strict=True):
        assert np.array_equal(one, other)
    assert load_evaluation(tmp_path, 7, "test", "mask", "a" * 64) is None
    assert load_evaluation(tmp_path, 8, "test", "mask", stored.fingerprint) is None
    # As a process leaves it that is killed between the two files.
    other = save_evaluation(tmp_path, 9, "test", evaluation(ranks_of(1, 0.4)), {})
    other.with_suffix(".parquet").replace(path.with_suffix(".parquet"))
    assert load_evaluation(tmp_path, 7, "test", "mask", stored.fingerprint) is None
    assert ranking_metrics(stored.rows.ranks, CUTOFFS).items() <= stored.metrics.items()


def test_a_poorer_record_keeps_what_the_richer_had(tmp_path: Path) -> None:
    stored = evaluation(ranks_of(0, 0.4))
    rich = {"sampled": {"negatives": 100}, "groups": {"gender": [1], "history_length": [2]}, "run": "before"}
    path = save_evaluation(tmp_path, 7, "test", stored, rich)
    save_evaluation(tmp_path, 7, "test", stored, {"groups": {"history_length": [3]}, "run": "now"})
    record = json.loads(path.read_text())
    assert record["sampled"] == {"negatives": 100} and record["run"] == "now"
    assert record["groups"] == {"gender": [1], "history_length": [3]}
    # Of another data set or another model nothing is kept, and a damaged record is replaced.
    for changed in (evaluation(ranks_of(0, 0.4), fingerprint="a" * 64), evaluation(ranks_of(1, 0.3))):
        save_evaluation(tmp_path, 7, "test", stored, rich)
        save_evaluation(tmp_path, 7, "test", changed, {"groups": {}})
        assert "sampled" not in (record := json.loads(path.read_text())) and record["groups"] == {}
    path.write_text("[1")
    save_evaluation(tmp_path, 7, "test", stored, {})
    assert json.loads(path.read_text())["metrics"] == stored.metrics


@pytest.mark.usefixtures("quick_compile")
def test_compare_command(trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints of one run; the second time, nothing is ranked again."""
    run = trained(*FROZEN)
    capsys.readouterr()
    assert compare_cli.main([str(run / "2"), str(run / "4"), "--json", "--seen", "keep"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in result["runs"]] == [2, 4] and len(result["against_first"]) == 1
    difference = result["runs"][1]["metrics"]["ndcg@10"] - result["runs"][0]["metrics"]["ndcg@10"]
    assert result["against_first"][0]["metrics"]["ndcg@10"]["difference"] == pytest.approx(difference)
    monkeypatch.setattr(of_run, "evaluate", lambda *_, **__: pytest.fail("ranked again"))
    assert compare_cli.main([str(run), str(run / "4"), "--seen", "keep"]) == 0
    text = capsys.readouterr()
    assert f"{best_step(run)}" in text.out and "seen items: keep" in text.out and not text.err
    with pytest.raises(UserError, match=f"two or more run folders, and only {run} is given"):
        compare_cli.main([str(run)])
    with pytest.raises(UserError, match="two or more run folders, and none is given"):
        compare_cli.main([])
    with pytest.raises(UserError, match="--batch_size 0: at least 1"):
        compare_cli.main([str(run), str(run / "4"), "--batch_size", "0"])


@pytest.mark.usefixtures("quick_compile")
def test_runs_on_other_data_are_refused(trained: Trained, copy_of: Any) -> None:
    run = trained(*FROZEN)
    copy = copy_of(run)
    described = json.loads((copy / "model.json").read_text())
    described["dataset"]["fingerprint"] = "0" * 64
    (copy / "model.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="other data sets"):
        compare_cli.main([str(run), str(copy)])
