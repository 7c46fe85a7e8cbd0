"""`core.kmeans`: finds what is there, leaves no cluster empty, keeps capacities, repeats itself."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from core.kmeans import kmeans

KEY = jax.random.key(0)


def _blobs(num_clusters: int = 6, each: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, the blob of each) far apart, in random order, far from the origin."""
    rng = np.random.default_rng(seed)
    blob = rng.permutation(np.repeat(np.arange(num_clusters), each))
    centres = 100 * np.eye(num_clusters)
    return (centres[blob] + rng.normal(size=(blob.size, num_clusters)) + 1000).astype(np.float32), blob


@pytest.mark.parametrize("balanced", [False, True])
def test_finds_blobs_and_repeats_itself(balanced: bool) -> None:
    vectors, blob = _blobs()
    got = kmeans(vectors, 6, KEY, balanced=balanced)
    assert got.dtype == np.int32
    assert len({(a, b) for a, b in zip(got.tolist(), blob.tolist(), strict=True)}) == 6
    np.testing.assert_array_equal(kmeans(vectors, 6, KEY, balanced=balanced), got)


def test_balanced_keeps_the_capacity() -> None:
    """One dense blob of 50 and nine single points: plain k-means is lopsided, ⌈59/10⌉ = 6 is the most otherwise."""
    rng = np.random.default_rng(1)
    vectors = np.concatenate([0.1 * rng.normal(size=(50, 3)), 100 * rng.normal(size=(9, 3))])
    assert np.bincount(kmeans(vectors, 10, KEY), minlength=10).max() > 6
    sizes = np.bincount(kmeans(vectors, 10, KEY, balanced=True), minlength=10)
    assert sizes.max() == 6 and sizes.min() >= 1


def test_a_full_cluster_keeps_its_nearest() -> None:
    """0, 1, 2 | 10 with room for two: 2 is farthest from the middle of its cluster, with 0; one of them must leave."""
    got = kmeans(np.array([[0.0], [1.0], [2.0], [10.0]]), 2, KEY, balanced=True)
    assert np.bincount(got).tolist() == [2, 2]
    assert got[1] != got[3]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("num_clusters", [1, 4, 12])
def test_no_cluster_is_empty_even_of_duplicates(num_clusters: int, balanced: bool) -> None:
    vectors = np.repeat(np.array([[0.0, 0.0], [5.0, 1.0]]), 6, axis=0)
    sizes = np.bincount(kmeans(vectors, num_clusters, KEY, balanced=balanced), minlength=num_clusters)
    assert sizes.min() >= 1 and sizes.sum() == 12 and len(sizes) == num_clusters


def test_iterating_improves_on_the_seeds() -> None:
    vectors = np.random.default_rng(2).normal(size=(300, 4)).astype(np.float32)

    def spread(assignment: np.ndarray) -> float:
        means = np.stack([vectors[assignment == c].mean(axis=0) for c in range(12)])
        return float(((vectors - means[assignment]) ** 2).sum())

    assert spread(kmeans(vectors, 12, KEY, rounds=30)) < 0.97 * spread(kmeans(vectors, 12, KEY, rounds=0))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="4 clusters of 3 vectors"):
        kmeans(np.zeros((3, 2)), 4, KEY)
    with pytest.raises(ValueError, match="row 1 of the vectors is not finite"):
        kmeans(np.array([[0.0], [np.nan], [1.0]]), 2, KEY)
