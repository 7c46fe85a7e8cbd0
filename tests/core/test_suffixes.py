"""`core.suffixes`: equal codes are told apart by a running count in index order."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

from core.suffixes import buckets, with_suffix


def _one_by_one(codes_NL: np.ndarray) -> np.ndarray:
    """The definition."""
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    rows = []
    for row in codes_NL.tolist():
        rows.append([*row, seen[tuple(row)]])
        seen[tuple(row)] += 1
    return np.array(rows, np.int32).reshape(len(rows), codes_NL.shape[1] + 1)


@pytest.mark.parametrize(("levels", "size", "num_items"), [(1, 3, 50), (3, 4, 500), (2, 256, 99), (3, 2, 1), (2, 5, 0)])
def test_equals_the_definition(levels: int, size: int, num_items: int) -> None:
    codes_NL = np.random.default_rng(0).integers(0, size, (num_items, levels))
    got = with_suffix(codes_NL)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, _one_by_one(codes_NL))
    assert len(np.unique(got, axis=0)) == num_items


def test_many_levels_do_not_overflow() -> None:
    """Twelve levels of a thousand are more combinations than an int64 counts."""
    few_NL = np.random.default_rng(1).integers(0, 1000, (7, 12))
    few_NL[1] = few_NL[0]
    few_NL[1, 0] = few_NL[0, 0] ^ 1  # differs at the first level alone
    few_NL[:, -1] = 999
    codes_NL = few_NL[np.random.default_rng(2).integers(0, 7, 200)]
    np.testing.assert_array_equal(with_suffix(codes_NL), _one_by_one(codes_NL))
    assert len(np.unique(buckets(codes_NL))) == 7


def test_later_items_change_no_earlier_code() -> None:
    codes_NL = np.random.default_rng(3).integers(0, 3, (80, 2))
    np.testing.assert_array_equal(with_suffix(codes_NL)[:60], with_suffix(codes_NL[:60]))


def test_a_bucket_that_overflows_names_its_size_and_the_remedy() -> None:
    codes_NL = np.array([[1, 2], [0, 0], [1, 2], [1, 2]])
    np.testing.assert_array_equal(with_suffix(codes_NL, 3)[:, -1], [0, 0, 1, 2])
    with pytest.raises(ValueError, match=r"3 items share the codes \[1, 2\].* has 2 codes; give it at least 3"):
        with_suffix(codes_NL, 2)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 0), np.int32), "expected whole numbers"),
        (np.zeros(3, np.int32), "expected whole numbers"),
        (np.zeros((3, 2)), "found float64"),
        (np.array([[0, 1], [2, -1]]), "row 1 has code -1 at level 1"),
    ],
)
def test_bad_codes(codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_suffix(codes)


def test_golden_etegrec_suffixes(golden: Path) -> None:
    values = np.load(golden / "etegrec_rqvae.npz", allow_pickle=False)
    np.testing.assert_array_equal(with_suffix(values["indices"]), values["codes_with_suffix"])
