"""`core.clustering`: assignments from files and popularity, and the arrays made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from core.clustering import by_popularity, default_num_clusters, from_assignment, load_clustering


def test_from_assignment() -> None:
    clusters = from_assignment(np.array([1, 0, 1, 2, 1]), 3)
    assert clusters.cluster_of_item_N1.tolist() == [-1, 1, 0, 1, 2, 1]
    assert clusters.slot_of_item_N1.tolist() == [0, 0, 0, 1, 0, 2]
    assert clusters.members_CM.tolist() == [[2, 0, 0], [1, 3, 5], [4, 0, 0]]
    assert clusters.sizes_C.tolist() == [1, 3, 1]
    assert (clusters.num_clusters, clusters.num_items, clusters.padding_factor) == (3, 5, 9 / 5)
    assert {array.dtype.name for array in jax.tree.leaves(clusters)} == {"int32"}


@pytest.mark.parametrize("seed", range(3))
def test_every_item_has_one_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assignment = np.concatenate([rng.permutation(7), rng.integers(0, 7, 30)])
    clusters = from_assignment(assignment, 7)
    items = np.arange(1, 38)
    places = clusters.members_CM[clusters.cluster_of_item_N1[1:], clusters.slot_of_item_N1[1:]]
    np.testing.assert_array_equal(places, items)
    assert np.count_nonzero(clusters.members_CM) == clusters.sizes_C.sum() == 37
    np.testing.assert_array_equal(np.count_nonzero(clusters.members_CM, axis=1), clusters.sizes_C)


@pytest.mark.parametrize(
    ("assignment", "num_clusters", "message"),
    [
        ([0, 1, 3], 3, "item 3 is in cluster 3; clusters are 0 to 2"),
        ([0, -1, 1], 2, "item 2 is in cluster -1"),
        ([0, 2, 2], 3, "1 of 3 clusters have no item, the first is 1"),
        ([0.0, 1.0], 2, "expected whole numbers"),
        ([], 1, "expected whole numbers"),
        ([[0, 1]], 2, r"found int64 \(1, 2\)"),
    ],
)
def test_bad_assignments(assignment: Any, num_clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_assignment(np.asarray(assignment), num_clusters)


@pytest.mark.parametrize(("num_items", "want"), [(1, 1), (4, 2), (5, 3), (9, 3), (3416, 59), (100_000, 317)])
def test_default_num_clusters(num_items: int, want: int) -> None:
    assert default_num_clusters(num_items) == want


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", np.array([2, 0, 1])),
        ("a.npy", np.array([-1, 2, 0, 1], np.int64)),
        ("a.json", [2, 0, 1]),
        ("a.json", [-1, 2, 0, 1]),
        ("a.json", {"3": 1, "1": 2, "2": 0}),
    ],
)
def test_load_clustering(tmp_path: Path, name: str, content: Any) -> None:
    path = tmp_path / name
    np.save(path, content) if name.endswith("npy") else path.write_text(json.dumps(content))
    got = load_clustering(path, 3)
    assert got.tolist() == [2, 0, 1] and got.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[0, 1", "not JSON"),
        ("a.json", "[0, 1]", "2 entries; the data set has 3 items"),
        ("a.json", "[0, 1, 2, 3]", "entry 0 would be the padding item, whose cluster must be -1; found 0"),
        ("a.json", "[0, 1.5, 1]", "entry 1 has cluster 1.5; expected a whole number"),
        ("a.json", "[0, true, 1]", "entry 1 has cluster True"),
        ("a.json", "3", "found int"),
        ("a.json", '{"1": 0, "2": 0}', r"item 3 has no cluster \(1 missing\)"),
        ("a.json", '{"1": 0, "2": 0, "4": 1}', "item '4' is not one of 1 to 3"),
        ("a.json", '{"1": 0, "2": 0, "x": 1}', "item 'x' is not one of 1 to 3"),
        ("a.json", '{"1": 0, "2": 0, "2": 1}', "item 2 is given twice"),
        ("a.json", '{"1": 0, "2": "a", "3": 1}', "item '2' has cluster 'a'"),
        ("a.npy", "not numpy", "not a NumPy array"),
        ("a.txt", "0 1 2", r"a .npy or a .json file; found '.txt'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_clustering(path, 3)
    assert str(path) in str(error.value)


def test_bad_arrays_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array, message in (
        (np.zeros(3), "found float64 of shape"),
        (np.zeros((3, 1), int), r"shape \(3, 1\)"),
        (np.array([{}, 1, 2], object), "not a NumPy array of numbers"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            load_clustering(path, 3)
    with pytest.raises(ValueError, match="no such file"):
        load_clustering(tmp_path / "none.npy", 3)


@pytest.mark.parametrize("num_clusters", [1, 2, 7, 49, 50])
@pytest.mark.parametrize("kind", ["zipf", "flat", "one"])
def test_by_popularity(kind: str, num_clusters: int) -> None:
    """Popular first, no cluster empty, sizes growing with rank."""
    rng = np.random.default_rng(0)
    counts = {"zipf": rng.zipf(1.5, 50), "flat": np.zeros(50, int), "one": np.r_[10**9, np.zeros(49, int)]}[kind]
    assignment = by_popularity(counts, num_clusters)
    sizes = np.asarray(from_assignment(assignment, num_clusters).sizes_C)
    assert sizes.sum() == 50
    in_rank_order = assignment[np.argsort(-counts, kind="stable")]
    assert in_rank_order[0] == 0 and np.all(np.diff(in_rank_order) >= 0)
    if kind == "flat":
        assert sizes.max() - sizes.min() <= 1
    if kind == "zipf" and num_clusters == 7:
        assert sizes[0] < sizes[-1]


def _least_expected_size(share_N: np.ndarray, num_clusters: int) -> float:
    """The least Σ_c p(c)·n_c of any cut of the ranks into C runs, by dynamic programming."""
    edge = np.arange(share_N.size + 1)
    mass = np.concatenate([[0], np.cumsum(share_N)])
    run = np.where(edge[:, None] < edge, (mass - mass[:, None]) * (edge - edge[:, None]), np.inf)
    cost = np.where(edge == 0, 0.0, np.inf)
    for _ in range(num_clusters):
        cost = np.min(cost[:, None] + run, axis=0)
    return float(cost[-1])


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_popularity_clusters_are_near_the_cheapest(power: float) -> None:
    """Σ_c p(c)·n_c on a Zipf catalogue of 200 items: the rule is 0.5% above the optimum, equal clusters 66% or more."""
    counts = np.round(1e6 / np.arange(1, 201) ** power)
    share = counts / counts.sum()

    def expected_size(assignment: np.ndarray) -> float:
        return float(np.sum(share * np.bincount(assignment)[assignment]))

    least = _least_expected_size(share, 14)
    assert least <= expected_size(by_popularity(counts, 14)) < 1.02 * least
    assert expected_size(np.arange(200) * 14 // 200) > 1.5 * least


@pytest.mark.parametrize(
    ("counts", "num_clusters", "message"),
    [([1, 2], 3, "3 clusters of 2 items"), ([1, 2], 0, "0 clusters"), ([1, -2], 1, "item 2 has count -2")],
)
def test_bad_popularity(counts: list[int], num_clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_popularity(np.asarray(counts), num_clusters)
