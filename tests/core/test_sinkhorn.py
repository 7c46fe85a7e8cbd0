"""`core.sinkhorn`: shares are kept, what is not crowded stays nearest, collisions fall."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.code_use import code_use
from core.residual_kmeans import residual_kmeans
from core.residual_quantizer import ResidualQuantizer
from core.sinkhorn import spread, spread_codes


def _latents(rows: int = 400, dim: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(15, dim))[rng.integers(0, 15, rows)] + 0.2 * rng.normal(size=(rows, dim))).astype(
        np.float32
    )


def _quantizer(vectors: np.ndarray) -> ResidualQuantizer:
    return ResidualQuantizer(residual_kmeans(vectors, (8, 8, 8), jax.random.key(0)))


def test_one_item_a_code_is_the_cheapest_permutation() -> None:
    """Six items crowd around two of six codes; the best assignment is found by trying all 720."""
    rng = np.random.default_rng(3)
    distances = rng.uniform(1, 2, (6, 6))
    distances[:, :2] -= 0.9
    best = min(itertools.permutations(range(6)), key=lambda p: sum(distances[i, k] for i, k in enumerate(p)))
    got = spread(jnp.asarray(distances), jnp.zeros(6, jnp.int32), epsilon=0.005, iterations=2000)
    assert len(set(distances.argmin(1))) <= 2
    assert got.tolist() == list(best)


def test_groups_do_not_know_of_each_other() -> None:
    rng = np.random.default_rng(4)
    distances, groups = jnp.asarray(rng.uniform(size=(30, 5))), jnp.asarray(rng.integers(0, 3, 30))
    # The scale of epsilon is the mean over all items: give each group the same rows.
    distances = jnp.concatenate([distances, distances])
    got = spread(distances, jnp.concatenate([groups * 0, groups * 0 + 7]))
    np.testing.assert_array_equal(got[:30], got[30:])
    np.testing.assert_array_equal(got[:30], spread(distances[:30], groups * 0))


def test_an_item_alone_keeps_its_nearest_code() -> None:
    distances = jnp.asarray(np.random.default_rng(5).uniform(size=(20, 4)))
    np.testing.assert_array_equal(spread(distances, jnp.arange(20)), distances.argmin(1))


def test_the_last_level_spread_lowers_collisions() -> None:
    latents = _latents()
    quantizer = _quantizer(latents)
    plain, got = np.asarray(quantizer.codes(jnp.asarray(latents))), spread_codes(quantizer, jnp.asarray(latents), (2,))
    np.testing.assert_array_equal(plain[:, :2], got[:, :2])
    _, sizes = np.unique(plain[:, :2], axis=0, return_counts=True)
    least = np.maximum(sizes - 8, 0).sum() / len(latents)  # more items than codes must collide
    above = [code_use(codes, (8, 8, 8)).collisions[-1] - least for codes in (plain, got)]
    assert 0 <= above[1] < 0.3 * above[0]


def test_all_levels_spread_are_nearly_even() -> None:
    latents = _latents()
    quantizer = _quantizer(latents)
    got = spread_codes(quantizer, jnp.asarray(latents), range(3))
    assert got.dtype == np.int32 and got.shape == (400, 3)
    # 50 items a code would be even; rounding the plan lets a few through.
    assert np.bincount(got[:, 0], minlength=8).max() <= 60
    assert code_use(got, (8, 8, 8)).perplexity[0] > 7.9


def test_no_level_spread_is_the_nearest_codes() -> None:
    latents = _latents(50)
    quantizer = _quantizer(latents)
    np.testing.assert_array_equal(spread_codes(quantizer, jnp.asarray(latents), ()), quantizer.codes(latents))


def test_equal_items_are_finite() -> None:
    got = spread(jnp.ones((5, 3)), jnp.zeros(5, jnp.int32))
    assert set(got.tolist()) <= {0, 1, 2}


def test_bad_arguments() -> None:
    latents = _latents(50)
    with pytest.raises(ValueError, match="level 3: the levels are 0 to 2"):
        spread_codes(_quantizer(latents), jnp.asarray(latents), (3,))
    for wrong in ({"epsilon": 0.0}, {"epsilon": float("nan")}, {"iterations": 0}):
        with pytest.raises(ValueError, match="expected above 0 and at least 1"):
            spread(jnp.ones((2, 2)), jnp.zeros(2, jnp.int32), **wrong)  # type: ignore[arg-type]
