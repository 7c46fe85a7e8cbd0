"""`core.code_use`: counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from core.code_use import code_use

CODES = np.array([[0, 1], [0, 1], [0, 0], [2, 1]])


def test_counted_by_hand() -> None:
    got = code_use(CODES, (4, 2))
    np.testing.assert_allclose(got.used, [0.5, 1.0])
    # 3/4 and 1/4 at both levels: exp of the entropy is 4 / 3^(3/4).
    np.testing.assert_allclose(got.perplexity, [4 / 3**0.75] * 2)
    np.testing.assert_allclose(got.collisions, [0.5, 0.25])


def test_even_use_has_the_perplexity_of_its_size() -> None:
    np.testing.assert_allclose(code_use(np.arange(6)[:, None].repeat(3, 0), (6,)).perplexity, [6.0])


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (CODES, (4,), r"expected \[N, 1\]"),
        (CODES[:0], (4, 2), "N ≥ 1"),
        (CODES, (2, 2), "codes 0 to 2 at level 0: expected 0 to 1"),
        (CODES - 1, (4, 2), "codes -1 to 1 at level 0"),
    ],
)
def test_bad_codes(codes: np.ndarray, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_use(codes, sizes)
