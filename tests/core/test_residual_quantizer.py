"""`core.residual_quantizer`: equals quantisation one vector at a time; gradients, dead codes, counts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.residual_quantizer import ResidualGrad, ResidualQuantizer, count_codes, uniform_codebooks

SIZES, DIM = (5, 3, 7), 4
KEY = jax.random.key(0)


def _books(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, DIM)).astype(np.float32) / (level + 1) for level, size in enumerate(SIZES)]


def _latents(rows: int = 40, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32))


def _one(latent: np.ndarray, books: list[np.ndarray], beta: float) -> dict[str, Any]:
    """The definition, for one vector in float64."""
    residual, found = latent.astype(np.float64), {"codes": [], "distances": [], "losses": [], "vector": 0}
    for book in books:
        distances = np.array([sum((a - b) ** 2 for a, b in zip(residual, e, strict=True)) for e in book])
        code = int(distances.argmin())
        found["codes"].append(code)
        found["distances"].append(distances)
        found["losses"].append((1 + beta) * distances[code] / len(residual))
        found["vector"] = found["vector"] + book[code]
        residual = residual - book[code]
    return found


@pytest.mark.parametrize("residual_grad", ["straight_through", "passthrough"])
def test_equals_the_definition_with_levels_of_different_sizes(residual_grad: ResidualGrad) -> None:
    books, latents = _books(), _latents(15)
    got = ResidualQuantizer(books, 0.4, residual_grad).quantize(latents)
    assert got.codes_BL.dtype == jnp.int32
    for row, latent in enumerate(np.asarray(latents)):
        expected = _one(latent, books, 0.4)
        np.testing.assert_array_equal(got.codes_BL[row], expected["codes"])
        np.testing.assert_allclose(got.losses_BL[row], expected["losses"], rtol=1e-4)
        np.testing.assert_allclose(got.vectors_Bd[row], expected["vector"], rtol=1e-5, atol=1e-6)
        for level in range(len(SIZES)):
            np.testing.assert_allclose(got.distances[level][row], expected["distances"][level], rtol=1e-4, atol=1e-5)


def test_codes_of_a_catalogue_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, latents = ResidualQuantizer(_books()), _latents(23)
    expected = quantizer.quantize(latents).codes_BL
    monkeypatch.setattr("core.residual_quantizer.INDEXED_AT_A_TIME", 5)
    np.testing.assert_array_equal(quantizer.codes(latents), expected)
    assert quantizer.codes(latents[:0]).shape == (0, len(SIZES))


@pytest.mark.parametrize("level", range(len(SIZES)))
@pytest.mark.parametrize("residual_grad", ["straight_through", "passthrough"])
def test_which_levels_reach_the_latents(residual_grad: ResidualGrad, level: int) -> None:
    """Straight through, only the first level does; its codebook learns at every level, from its own loss alone."""
    books, latents, beta = _books(), _latents(), 0.25

    def loss(latents: jax.Array, books: list[np.ndarray]) -> jax.Array:
        return ResidualQuantizer(books, beta, residual_grad).quantize(latents).losses_BL[:, level].sum()

    by_latents, by_books = jax.grad(loss, argnums=(0, 1))(latents, books)
    assert bool(jnp.any(by_latents != 0)) == (residual_grad == "passthrough" or level == 0)
    assert [bool(jnp.any(book != 0)) for book in by_books] == [other == level for other in range(len(SIZES))]
    residuals, expected = np.asarray(latents, np.float64), np.zeros((SIZES[level], DIM))
    for row, codes in enumerate(np.asarray(ResidualQuantizer(books).codes(latents))):
        residual = residuals[row] - sum(books[i][codes[i]] for i in range(level))
        expected[codes[level]] += 2 * (books[level][codes[level]] - residual) / DIM
    np.testing.assert_allclose(by_books[level], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("residual_grad", ["straight_through", "passthrough"])
def test_the_sum_passes_its_gradient_to_the_latents_alone(residual_grad: ResidualGrad) -> None:
    weights = _latents(seed=5)

    def weighted(latents: jax.Array, books: list[np.ndarray]) -> jax.Array:
        return jnp.sum(weights * ResidualQuantizer(books, 0.25, residual_grad).quantize(latents).vectors_Bd)

    by_latents, by_books = jax.grad(weighted, argnums=(0, 1))(_latents(), _books())
    np.testing.assert_allclose(by_latents, weights, rtol=1e-6)
    assert not any(np.any(book) for book in by_books)


def test_half_precision_latents_are_quantised_in_float32() -> None:
    got = ResidualQuantizer(_books()).quantize(_latents().astype(jnp.bfloat16))
    assert {got.vectors_Bd.dtype, got.losses_BL.dtype, *(d.dtype for d in got.distances)} == {jnp.dtype(jnp.float32)}


def test_revived_codes_lie_on_residuals_and_the_others_stay() -> None:
    books = _books()
    quantizer, latents = ResidualQuantizer(books), _latents(30)
    counts = [jnp.array([1, 0, 2, 0, 1]), jnp.array([4, 4, 4]), jnp.array([0, 0, 1, 0, 0, 0, 0])]
    graphdef, state = nnx.split(quantizer)

    @jax.jit
    def revive(state: nnx.State) -> tuple[jax.Array, nnx.State]:
        quantizer = nnx.merge(graphdef, state)
        revived = quantizer.revive(counts, latents, KEY)
        return revived, nnx.state(quantizer)

    revived, state = revive(state)
    assert revived.tolist() == [2, 0, 6]
    nnx.update(quantizer, state)
    residual = np.asarray(latents)
    for book, old, count in zip(quantizer.codebooks, books, counts, strict=True):
        dead, new = np.asarray(count) == 0, np.asarray(book[...])
        np.testing.assert_array_equal(new[~dead], old[~dead])
        gaps = np.abs(new[dead][:, None] - residual[None]).max(-1)
        assert np.all(gaps.min(axis=1) < 1e-5) and len(set(gaps.argmin(axis=1))) == dead.sum()
        nearest = ((residual[:, None] - new[None]) ** 2).sum(-1).argmin(1)
        residual = residual - new[nearest]
    used = count_codes(quantizer.codes(latents), SIZES)
    assert np.all(np.asarray(used[0])[[1, 3]] > 0)


def test_more_dead_codes_than_the_pool_has_vectors() -> None:
    quantizer = ResidualQuantizer(_books())
    revived = quantizer.revive([jnp.zeros(size, int) for size in SIZES], _latents(2), KEY)
    assert revived.tolist() == list(SIZES)
    assert len(np.unique(np.asarray(quantizer.codebooks[0][...]), axis=0)) == 2


def test_counts_leave_padding_out() -> None:
    codes = jnp.array([[0, 2, 6], [0, 1, 6], [4, 2, 6]])
    assert [c.tolist() for c in count_codes(codes, SIZES)] == [[2, 0, 0, 0, 1], [0, 1, 2], [0] * 6 + [3]]
    counts = count_codes(codes, SIZES, jnp.array([1.0, 0.0, 1.0]))
    assert [c.tolist() for c in counts] == [[1, 0, 0, 0, 1], [0, 0, 2], [0] * 6 + [2]]


def test_uniform_codebooks_stay_in_bounds() -> None:
    for book, size in zip(uniform_codebooks((4, 50), 64, KEY), (4, 50), strict=True):
        assert book.shape == (size, 64)
        assert 0.9 / size < float(jnp.abs(book).max()) <= 1 / size and float(book.min()) < -0.9 / size


def test_replace_refuses_other_shapes() -> None:
    quantizer = ResidualQuantizer(_books())
    quantizer.replace(_books(3))
    np.testing.assert_array_equal(quantizer.codebooks[2][...], _books(3)[2])
    with pytest.raises(ValueError, match=r"\(5, 4\), \(3, 4\)\] cannot replace"):
        quantizer.replace(_books()[:2])
    with pytest.raises(ValueError, match="for levels of"):
        quantizer.revive([jnp.zeros(5), jnp.zeros(3)], _latents(), KEY)


@pytest.mark.parametrize("books", [[], [np.zeros((3, 2)), np.zeros((3, 4))], [np.zeros(3)], [np.zeros((0, 2))]])
def test_bad_codebooks(books: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="expected one \\[K, d\\] a level"):
        ResidualQuantizer(books)


def test_unknown_residual_grad() -> None:
    with pytest.raises(ValueError, match="expected one of straight_through, passthrough"):
        ResidualQuantizer(_books(), residual_grad="none")  # type: ignore[arg-type]
