"""`efficientids.data.cooccurrence`: PPMI by hand, and vectors whose products give it back."""

from __future__ import annotations

import numpy as np
import pytest

from efficientids.data import cooccurrence
from efficientids.data.cooccurrence import cooccurrence_vectors


def _ppmi_by_hand(histories: list[list[int]], num_items: int, window: int) -> np.ndarray:
    """Dense PPMI, pair by pair."""
    counts = np.zeros((num_items, num_items))
    for history in histories:
        for i, a in enumerate(history):
            for j, b in enumerate(history):
                if a != b and 0 < abs(i - j) <= window:
                    counts[a - 1, b - 1] += 1
    totals = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(counts * totals.sum() / np.outer(totals, totals))
    return np.where(counts > 0, np.maximum(information, 0), 0)


def _flat(histories: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.asarray(h, np.int32) for h in histories]), np.cumsum([0, *map(len, histories)])


def _histories(num_items: int, users: int, seed: int) -> list[list[int]]:
    """Histories of very different lengths (one empty): neighbours must never be of two users."""
    rng = np.random.default_rng(seed)
    return [[], *(rng.integers(1, num_items + 1, rng.integers(1, 15)).tolist() for _ in range(users))]


@pytest.mark.parametrize("window", [1, 3, 50])
def test_vectors_reproduce_the_ppmi(window: int) -> None:
    """U·S·Uᵀ is |M| = √(M·Mᵀ) of a symmetric M: with all N dimensions it is exact."""
    histories = _histories(12, 30, seed=window)
    vectors = cooccurrence_vectors(*_flat(histories), 12, 12, window, seed=0)
    want = _ppmi_by_hand(histories, 12, window)
    values, basis = np.linalg.eigh(want)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors @ vectors.T, basis @ np.diag(np.abs(values)) @ basis.T, atol=1e-5)


def test_the_iterative_solver_agrees_with_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*_flat(_histories(60, 80, seed=3)), 60, 5, 2)
    full = cooccurrence_vectors(*args, seed=1)
    monkeypatch.setattr(cooccurrence, "DENSE_ITEMS", 0)
    iterative = cooccurrence_vectors(*args, seed=1)
    np.testing.assert_allclose(iterative, full, atol=1e-4)
    np.testing.assert_array_equal(cooccurrence_vectors(*args, seed=1), iterative)


def test_items_of_one_group_are_near() -> None:
    """Users stay in one of two halves of the catalogue: within a half the cosine is higher than across."""
    rng = np.random.default_rng(0)
    histories = [(rng.integers(1, 11, 20) + 10 * (u % 2)).tolist() for u in range(60)]
    vectors = cooccurrence_vectors(*_flat(histories), 20, 2, 5, seed=0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert cosine[:10, :10].min() > 0.9 > 0.1 > abs(cosine[:10, 10:]).max()


def test_lonely_items_and_wide_vectors() -> None:
    """Item 3 is never seen and the width exceeds the catalogue: zeros, not noise."""
    vectors = cooccurrence_vectors(np.array([1, 2, 1, 2]), np.array([0, 4]), 3, 5, 1, seed=0)
    assert vectors.shape == (3, 5)
    assert not vectors[2].any() and not vectors[:, 3:].any() and vectors[0].any()
    assert not cooccurrence_vectors(np.array([], int), np.array([0]), 3, 2, 1, seed=0).any()


@pytest.mark.parametrize(
    ("ids", "offsets", "dim", "message"),
    [
        ([0, 1], [0, 2], 2, "item ids 0 to 1; expected 1 to 3"),
        ([1, 4], [0, 2], 2, "item ids 1 to 4"),
        ([1, 2], [0, 1], 2, "offsets must ascend from 0 to the 2 interactions"),
        ([1, 2], [0, 2, 1, 2], 2, "offsets must ascend"),
        ([1, 2], [0, 2], 0, "dim is 0"),
    ],
)
def test_bad_arguments(ids: list[int], offsets: list[int], dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cooccurrence_vectors(np.asarray(ids), np.asarray(offsets), 3, dim, 1, seed=0)
