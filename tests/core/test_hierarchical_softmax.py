"""`core.hierarchical_softmax`: every property that the two-level softmax promises, against plain loops in float64.

Legend: T positions, B rows, N items (1 … N), C clusters, V words, D width, E exclusions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import hierarchical_softmax as two_level
from core import softmax
from core.clustering import Clusters, from_assignment
from core.hierarchical_softmax import Method, TwoLevelParams
from core.softmax import Segment

D, T, V = 6, 40, 9
METHODS: tuple[Method, ...] = ("blocks", "padded", "ragged")
EQUAL = np.arange(20) % 4
UNEQUAL = np.array([3, 1, 1, 2, 2, 2, 2, 0, 1, 2, 2, 4, 4, 2, 2, 2, 0, 2, 2])
"""Sizes 2, 3, 11, 1, 2: one cluster of most items, one of one. Cluster 0, which positions without an item point at
inside, is not that one: a term wrongly added there would be 0 and go unseen."""

# Compiled once a shape: operation by operation, JAX would compile each primitive on its own.
loss_of = jax.jit(two_level.loss, static_argnames=("method", "chunk_elements"))
top_k_of = jax.jit(two_level.top_k, static_argnames=("k", "chunk_elements"))
log_probs_of = jax.jit(two_level.log_probs)


def _params(num_clusters: int, num_items: int, seed: int = 0) -> TwoLevelParams:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return TwoLevelParams(
        normal(num_clusters, D), normal(num_clusters), normal(num_items + 1, D), normal(num_items + 1)
    )


def _case(assignment: np.ndarray, seed: int = 0) -> tuple[jax.Array, TwoLevelParams, Clusters, jax.Array, jax.Array]:
    """(h, params, clusters, targets, weights); some weights are 0, with the padding item as the target of one."""
    rng = np.random.default_rng(seed + 100)
    num_clusters, num_items = int(assignment.max()) + 1, assignment.size
    h_TD = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    targets_T, weights_T = rng.integers(1, num_items + 1, T), rng.uniform(size=T) * (rng.uniform(size=T) > 0.2)
    targets_T[0], weights_T[0] = 0, 0.0
    clusters = from_assignment(assignment, num_clusters)
    params = _params(num_clusters, num_items, seed)
    return h_TD, params, clusters, jnp.asarray(targets_T, jnp.int32), jnp.asarray(weights_T, jnp.float32)


def _logsumexp(x: np.ndarray) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def _oracle(h_BD: jax.Array, params: TwoLevelParams, assignment: np.ndarray) -> np.ndarray:
    """log p(i | h) [B, N + 1], item by item, in float64."""
    h, k, a, e, b = (np.asarray(x, np.float64) for x in (h_BD, *dataclasses.astuple(params)))
    out = np.full((len(h), len(e)), -np.inf)
    for row, x in enumerate(h):
        first = k @ x + a
        for i, cluster in enumerate(assignment, start=1):
            mates = 1 + np.flatnonzero(assignment == cluster)
            second = e[mates] @ x + b[mates]
            out[row, i] = first[cluster] - _logsumexp(first) + e[i] @ x + b[i] - _logsumexp(second)
    return out


Result = tuple[np.ndarray, list[np.ndarray]]
_two_level = jax.jit(jax.value_and_grad(two_level.loss, (0, 1)), static_argnames=("method", "chunk_elements"))


def _two_level_result(*args: Any, **options: Any) -> Result:
    """The loss, and its gradients by h, K, a, e and b."""
    return _result(_two_level(*args, **options))


def _plain_result(loss: Callable[[jax.Array, TwoLevelParams], jax.Array], *args: Any) -> Result:
    """The same of another loss of (h, params)."""
    return _result(jax.jit(jax.value_and_grad(loss, (0, 1)))(*args))


def _result(value_and_grads: tuple[jax.Array, Any]) -> Result:
    value, grads = value_and_grads
    return np.asarray(value), [np.asarray(g) for g in jax.tree.leaves(grads)]


def _assert_equal(got: Result, want: Result, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for got_grad, want_grad in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(got_grad, want_grad, **tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("assignment", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_log_probs_equal_the_oracle_and_sum_to_one(assignment: np.ndarray, seed: int) -> None:
    h_TD, params, clusters, _, _ = _case(assignment, seed)
    got = np.asarray(log_probs_of(h_TD, params, clusters))
    np.testing.assert_allclose(got[:, 1:], _oracle(h_TD, params, assignment)[:, 1:], rtol=1e-5, atol=1e-5)
    assert np.isneginf(got[:, 0]).all()
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("assignment", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_loss_equals_the_oracle(assignment: np.ndarray, method: Method, seed: int) -> None:
    h_TD, params, clusters, targets_T, weights_T = _case(assignment, seed)
    got = loss_of(h_TD, params, clusters, targets_T, weights_T, method=method, chunk_elements=500)
    log_p = _oracle(h_TD, params, assignment)
    used = np.flatnonzero(np.asarray(weights_T))
    want = -sum(float(weights_T[t]) * log_p[t, int(targets_T[t])] for t in used)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("assignment", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_methods_agree_in_loss_and_gradients(assignment: np.ndarray) -> None:
    """… with each other and with plain autodiff through the dense log-probabilities."""
    h_TD, params, clusters, targets_T, weights_T = _case(assignment)

    def dense(h: jax.Array, p: TwoLevelParams) -> jax.Array:
        log_p = jnp.take_along_axis(log_probs_of(h, p, clusters), targets_T[:, None], axis=-1)[:, 0]
        return -jnp.sum(jnp.where(weights_T != 0, log_p, 0.0) * weights_T)

    want = _plain_result(dense, h_TD, params)
    for method in METHODS:
        for chunk_elements in (300, None):
            got = _two_level_result(
                h_TD, params, clusters, targets_T, weights_T, method=method, chunk_elements=chunk_elements
            )
            _assert_equal(got, want)


@pytest.mark.parametrize("method", METHODS)
def test_permuting_items_and_clusters_changes_nothing(method: Method) -> None:
    h_TD, params, clusters, targets_T, weights_T = _case(UNEQUAL)
    rng = np.random.default_rng(5)
    new_id_N1 = np.concatenate([[0], 1 + rng.permutation(UNEQUAL.size)])
    new_cluster_C = rng.permutation(clusters.num_clusters)
    old_id_N1, old_cluster_C = np.argsort(new_id_N1), np.argsort(new_cluster_C)
    permuted_clusters = from_assignment(new_cluster_C[UNEQUAL][old_id_N1[1:] - 1], clusters.num_clusters)
    permuted = TwoLevelParams(
        params.centroids_CD[old_cluster_C],
        params.centroid_bias_C[old_cluster_C],
        params.items_N1D[old_id_N1],
        params.item_bias_N1[old_id_N1],
    )
    new_targets_T = jnp.asarray(new_id_N1)[targets_T]
    want = _two_level_result(h_TD, params, clusters, targets_T, weights_T, method=method)
    value, (grad_h, grad_k, grad_a, grad_e, grad_b) = _two_level_result(
        h_TD, permuted, permuted_clusters, new_targets_T, weights_T, method=method
    )
    grads = [grad_h, grad_k[new_cluster_C], grad_a[new_cluster_C], grad_e[new_id_N1], grad_b[new_id_N1]]
    _assert_equal((value, grads), want)


@pytest.mark.parametrize("method", METHODS)
def test_one_cluster_is_the_plain_softmax(method: Method) -> None:
    h_TD, params, clusters, targets_T, weights_T = _case(np.zeros(12, int))

    def plain(h: jax.Array, p: TwoLevelParams) -> jax.Array:
        return softmax.cross_entropy([softmax.item_segment(h, p.items_N1D, p.item_bias_N1)], targets_T, weights_T)

    _assert_equal(
        _two_level_result(h_TD, params, clusters, targets_T, weights_T, method=method),
        _plain_result(plain, h_TD, params),
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_cluster_an_item_is_the_softmax_over_clusters(method: Method) -> None:
    """… and e and b have exactly zero gradient: log p(i | c) = 0 whatever they are."""
    h_TD, params, clusters, targets_T, weights_T = _case(np.arange(12)[::-1].copy())
    cluster_T = jnp.maximum(clusters.cluster_of_item_N1[targets_T], 0)

    def over_clusters(h: jax.Array, p: TwoLevelParams) -> jax.Array:
        return softmax.cross_entropy([Segment(h, p.centroids_CD, p.centroid_bias_C)], cluster_T, weights_T)

    got = _two_level_result(h_TD, params, clusters, targets_T, weights_T, method=method)
    _assert_equal(got, _plain_result(over_clusters, h_TD, params))
    assert not got[1][3].any() and not got[1][4].any()
    assert got[1][1].any()


def test_a_cluster_of_one_costs_only_its_cluster() -> None:
    h_TD, params, clusters, _, _ = _case(UNEQUAL)
    alone = 1  # the only item of cluster 3
    first_TC = softmax.log_probs([Segment(h_TD, params.centroids_CD, params.centroid_bias_C)])
    np.testing.assert_array_equal(log_probs_of(h_TD, params, clusters)[:, alone], first_TC[:, 3])


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_never_live(method: Method) -> None:
    """Item 0 fills the padded slots of the small clusters: were it live anywhere, its huge bias would show."""
    h_TD, params, clusters, targets_T, weights_T = _case(UNEQUAL)
    loud = dataclasses.replace(
        params, items_N1D=params.items_N1D.at[0].set(50.0), item_bias_N1=params.item_bias_N1.at[0].set(1e4)
    )

    got = _two_level_result(h_TD, loud, clusters, targets_T, weights_T, method=method)
    _assert_equal(got, _two_level_result(h_TD, params, clusters, targets_T, weights_T, method=method), rtol=0, atol=0)
    assert not got[1][3][0].any() and got[1][4][0] == 0
    np.testing.assert_array_equal(log_probs_of(h_TD, loud, clusters), log_probs_of(h_TD, params, clusters))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_does_not_determine_the_raw_dot_ranking(method: Method) -> None:
    """The seed's defect: one vector added to every item of a cluster."""
    h_TD, params, clusters, targets_T, weights_T = _case(UNEQUAL)
    moved_items = 1 + np.flatnonzero(UNEQUAL == 2)
    shift_D = jnp.asarray(np.random.default_rng(9).normal(size=D), jnp.float32)
    moved = dataclasses.replace(params, items_N1D=params.items_N1D.at[moved_items].add(shift_D))
    losses = [loss_of(h_TD, p, clusters, targets_T, weights_T, method=method) for p in (params, moved)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    _, exact = top_k_of(h_TD, params, clusters, 5)
    _, exact_moved = top_k_of(h_TD, moved, clusters, 5)
    np.testing.assert_array_equal(exact, exact_moved)
    raw, raw_moved = (jax.lax.top_k(two_level.raw_dot_scores(h_TD, p), 5)[1] for p in (params, moved))
    assert np.mean(np.any(np.asarray(raw != raw_moved), axis=-1)) > 0.5


def test_raw_dot_scores() -> None:
    h_TD, params, _, _, _ = _case(UNEQUAL)
    got = np.asarray(two_level.raw_dot_scores(h_TD, params))
    want = np.asarray(h_TD) @ np.asarray(params.items_N1D).T + np.asarray(params.item_bias_N1)
    np.testing.assert_allclose(got[:, 1:], want[:, 1:], rtol=1e-5, atol=1e-5)
    assert np.isneginf(got[:, 0]).all()


def _words(seed: int = 7) -> Segment:
    rng = np.random.default_rng(seed)
    arrays = (rng.normal(size=(T, 4)), rng.normal(size=(V, 4)), rng.normal(size=V))
    return Segment(*(jnp.asarray(x, jnp.float32) for x in arrays))


@pytest.mark.parametrize("method", METHODS)
def test_joint_with_words(method: Method) -> None:
    """Targets are words or items; the oracle is log p(word), or log p(an item comes next) + log p(item | an item)."""
    h_TD, params, clusters, targets_T, weights_T = _case(UNEQUAL)
    words = _words()
    is_word_T = np.random.default_rng(8).uniform(size=T) < 0.4
    joint_targets_T = jnp.where(is_word_T, jnp.arange(T) % V, V + targets_T).astype(jnp.int32)
    first = np.asarray(
        softmax.log_probs([words, Segment(h_TD, params.centroids_CD, params.centroid_bias_C)]), np.float64
    )
    item_next_T = np.log(np.exp(first[:, V:]).sum(-1))
    joint = np.concatenate([first[:, :V], item_next_T[:, None] + _oracle(h_TD, params, UNEQUAL)], axis=-1)
    np.testing.assert_allclose(np.exp(joint).sum(-1), 1, atol=1e-6)
    used = np.flatnonzero(np.asarray(weights_T))
    want = -sum(float(weights_T[t]) * joint[t, int(joint_targets_T[t])] for t in used)

    def loss(words: Segment, params: TwoLevelParams) -> jax.Array:
        return loss_of(h_TD, params, clusters, joint_targets_T, weights_T, method=method, words=words)

    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(words, params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


def test_word_targets_alone_leave_the_items_untouched() -> None:
    h_TD, params, clusters, _, weights_T = _case(UNEQUAL)
    targets_T = jnp.arange(T, dtype=jnp.int32) % V
    words = _words()
    grads = jax.jit(jax.grad(lambda p: two_level.loss(h_TD, p, clusters, targets_T, weights_T, words=words)))(params)
    assert not np.any(grads.items_N1D) and not np.any(grads.item_bias_N1)
    assert np.any(grads.centroids_CD)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("offset", [0, UNEQUAL.size + 1, -V - 1], ids=["item 0", "past the last", "negative"])
def test_an_impossible_target_is_loud(joint: bool, offset: int) -> None:
    h_TD, params, clusters, targets_T, weights_T = _case(UNEQUAL)
    words, base = (_words(), V) if joint else (None, 0)
    bad_T = (targets_T + base).at[1].set(base + offset)
    for weight in (1.0, 0.0):
        loss = loss_of(h_TD, params, clusters, bad_T, weights_T.at[1].set(weight), words=words)
        assert bool(jnp.isinf(loss)) == (weight != 0)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_hidden_states(method: Method) -> None:
    """bf16 has 8 bits; the parameters' gradients come back in their own float32."""
    h_TD, params, clusters, targets_T, weights_T = _case(UNEQUAL)

    want = _two_level_result(h_TD, params, clusters, targets_T, weights_T, method=method)
    value, grads = _two_level_result(h_TD.astype(jnp.bfloat16), params, clusters, targets_T, weights_T, method=method)
    assert [g.dtype for g in grads] == [jnp.bfloat16, *[np.float32] * 4]
    np.testing.assert_allclose(value, want[0], rtol=1e-2)
    for got_grad, want_grad in zip(grads, want[1], strict=True):
        np.testing.assert_allclose(got_grad.astype(np.float32), want_grad, atol=0.06)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("k", [1, 6, UNEQUAL.size + 4])
@pytest.mark.parametrize("chunk_elements", [1, None])
def test_top_k(seed: int, k: int, chunk_elements: int | None) -> None:
    h_TD, params, clusters, _, _ = _case(UNEQUAL, seed)
    exclude_TE = np.random.default_rng(seed).integers(0, UNEQUAL.size + 1, (T, 5)).astype(np.int32)
    want = _oracle(h_TD, params, UNEQUAL)
    scores, ids = top_k_of(h_TD, params, clusters, k, jnp.asarray(exclude_TE), chunk_elements=chunk_elements)
    for row in range(T):
        allowed = [i for i in range(1, UNEQUAL.size + 1) if i not in exclude_TE[row]]
        order = sorted(allowed, key=lambda i: -want[row, i])[:k]
        assert ids[row, : len(order)].tolist() == order
        np.testing.assert_allclose(scores[row, : len(order)], want[row, order], rtol=1e-5, atol=1e-5)
        assert not np.any(ids[row, len(order) :]) and np.isneginf(scores[row, len(order) :]).all()


def test_top_k_ties_go_to_the_smaller_id() -> None:
    """All parameters zero and clusters of two: every item has p = 1/6."""
    clusters = from_assignment(np.array([2, 0, 1, 0, 1, 2]), 3)
    params = TwoLevelParams(jnp.zeros((3, D)), jnp.zeros(3), jnp.zeros((7, D)), jnp.zeros(7))
    scores, ids = top_k_of(jnp.ones((1, D)), params, clusters, 4, jnp.asarray([[2]]))
    assert ids.tolist() == [[1, 3, 4, 5]]
    np.testing.assert_allclose(scores, np.log(1 / 6), rtol=1e-6)


@pytest.mark.parametrize(("positions", "clusters", "want"), [(12800, 59, 64), (12800, 317, 16), (5, 100, 8)])
def test_block_rows(positions: int, clusters: int, want: int) -> None:
    assert two_level.block_rows(positions, clusters) == want


@pytest.mark.parametrize("spread", ["one cluster", "one each", "none"])
def test_blocks_hold_every_position(spread: str) -> None:
    """The number of blocks is fixed in advance: it must suffice for the worst spread of targets."""
    assignment = np.repeat(np.arange(40), 2)
    h_TD, params, clusters, _, _ = _case(assignment)
    targets_T = jnp.full(T, 1) if spread == "one cluster" else 1 + 2 * jnp.arange(T)
    weights_T = jnp.zeros(T) if spread == "none" else jnp.ones(T)
    losses = [loss_of(h_TD, params, clusters, targets_T, weights_T, method=m) for m in METHODS]
    np.testing.assert_allclose(losses, losses[1], rtol=1e-5)


def test_temporaries_are_one_chunk() -> None:
    """T·M·D numbers gathered at once would be 64 MiB; one chunk is 1 MiB, and a sort and a copy of h come on top."""
    rows, num_clusters, size, width = 4096, 16, 64, 64
    clusters = from_assignment(np.arange(num_clusters * size) % num_clusters, num_clusters)
    params = TwoLevelParams(
        jnp.zeros((num_clusters, width)),
        jnp.zeros(num_clusters),
        jnp.zeros((num_clusters * size + 1, width)),
        jnp.zeros(num_clusters * size + 1),
    )
    for method in ("blocks", "padded"):

        def loss(h: jax.Array, p: TwoLevelParams, method: Method = method) -> jax.Array:
            targets_T = jnp.ones(rows, jnp.int32)
            return loss_of(h, p, clusters, targets_T, jnp.ones(rows), method=method, chunk_elements=2**18)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.zeros((rows, width)), params).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary < 16 * 2**20 < rows * size * width * 4 / 2


def test_bad_arguments() -> None:
    h_TD, params, clusters, targets_T, weights_T = _case(UNEQUAL)
    with pytest.raises(ValueError, match=r"items_N1D has shape \(20, 6\).*need \(21, 6\)"):
        two_level.log_probs(h_TD, params, from_assignment(np.r_[UNEQUAL, 0], 5))
    with pytest.raises(ValueError, match="centroids_CD"):
        top_k_of(h_TD[:, :3], params, clusters, 2)
    with pytest.raises(ValueError, match="method is 'sorted'"):
        loss_of(h_TD, params, clusters, targets_T, weights_T, method="sorted")  # type: ignore[arg-type]
