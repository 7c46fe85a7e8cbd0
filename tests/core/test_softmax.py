"""`core.softmax`: the chunked cross-entropy and top-k against the dense ones.

Legend: T positions, B rows, N entries, S of all tables, V words, D width, E exclusions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import softmax
from core.softmax import Segment, cross_entropy, item_segment, log_probs

T, N, V, D = 23, 37, 11, 8

top_k = jax.jit(softmax.top_k, static_argnames=("k", "chunk_elements"))


def _arrays(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "h": normal(T, D),
        "words_h": normal(T, 5),
        "table": normal(N, D),
        "bias": normal(N),
        "words": normal(V, 5),
        "words_bias": normal(V),
    }


def _weights(seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(size=T) * (rng.uniform(size=T) > 0.3), jnp.float32)


def _segments(a: dict[str, jax.Array], joint: bool, live_N: jax.Array | None = None) -> list[Segment]:
    items = item_segment(a["h"], a["table"], a["bias"], live_N)
    return [Segment(a["words_h"], a["words"], a["words_bias"]), items] if joint else [items]


def _dense(segments: list[Segment], targets_T: jax.Array, weights_T: jax.Array) -> jax.Array:
    """Σ weights·(−log p) with all logits at once; −log p is taken where the weight is not 0."""
    logits = []
    for s in segments:
        x = s.h_TD @ s.table_ND.T + (0.0 if s.bias_N is None else s.bias_N)
        logits.append(x if s.live_N is None else jnp.where(s.live_N, x, -jnp.inf))
    picked = jnp.take_along_axis(jax.nn.log_softmax(jnp.concatenate(logits, -1)), targets_T[:, None], axis=-1)[:, 0]
    return -jnp.sum(jnp.where(weights_T != 0, picked, 0.0) * weights_T)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 200, None])
def test_equals_dense(joint: bool, chunk_elements: int | None) -> None:
    a, weights_T = _arrays(), _weights()
    targets_T = jnp.asarray(np.random.default_rng(1).integers(1, N + V * joint, T), jnp.int32)
    targets_T = jnp.where(targets_T == V, V + 1, targets_T) if joint else targets_T  # item 0 is never a target
    weights_T = jnp.where(jnp.arange(T) == 3, 0.0, weights_T)
    targets_T = targets_T.at[3].set(V * joint)  # … but where the weight is 0

    def chunked(a: dict[str, jax.Array]) -> jax.Array:
        return cross_entropy(_segments(a, joint), targets_T, weights_T, chunk_elements=chunk_elements)

    got, got_grads = jax.jit(jax.value_and_grad(chunked))(a)
    want, want_grads = jax.jit(jax.value_and_grad(lambda a: _dense(_segments(a, joint), targets_T, weights_T)))(a)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(a), want, rtol=1e-5)
    for name in a:
        np.testing.assert_allclose(got_grads[name], want_grads[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_bfloat16_hidden_states() -> None:
    """bf16 has 8 bits: products are off by 2⁻⁸ relative. The table's gradient comes back in its own float32."""
    a, weights_T = _arrays(), _weights()
    targets_T = jnp.asarray(np.random.default_rng(1).integers(1, N, T), jnp.int32)

    def chunked(h: jax.Array, table: jax.Array) -> jax.Array:
        return cross_entropy([item_segment(h, table, a["bias"])], targets_T, weights_T, chunk_elements=200)

    both = jax.jit(jax.value_and_grad(chunked, (0, 1)))
    got, (grad_h, grad_table) = both(a["h"].astype(jnp.bfloat16), a["table"])
    want, (want_h, want_table) = both(a["h"], a["table"])
    assert (grad_h.dtype, grad_table.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(got, want, rtol=1e-2)
    np.testing.assert_allclose(grad_h.astype(jnp.float32), want_h, atol=0.03)
    np.testing.assert_allclose(grad_table, want_table, atol=0.03)


def test_dead_entries_have_no_probability_and_no_gradient() -> None:
    a, weights_T = _arrays(), jnp.ones(T)
    live_N = jnp.arange(N) % 3 != 0
    targets_T = jnp.full(T, 4, jnp.int32)
    grads = jax.jit(jax.grad(lambda a: cross_entropy(_segments(a, True, live_N), targets_T + V, weights_T)))(a)
    dead = np.arange(N) % 3 == 0
    assert not np.any(np.asarray(grads["table"])[dead])
    assert not np.any(np.asarray(grads["bias"])[dead])
    assert np.all(np.any(np.asarray(grads["table"])[~dead] != 0, axis=-1))
    probs = np.exp(np.asarray(log_probs(_segments(a, True, live_N)), np.float64))
    assert not np.any(probs[:, V:][:, dead])
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("target", [0, -1, N])
def test_an_impossible_target_is_loud_unless_its_weight_is_zero(target: int) -> None:
    a = _arrays()
    targets_T = jnp.full(T, 1, jnp.int32).at[0].set(target)
    weights_T = jnp.ones(T)
    both = jax.jit(jax.value_and_grad(lambda a, w: cross_entropy(_segments(a, False), targets_T, w), (0, 1)))
    assert jnp.isinf(both(a, weights_T)[0])
    loss, grads = both(a, weights_T.at[0].set(0.0))
    assert jnp.isfinite(loss)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_temporaries_are_one_chunk() -> None:
    rows, entries, width, chunk = 4096, 1024, 8, 2**16
    t = jnp.ones(rows, jnp.int32)

    def loss(h: jax.Array, table: jax.Array) -> jax.Array:
        return cross_entropy([item_segment(h, table)], t, jnp.ones(rows), chunk_elements=chunk)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.zeros((rows, width)), jnp.zeros((entries, width))).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * chunk * 4 + 4 * (rows + entries) * width * 4 < rows * entries * 4 / 8


def _rank(scores_BN: np.ndarray, k: int, exclude_BE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The oracle of top-k: sort by (−score, id), one row at a time, in NumPy."""
    scores, ids = np.full((len(scores_BN), k), -np.inf), np.zeros((len(scores_BN), k), np.int32)
    for row, row_scores in enumerate(scores_BN):
        banned = {0, *exclude_BE[row].tolist()}
        order = sorted((-s, i) for i, s in enumerate(row_scores) if i not in banned and np.isfinite(s))[:k]
        for place, (negative, i) in enumerate(order):
            scores[row, place], ids[row, place] = -negative, i
    return scores, ids


@pytest.mark.parametrize("chunk_elements", [1, 150, None])
@pytest.mark.parametrize("k", [1, 5, N + 3])
def test_top_k(k: int, chunk_elements: int | None) -> None:
    a, rng = _arrays(2), np.random.default_rng(3)
    exclude_BE = rng.integers(0, N, (T, 6)).astype(np.int32)
    exclude_BE[0] = 0
    live_N = jnp.asarray(rng.uniform(size=N) > 0.2)
    want = _rank(np.asarray(log_probs([item_segment(a["h"], a["table"], a["bias"], live_N)])), k, exclude_BE)
    scores, ids = top_k(
        a["h"], a["table"], a["bias"], live_N, k, jnp.asarray(exclude_BE), chunk_elements=chunk_elements
    )
    assert scores.dtype == jnp.float32 and ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_allclose(scores, want[0], rtol=1e-5)


def test_top_k_without_bias_mask_or_exclusions() -> None:
    a = _arrays(4)
    want = _rank(np.asarray(log_probs([item_segment(a["h"], a["table"])])), 7, np.zeros((T, 0), np.int32))
    scores, ids = top_k(a["h"], a["table"], None, None, 7)
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_allclose(scores, want[0], rtol=1e-5)


def test_top_k_ties_go_to_the_smaller_id() -> None:
    table_ND = jnp.ones((6, 2)).at[4].set(2.0)
    _, ids = top_k(jnp.ones((1, 2)), table_ND, None, None, 4)
    assert ids.tolist() == [[4, 1, 2, 3]]


def test_top_k_with_too_few_left() -> None:
    scores, ids = top_k(jnp.ones((1, 2)), jnp.ones((4, 2)), None, None, 3, jnp.asarray([[2, 3]]))
    assert ids.tolist() == [[1, 0, 0]]
    assert np.isneginf(scores[0, 1:]).all()
    np.testing.assert_allclose(scores[0, 0], np.log(1 / 3), rtol=1e-6)  # excluding does not renormalise


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "no segment"),
        ([Segment(jnp.zeros((2, 3)), jnp.zeros((5, 4)))], "segment 0 has hidden states"),
        ([Segment(jnp.zeros((2, 3)), jnp.zeros((5, 3)), jnp.zeros(4))], "bias_N"),
        ([Segment(jnp.zeros((3, 3)), jnp.zeros((5, 3)))], "one axis of positions"),
    ],
)
def test_bad_shapes(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softmax.cross_entropy(segments, jnp.zeros(2, jnp.int32), jnp.zeros(2))


def test_padding_may_stand_anywhere_and_costs_no_chunk() -> None:
    """Rows of weight 0 are gathered into chunks that are skipped: value and gradients as without these rows."""
    rng = np.random.default_rng(3)
    h, table = rng.standard_normal((40, 5)).astype(np.float32), rng.standard_normal((9, 5)).astype(np.float32)
    targets, weights = rng.integers(0, 9, 40), (rng.random(40) < 0.4).astype(np.float32)
    real = weights > 0

    def loss(h: jax.Array, table: jax.Array, targets: np.ndarray, weights: np.ndarray) -> jax.Array:
        return cross_entropy([Segment(h, table)], jnp.asarray(targets), jnp.asarray(weights), chunk_elements=27)

    with_grad = jax.value_and_grad(loss, argnums=(0, 1))
    value, (grad_h, grad_table) = with_grad(h, table, targets, weights)
    alone, (alone_h, alone_table) = with_grad(h[real], table, targets[real], weights[real])
    assert value == pytest.approx(float(alone), rel=1e-5)
    np.testing.assert_allclose(grad_h[real], alone_h, atol=1e-5)
    np.testing.assert_array_equal(grad_h[~real], 0)
    np.testing.assert_allclose(grad_table, alone_table, atol=1e-5)
