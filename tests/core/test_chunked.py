"""`core.chunked`: equal to the plain sum in value and gradients, one chunk of temporaries, nothing for frozen leaves.

Legend: T rows, N classes, D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.chunked import CHUNK_ELEMENTS, _cut, chunk_rows, chunked_sum, gathered, num_chunks


def _loss(params: dict[str, jax.Array], x: dict[str, jax.Array]) -> jax.Array:
    """A sum over rows with a float, an integer and a boolean operand on either side."""
    y_TN = jnp.tanh(x["h"] @ params["table"]) * params["live"]
    return jnp.sum(x["weight"] * x["times"] * jnp.sum(y_TN**2, axis=-1))


def _inputs(rows: int, seed: int = 0) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    rng = np.random.default_rng(seed)
    params = {
        "table": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        "live": jnp.asarray([True, False, True, True, False, True]),
    }
    xs = {
        "h": jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32),
        "weight": jnp.asarray(rng.uniform(size=rows), jnp.float32),
        "times": jnp.asarray(rng.integers(0, 3, rows), jnp.int32),
    }
    return params, xs


@pytest.mark.parametrize(("rows", "chunk_size"), [(12, 4), (12, 5), (13, 4), (7, 1), (5, 5), (5, 100), (1, 1)])
def test_equals_the_plain_sum(rows: int, chunk_size: int) -> None:
    params, xs = _inputs(rows)

    def chunked(table: jax.Array, h: jax.Array, weight: jax.Array) -> jax.Array:
        with_parts = {**params, "table": table}, {**xs, "h": h, "weight": weight}
        return 3.0 * chunked_sum(_loss, *with_parts, chunk_size=chunk_size)

    def plain(table: jax.Array, h: jax.Array, weight: jax.Array) -> jax.Array:
        return 3.0 * _loss({**params, "table": table}, {**xs, "h": h, "weight": weight})

    args = (params["table"], xs["h"], xs["weight"])
    got, got_grads = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(*args)
    want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(*args)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(*args), want, rtol=1e-5)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(got_grad, want_grad, rtol=1e-5, atol=1e-5)


def test_integer_leaves_get_no_gradient() -> None:
    params, xs = _inputs(6)
    grads = jax.grad(lambda p, x: chunked_sum(_loss, p, x, chunk_size=2), (0, 1), allow_int=True)(params, xs)
    assert grads[0]["live"].dtype == jax.dtypes.float0
    assert grads[1]["times"].dtype == jax.dtypes.float0
    assert grads[1]["h"].shape == xs["h"].shape


def test_gradients_keep_the_dtype_and_are_summed_in_float32() -> None:
    """1,000 gradients of 1/256 each: a bfloat16 sum stops growing at 1, a float32 one reaches 1000/256."""
    grad = jax.grad(lambda p: chunked_sum(lambda p, x: jnp.sum(p * x), p, jnp.full(1000, 1 / 256), chunk_size=1))(
        jnp.bfloat16(1.0)
    )
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(grad), 1000 / 256, rtol=1e-2)


def test_chunks_are_strided() -> None:
    """Chunk i holds rows i, n + i, …, so that rows sharded batch-major are spread over every chunk."""
    chunks: list[Any] = []

    def record(params: None, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda rows: chunks.append(rows.tolist()), x, ordered=True)
        return jnp.float32(0)

    chunked_sum(record, None, jnp.arange(7), chunk_size=2)
    jax.effects_barrier()
    assert chunks == [[0], [1], [2], [3], [4], [5], [6]]  # 7 rows: 7 is the only divisor in [4, 8)
    chunks.clear()
    chunked_sum(record, None, jnp.arange(12), chunk_size=4)
    jax.effects_barrier()
    assert chunks == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    chunks.clear()
    chunked_sum(record, None, jnp.arange(11), chunk_size=4)  # 11 is prime: 3 chunks of 3 and the 2 rows left over
    jax.effects_barrier()
    assert chunks == [[0, 3, 6], [1, 4, 7], [2, 5, 8], [9, 10]]


@pytest.mark.parametrize(("rows", "chunk_size", "want"), [(12, 4, 3), (12, 5, 3), (16, 6, 4), (11, 4, 3), (3, 9, 1)])
def test_num_chunks(rows: int, chunk_size: int, want: int) -> None:
    assert num_chunks(rows, chunk_size) == want


def test_chunk_rows() -> None:
    assert chunk_rows(1000, 10_000) == 10
    assert chunk_rows(1000, 10) == 1
    assert 1 <= chunk_rows(10**6, None) * 10**6 <= CHUNK_ELEMENTS
    assert chunk_rows(10**9, None) == 1


def _table_products(differentiate_table: bool) -> int:
    """Matrix products in the program of the gradient by h, or by h and the table."""
    params, xs = _inputs(64)

    def loss(h: jax.Array, table: jax.Array) -> jax.Array:
        return chunked_sum(_loss, {**params, "table": table}, {**xs, "h": h}, chunk_size=8)

    grad = jax.grad(loss, (0, 1) if differentiate_table else 0)
    return str(jax.make_jaxpr(grad)(xs["h"], params["table"])).count("dot_general")


def test_a_frozen_leaf_costs_no_product() -> None:
    assert _table_products(differentiate_table=True) == 3
    assert _table_products(differentiate_table=False) == 2


def test_no_gradient_no_backward_products() -> None:
    params, xs = _inputs(64)
    jaxpr = jax.make_jaxpr(lambda p, x: chunked_sum(_loss, p, x, chunk_size=8))(params, xs)
    assert str(jaxpr).count("dot_general") == 1


def test_temporaries_are_one_chunk() -> None:
    rows, classes, width, chunk = 4096, 1024, 8, 64

    def loss(params: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.logsumexp(h @ params.T, axis=-1))

    grad = jax.jit(jax.grad(lambda p, h: chunked_sum(loss, p, h, chunk_size=chunk), (0, 1)))
    compiled = grad.lower(jnp.zeros((classes, width)), jnp.zeros((rows, width))).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * chunk * classes * 4 + 4 * (rows + classes) * width * 4 < rows * classes * 4 / 8


@pytest.mark.parametrize(
    ("xs", "chunk_size", "message"),
    [
        (jnp.zeros(3), 0, "chunk_size is 0"),
        ((jnp.zeros(3), jnp.zeros(4)), 2, r"leading axes \['3', '4'\]"),
        (jnp.float32(1), 2, "leading axes"),
    ],
)
def test_bad_arguments(xs: Any, chunk_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_sum(lambda p, x: jnp.float32(0), None, xs, chunk_size=chunk_size)


def test_empty_chunks_are_not_computed() -> None:
    """The loss is infinite on the rows that `empty` calls empty, so computing them would show."""
    xs = jnp.array([1.0, 2.0, 0.0, 0.0, 3.0])

    def loss(scale: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(scale / x)

    def total(scale: jax.Array, xs: jax.Array) -> jax.Array:
        return chunked_sum(loss, scale, xs, chunk_size=1, empty=lambda x: ~jnp.any(x))

    value, (by_scale, by_x) = jax.value_and_grad(total, argnums=(0, 1))(jnp.float32(2.0), xs)
    assert value == total(jnp.float32(2.0), xs) == pytest.approx(2 + 1 + 2 / 3)
    assert by_scale == pytest.approx(1 + 1 / 2 + 1 / 3)
    np.testing.assert_allclose(by_x, [-2, -0.5, 0, 0, -2 / 9], rtol=1e-6)


@pytest.mark.parametrize(("rows", "size"), [(12, 5), (7, 3), (5, 9), (11, 1)])
def test_gathered_rows_come_together_in_a_chunk(rows: int, size: int) -> None:
    order = gathered(jnp.arange(rows), size)
    stacked, rest = _cut(order, size)
    chunks = [*stacked.tolist(), *([] if rest is None else [rest.tolist()])]
    assert [row for chunk in chunks for row in chunk] == list(range(rows))
