"""`core.alignment`: both losses equal their definitions one row at a time; masked rows do not exist."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import alignment
from core.alignment import SIASign, anchors, first_occurrences, psa_loss, sia_loss
from core.sharding import MeshShape, make_mesh, rows

BATCH = 12
TARGETS = np.array([3, 7, 3, 0, 5, 7, 9, 3, 1, 2, 0, 4])
KEPT = [0, 1, 4, 6, 8, 9, 11]


def _distances(seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.gamma(2, 1, (BATCH, size)).astype(np.float32)) for size in (4, 6)]


def _vectors(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, 5)).astype(np.float32))


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def _softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def _sia_by_row(a: list[jax.Array], b: list[jax.Array], kept: list[int], factor: float) -> float:
    total = 0.0
    for level_a, level_b in zip(a, b, strict=True):
        for row in kept:
            p, q = (_softmax([factor * float(d) for d in level[row]]) for level in (level_a, level_b))
            total += _kl(p, q) + _kl(q, p)
    return total / len(a)


def _psa_by_row(a_BE: jax.Array, b_BE: jax.Array, kept: list[int], temperature: float) -> float:
    a, b = (np.asarray(x, np.float64)[kept] for x in (a_BE, b_BE))
    total = 0.0
    for one, other in ((a, b), (b, a)):
        for i, x in enumerate(one):
            cosines = [float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for y in other]
            total -= math.log(_softmax([c / temperature for c in cosines])[i])
    return total


def test_anchors_are_the_items_that_have_something_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    item_ids = jnp.array([[4, 9, 2, 9], [6, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    lengths = jnp.array([4, 2, 1, 0])
    found = anchors(item_ids, lengths, last_alone=False)
    assert found.rows.shape == (16,)
    # The newest of each row first; 9 and 2 stand twice and count where they come first.
    kept = np.asarray(found.kept)
    shown = [x[kept].tolist() for x in map(np.asarray, (found.rows, found.places, found.items))]
    assert shown == [[0, 1], [3, 1], [9, 2]]
    last = anchors(item_ids, lengths, last_alone=True)
    assert last.items[:2].tolist() == [9, 2] and last.kept.tolist() == [True, True, False, False]
    monkeypatch.setattr(alignment, "MAX_ANCHORS", 5)
    few = anchors(item_ids[:2], lengths[:2], last_alone=False)
    assert few.places.shape == (5,) and few.places[:4].tolist() == [3, 1, 2, 1]


def test_first_occurrences() -> None:
    assert np.flatnonzero(first_occurrences(jnp.asarray(TARGETS))).tolist() == KEPT


@pytest.mark.parametrize(("sign", "factor"), [("paper", -1.0), ("released", 1.0)])
def test_sia_equals_the_definition(sign: SIASign, factor: float) -> None:
    a, b = _distances(0), _distances(1)
    total, weight = sia_loss(a, b, first_occurrences(jnp.asarray(TARGETS)), sign)
    assert float(weight) == len(KEPT)
    np.testing.assert_allclose(total, _sia_by_row(a, b, KEPT, factor), rtol=1e-5)


def test_sia_takes_weights_and_is_zero_for_equals() -> None:
    a, b = _distances(0), _distances(1)
    total, weight = sia_loss(a, b, jnp.zeros(BATCH).at[2].set(0.5).at[6].set(2.0))
    expected = 0.5 * _sia_by_row(a, b, [2], -1.0) + 2 * _sia_by_row(a, b, [6], -1.0)
    np.testing.assert_allclose((total, weight), (expected, 2.5), rtol=1e-5)
    assert float(sia_loss(a, a, jnp.ones(BATCH))[0]) == 0


def test_psa_equals_the_definition() -> None:
    total, weight = psa_loss(_vectors(0), _vectors(1), first_occurrences(jnp.asarray(TARGETS)), 0.2)
    assert float(weight) == len(KEPT)
    np.testing.assert_allclose(total, _psa_by_row(_vectors(0), _vectors(1), KEPT, 0.2), rtol=1e-4)


def test_a_masked_row_has_no_gradient_and_is_nobodys_negative() -> None:
    kept = first_occurrences(jnp.asarray(TARGETS))
    masked = [row for row in range(BATCH) if row not in KEPT]
    for gradient in jax.grad(lambda *x: psa_loss(*x, kept)[0], argnums=(0, 1))(_vectors(0), _vectors(1)):
        assert not np.any(np.asarray(gradient)[masked]) and np.all(np.any(np.asarray(gradient)[KEPT], axis=1))
    for gradient in jax.grad(lambda d: sia_loss(d, _distances(1), kept)[0])(_distances(0)):
        assert not np.any(np.asarray(gradient)[masked])


def test_no_row_and_zero_vectors_are_finite() -> None:
    none = jnp.zeros(BATCH, bool)
    assert [float(x) for x in psa_loss(_vectors(0), _vectors(1), none)] == [0, 0]
    assert [float(x) for x in sia_loss(_distances(0), _distances(1), none)] == [0, 0]
    gradient = jax.grad(lambda x: psa_loss(x, _vectors(1), ~none)[0])(_vectors(0).at[4].set(0))
    assert np.all(np.isfinite(gradient))


def test_negatives_are_those_of_every_device() -> None:
    mesh = make_mesh(MeshShape(data=4))
    arguments = (_vectors(0), _vectors(1), first_occurrences(jnp.asarray(TARGETS)))
    total, _ = jax.jit(psa_loss)(*(jax.device_put(x, rows(mesh)) for x in arguments))
    np.testing.assert_allclose(total, psa_loss(*arguments)[0], rtol=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="expected one of paper, released"):
        sia_loss(_distances(0), _distances(1), jnp.ones(BATCH), "plus")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the same levels"):
        sia_loss(_distances(0), _distances(1)[:1], jnp.ones(BATCH))
