"""k-means over item vectors, plain or with clusters of equal capacity.

Legend: N vectors, C clusters, D width, R vectors a chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DISTANCE_ELEMENTS = 2**22
"""Distances [R, C] alive at a time: 16 MiB in float32."""


def kmeans(
    vectors_ND: np.ndarray | jax.Array, num_clusters: int, key: jax.Array, *, balanced: bool = False, rounds: int = 30
) -> np.ndarray:
    """An assignment int32 [N] of vectors to C clusters, none empty; the same for the same arguments.

    Lloyd's iteration from k-means++ seeds (Arthur and Vassilvitskii, 2007), until nothing moves or for `rounds`; a
    cluster that runs empty takes the vector farthest from its centroid. Distances are Euclidean: normalise the rows
    for cosine.

    Args:
      vectors_ND: float [N, D], all finite.
      num_clusters: C.
      key: for the seeds.
      balanced: no cluster holds more than ⌈N/C⌉: from the plain centroids, vectors go to the nearest cluster that has
        room, and a full cluster keeps its nearest.
      rounds: iterations at most.

    Raises:
      ValueError: C is not in [1, N], or a vector is not finite.
    """
    vectors = np.asarray(vectors_ND, np.float32)
    if not 1 <= num_clusters <= len(vectors):
        raise ValueError(f"kmeans: {num_clusters} clusters of {len(vectors)} vectors; expected 1 to {len(vectors)}")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"kmeans: row {int(np.argmin(finite))} of the vectors is not finite")
    # Far from the origin ‖x‖² − 2x·c + ‖c‖² cancels: distances do not change when the mean is taken off.
    x_ND = jnp.asarray(vectors - vectors.mean(axis=0))
    state = _lloyd(x_ND, _seeds(x_ND, num_clusters, key), rounds)
    x, centroids, assignment = (np.asarray(a) for a in (x_ND, state.centroids_CD, state.assignment_N))
    if balanced:
        assignment = _assign_with_capacity(x, centroids, -(-len(x) // num_clusters))
    return _fill_empty(x, centroids, assignment)


class _State(NamedTuple):
    centroids_CD: jax.Array
    assignment_N: jax.Array
    moved: jax.Array
    round: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def _seeds(x_ND: jax.Array, num_clusters: int, key: jax.Array) -> jax.Array:
    """k-means++: each further seed is drawn with probability ∝ its squared distance from the nearest seed."""

    def add(c: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        centroids_CD, nearest_N = carry
        # Where all vectors lie on seeds already, any will do.
        logits_N = jnp.where(nearest_N.max() > 0, jnp.log(nearest_N), 0.0)
        seed_D = x_ND[jax.random.categorical(jax.random.fold_in(key, c), logits_N)]
        distance_N = jnp.sum((x_ND - seed_D) ** 2, axis=-1)
        return centroids_CD.at[c].set(seed_D), jnp.minimum(nearest_N, distance_N)

    first = jax.random.randint(jax.random.fold_in(key, 0), (), 0, x_ND.shape[0])
    centroids_CD = jnp.zeros((num_clusters, x_ND.shape[1])).at[0].set(x_ND[first])
    nearest_N = jnp.sum((x_ND - x_ND[first]) ** 2, axis=-1)
    return jax.lax.fori_loop(1, num_clusters, add, (centroids_CD, nearest_N))[0]


@functools.partial(jax.jit, static_argnums=2)
def _lloyd(x_ND: jax.Array, centroids_CD: jax.Array, rounds: int) -> _State:
    """Lloyd's iteration; the centroids returned are those that the assignment was made with."""

    every_C = jnp.ones(centroids_CD.shape[0], bool)

    def step(state: _State) -> _State:
        centroids_CD = _means(x_ND, state)
        assignment_N, _ = _nearest(x_ND, centroids_CD, every_C)
        return _State(centroids_CD, assignment_N, jnp.any(assignment_N != state.assignment_N), state.round + 1)

    assignment_N, _ = _nearest(x_ND, centroids_CD, every_C)
    start = _State(centroids_CD, assignment_N, jnp.array(True), jnp.array(0))
    return jax.lax.while_loop(lambda state: state.moved & (state.round < rounds), step, start)


def _means(x_ND: jax.Array, state: _State) -> jax.Array:
    """The mean of each cluster; the j-th empty one gets the vector that lies j-th farthest from its centroid."""
    num_clusters = state.centroids_CD.shape[0]
    sums_CD = jax.ops.segment_sum(x_ND, state.assignment_N, num_clusters)
    sizes_C = jax.ops.segment_sum(jnp.ones(x_ND.shape[0]), state.assignment_N, num_clusters)
    empty_C = sizes_C == 0
    distance_N = jnp.sum((x_ND - state.centroids_CD[state.assignment_N]) ** 2, axis=-1)
    _, farthest_C = jax.lax.top_k(distance_N, num_clusters)
    spare_CD = x_ND[farthest_C[jnp.maximum(jnp.cumsum(empty_C) - 1, 0)]]
    return jnp.where(empty_C[:, None], spare_CD, sums_CD / jnp.maximum(sizes_C, 1)[:, None])


@jax.jit
def _nearest(x_ND: jax.Array, centroids_CD: jax.Array, open_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the nearest of the open centroids int32 [N], its squared distance [N]), in chunks of vectors."""
    rows = max(1, DISTANCE_ELEMENTS // centroids_CD.shape[0])
    norms_C = jnp.where(open_C, jnp.sum(centroids_CD**2, axis=-1), jnp.inf)

    def nearest(x_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        distance_C = norms_C - 2 * centroids_CD @ x_D
        return jnp.argmin(distance_C).astype(jnp.int32), jnp.min(distance_C) + jnp.sum(x_D**2)

    return jax.lax.map(nearest, x_ND, batch_size=min(rows, x_ND.shape[0]))


def _assign_with_capacity(x_ND: np.ndarray, centroids_CD: np.ndarray, capacity: int) -> np.ndarray:
    """Every vector asks the nearest cluster that has room; a cluster takes the nearest that ask, as many as fit.

    At least one cluster fills in a round or all are placed, so at most C rounds are needed.
    """
    assignment = np.full(len(x_ND), -1, np.int32)
    room = np.full(len(centroids_CD), capacity)
    waiting = np.arange(len(x_ND))
    while waiting.size:
        # All N vectors each round, so that the shapes stay and one compilation serves.
        wishes, distances = _nearest(jnp.asarray(x_ND), jnp.asarray(centroids_CD), jnp.asarray(room > 0))
        wish, distance = np.asarray(wishes)[waiting], np.asarray(distances)[waiting]
        order = np.lexsort((waiting, distance, wish))  # by cluster, then distance, then row: deterministic
        starts = np.searchsorted(wish[order], wish[order], side="left")
        taken = order[np.arange(order.size) - starts < room[wish[order]]]
        assignment[waiting[taken]] = wish[taken]
        room -= np.bincount(wish[taken], minlength=len(room))
        waiting = np.delete(waiting, taken)
    return assignment


def _fill_empty(x_ND: np.ndarray, centroids_CD: np.ndarray, assignment_N: np.ndarray) -> np.ndarray:
    """Gives each empty cluster the vector farthest from its centroid among those that do not live alone.

    Duplicated vectors leave empty clusters whatever the centroids are.
    """
    assignment = assignment_N.astype(np.int32)
    sizes = np.bincount(assignment, minlength=len(centroids_CD))
    distance = ((x_ND - centroids_CD[assignment]) ** 2).sum(axis=1)
    farthest = iter(np.argsort(-distance, kind="stable"))
    for cluster in np.flatnonzero(sizes == 0):
        row = next(row for row in farthest if sizes[assignment[row]] > 1)
        sizes[assignment[row]] -= 1
        assignment[row] = cluster
    return assignment
