"""The oracle against a second, plain implementation and against sampled people."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.generated import GeneratedData, generate, sample_histories
from efficientids.data.process import NextItemProcess, Oracle, has_oracle
from efficientids.errors import UserError

ITEMS, GENRES = 5, 2


@pytest.fixture(scope="module")
def tiny() -> NextItemProcess:
    """Five films, two genres; film 3 belongs to both, film 5 alone with it to the second: it is soon used up."""
    return NextItemProcess(
        successors_MS=np.array([[0, 0], [2, 3], [3, 1], [1, 5], [5, 1], [4, 3]], np.int32),
        successor_weights_S=np.array([0.75, 0.25]),
        popularity_M=np.array([0, 5.0, 4.0, 3.0, 2.0, 1.0]),
        genres_GM=np.array([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 0, 1]], bool),
        genre_prior_G=np.array([0.7, 0.3]),
        follow=0.6,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[GeneratedData, Dataset]:
    data = generate(3, num_users=150, num_items=60, shortest=3, longest=12)
    return data, data.write(tmp_path_factory.mktemp("generated") / "small")


def _plain(process: NextItemProcess, history: list[int], genre: int) -> dict[int, float]:
    """P(next | history, genre), said in the plainest way."""
    unseen = [item for item in range(1, ITEMS + 1) if item not in history]
    chances = dict.fromkeys(range(ITEMS + 1), 0.0)
    weights: dict[int, float] = {}
    if history:
        successors = zip(process.successors_MS[history[-1]], process.successor_weights_S, strict=True)
        weights = {int(item): float(weight) for item, weight in successors if item in unseen}
    for item, weight in weights.items():
        chances[item] += process.follow * weight / sum(weights.values())
    pool = [item for item in unseen if process.genres_GM[genre, item]] or unseen
    rest = 1 - process.follow if weights else 1.0
    for item in pool:
        chances[item] += rest * process.popularity_M[item] / sum(process.popularity_M[other] for other in pool)
    return chances


def _bayes(process: NextItemProcess, history: list[int]) -> np.ndarray:
    """P(next | history) = Σ_g P(g) P(history, next | g) / Σ_g P(g) P(history | g)."""
    joint, evidence = np.zeros(ITEMS + 1), 0.0
    for genre in range(GENRES):
        chance = process.genre_prior_G[genre]
        for position, item in enumerate(history):
            chance *= _plain(process, history[:position], genre)[item]
        evidence += chance
        joint += chance * np.array(list(_plain(process, history, genre).values()))
    return joint / evidence if evidence else np.full(ITEMS + 1, np.nan)


def test_scores_equal_brute_force_bayes(tiny: NextItemProcess, small: tuple[GeneratedData, Dataset]) -> None:
    oracle, checked = Oracle(small[1], tiny), 0
    for length in range(ITEMS):  # the whole catalogue seen: nothing can come next
        for history in itertools.permutations(range(1, ITEMS + 1), length):
            expected = _bayes(tiny, list(history))
            padded = np.array([[*history, *[0] * (ITEMS - length)]])
            if np.isnan(expected).any():
                with pytest.raises(UserError, match="no genre gives it"):
                    oracle.scores(padded, np.array([length]))
                continue
            found = oracle.scores(padded, np.array([length]))[0]
            np.testing.assert_allclose(found, expected, atol=1e-12)
            checked += 1
    assert checked == 137  # of 206 histories; the others no genre gives


def test_scores_match_sampled_people(tiny: NextItemProcess, small: tuple[GeneratedData, Dataset]) -> None:
    rng, people = np.random.default_rng(0), 200_000
    favourite = rng.choice(GENRES, people, p=tiny.genre_prior_G)
    histories = sample_histories(rng, tiny, np.full(people, 3), favourite)
    for pair in itertools.permutations(range(1, ITEMS + 1), 2):
        third = histories[(histories[:, :2] == pair).all(1), 2]
        if len(third) < 1_000:
            continue
        expected = Oracle(small[1], tiny).scores(np.array([pair]), np.array([2]))[0]
        found = np.bincount(third, minlength=ITEMS + 1) / len(third)
        noise = np.sqrt(expected * (1 - expected) / len(third))
        assert (np.abs(found - expected) <= 5 * noise + 1e-12).all(), (pair, found, expected)


def test_scores_sum_to_one_over_unseen_items(small: tuple[GeneratedData, Dataset]) -> None:
    dataset = small[1]
    oracle = Oracle.open(dataset)
    lengths = dataset.split_lengths("test")
    histories = np.zeros((dataset.num_users, lengths.max()), np.int32)
    for user in range(dataset.num_users):
        histories[user, : lengths[user]] = dataset.history(user, "test")
    scores = oracle.scores(histories, lengths)
    assert scores.shape == (150, 61)
    np.testing.assert_allclose(scores.sum(1), 1.0, atol=1e-12)
    for user in range(dataset.num_users):
        assert not scores[user, dataset.history(user, "test")].any()
    assert not scores[:, 0].any()
    assert (scores[np.arange(150), dataset.targets("test")] > 0).all()


def test_the_written_process_is_the_generating_one(small: tuple[GeneratedData, Dataset]) -> None:
    data, dataset = small
    assert has_oracle(dataset)
    read = Oracle.open(dataset).process
    for field in dataclasses.fields(NextItemProcess):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(data.process, field.name))


def test_best_hit_rate_expected_and_realised_agree(small: tuple[GeneratedData, Dataset]) -> None:
    oracle = Oracle.open(small[1])
    rates = [oracle.best_hit_rate("test", k) for k in (1, 5, 10, 60)]
    for rate in rates:
        assert rate.users == 150
        assert abs(rate.expected - rate.realised) < 4 * np.sqrt(0.25 / 150)
    assert [rate.expected for rate in rates] == sorted(rate.expected for rate in rates)
    assert rates[-1].realised == pytest.approx(rates[-1].expected) == 1.0


def test_impossible_histories_are_refused(small: tuple[GeneratedData, Dataset]) -> None:
    oracle = Oracle.open(small[1])
    good = small[1].history(0, "all")[:3].tolist()
    for bad, position in (([*good[:2], good[0]], 2), ([61, 1, 2], 0), ([good[0], 0, 2], 1), ([good[0], -1, 2], 1)):
        with pytest.raises(UserError, match=f"row 1, position {position}: item {bad[position]} cannot come there"):
            oracle.scores(np.array([good, bad]), np.array([3, 3]))


def test_no_oracle_without_a_process(dataset: Dataset) -> None:
    assert not has_oracle(dataset)
    with pytest.raises(UserError, match=r"no process\.npz, so the best possible hit rate is unknown"):
        Oracle.open(dataset)


def test_generation_follows_its_seed(tmp_path: Path) -> None:
    first, same, other = (
        generate(seed, num_users=20, num_items=60).write(tmp_path / name).fingerprint
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == same != other


def test_generated_histories_never_repeat_and_keep_their_lengths(small: tuple[GeneratedData, Dataset]) -> None:
    dataset = small[1]
    assert dataset.lengths.min() >= 3 and dataset.lengths.max() <= 12
    for user in range(dataset.num_users):
        history, times = dataset.history(user, "all"), dataset.history_times(user, "all")
        assert len(set(history.tolist())) == len(history)
        assert (np.diff(times) > 0).all()
    assert dataset.items["title"].n_unique() == 60
    assert dataset.items["genres"].list.len().min() >= 1


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"num_items": 40}, "num_items: 40"), ({"num_items": 2000}, "num_items"), ({"shortest": 0}, "shortest")],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        generate(0, **wrong)


def test_the_default_needs_more_than_the_last_item(tmp_path: Path) -> None:
    """Counting which item follows which is well under the best, and yet more than 60% of it."""
    dataset = generate().write(tmp_path / "default")
    best = Oracle.open(dataset).best_hit_rate("test", 10)
    assert 0.6 < best.expected < 0.9
    assert abs(best.expected - best.realised) < 0.02
    size = dataset.catalogue_size + 1
    counts, hits, targets = np.zeros((size, size)), 0, dataset.targets("test")
    for user in range(dataset.num_users):
        history = dataset.history(user, "train")
        np.add.at(counts, (history[:-1], history[1:]), 1)
    for user in range(dataset.num_users):
        history = dataset.history(user, "test")
        scores = counts[history[-1]].copy()
        scores[history] = -1
        hits += int((scores >= scores[targets[user]]).sum() <= 10)
    assert 0.6 < hits / dataset.num_users / best.realised < 0.85
