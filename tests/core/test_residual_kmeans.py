"""`core.residual_kmeans`: level by level, the means of what is left over."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.residual_kmeans import residual_kmeans
from core.residual_quantizer import ResidualQuantizer

KEY = jax.random.key(0)


def _nested() -> np.ndarray:
    """Three far places, around each the same four smaller offsets, 15 times with a little noise."""
    rng = np.random.default_rng(0)
    places, offsets = 100 * np.eye(6)[:3], 10 * np.eye(6)[3:].repeat(2, axis=0)[:4] * np.array([[1], [-1], [1], [-1]])
    vectors = (places[:, None] + offsets[None]).reshape(12, 6).repeat(15, axis=0)
    return (vectors + 0.01 * rng.normal(size=vectors.shape)).astype(np.float32)


def test_finds_what_is_nested() -> None:
    vectors = _nested()
    books = residual_kmeans(vectors, (3, 4), KEY)
    assert [book.shape for book in books] == [(3, 6), (4, 6)]
    found = ResidualQuantizer(books).quantize(jnp.asarray(vectors))
    codes = np.asarray(found.codes_BL).reshape(3, 4, 15, 2)
    assert np.all(codes == codes[:, :, :1])
    assert len(np.unique(codes[:, :, 0].reshape(12, 2), axis=0)) == 12
    assert float(jnp.abs(found.vectors_Bd - vectors).max()) < 0.1
    for book, again in zip(books, residual_kmeans(vectors, (3, 4), KEY), strict=True):
        np.testing.assert_array_equal(book, again)


def test_each_level_leaves_less() -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    books = residual_kmeans(vectors, (16, 16, 16), KEY)
    errors = [
        float(jnp.mean((ResidualQuantizer(books[:n]).quantize(jnp.asarray(vectors)).vectors_Bd - vectors) ** 2))
        for n in (1, 2, 3)
    ]
    assert 0.8 * np.var(vectors) > errors[0] > 1.2 * errors[1] > 1.44 * errors[2]


def test_more_codes_than_vectors() -> None:
    with pytest.raises(ValueError, match="9 clusters of 8 vectors"):
        residual_kmeans(np.eye(8), (9,), KEY)
