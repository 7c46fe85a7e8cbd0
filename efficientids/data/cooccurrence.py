"""Item vectors from who is consumed near whom: what clusters are made of before anything is trained.

Legend: N items (1 … N), U users, E interactions.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

DENSE_ITEMS = 500
"""Up to so many items the full decomposition is quicker than the iterative one."""


def cooccurrence_vectors(
    item_ids: np.ndarray, offsets: np.ndarray, num_items: int, dim: int, window: int, seed: int
) -> np.ndarray:
    """Vectors float32 [N, dim] of items 1 … N: U·√S of the truncated SVD of their PPMI matrix.

    PPMI(i, j) = max(0, log(n_ij · n / (n_i · n_j))), n_ij the number of times that j stands within `window` places of
    i in one history (Levy and Goldberg, 2014: word2vec factorises a shifted form of it). Pass the training part of the
    histories alone, or the clusters will know the test items. An item without neighbours has the zero vector; of
    fewer items than `dim`, the columns past N are zero.

    Args:
      item_ids: int [E], the histories one after another, values 1 … N.
      offsets: int [U + 1], where each history starts; the last is E.
      num_items: N.
      dim: width of the vectors, ≥ 1.
      window: places on either side that count as near, ≥ 1.
      seed: of the iterative solver's start; the same arguments give the same vectors.

    Raises:
      ValueError: ids out of range, or offsets that do not fit.
    """
    ids, starts = np.asarray(item_ids), np.asarray(offsets)
    if ids.size and not (ids.min() >= 1 and ids.max() <= num_items):
        raise ValueError(f"cooccurrence_vectors: item ids {ids.min()} to {ids.max()}; expected 1 to {num_items}")
    if starts.size == 0 or starts[0] != 0 or starts[-1] != ids.size or np.any(np.diff(starts) < 0):
        raise ValueError(f"cooccurrence_vectors: offsets must ascend from 0 to the {ids.size} interactions")
    if dim < 1 or window < 1:
        raise ValueError(f"cooccurrence_vectors: dim is {dim} and window {window}; expected at least 1")
    left, values = _svd(_ppmi(_counts(ids - 1, starts, num_items, window)), min(dim, num_items), seed)
    vectors = np.zeros((num_items, dim), np.float32)
    vectors[:, : values.size] = _fix_signs(left) * np.sqrt(values)
    return vectors


def _counts(ids: np.ndarray, offsets: np.ndarray, num_items: int, window: int) -> scipy.sparse.csr_array:
    """n_ij as a symmetric sparse matrix [N, N]; an item is no neighbour of itself."""
    user = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    counts = scipy.sparse.csr_array((num_items, num_items), dtype=np.float64)
    for shift in range(1, min(window, ids.size - 1) + 1):
        near = (user[shift:] == user[:-shift]) & (ids[shift:] != ids[:-shift])
        pairs = (ids[:-shift][near], ids[shift:][near])
        counts += scipy.sparse.coo_array((np.ones(pairs[0].size), pairs), shape=counts.shape).tocsr()
    return (counts + counts.T).tocsr()


def _ppmi(counts: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Positive pointwise mutual information of a symmetric matrix of counts."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    entries = counts.tocoo()
    rows, columns = entries.coords
    information = np.log(entries.data * totals.sum() / (totals[rows] * totals[columns]))
    kept = information > 0
    return scipy.sparse.csr_array((information[kept], (rows[kept], columns[kept])), shape=counts.shape)


def _svd(matrix: scipy.sparse.csr_array, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `rank` left singular vectors [N, rank] and values [rank], largest first."""
    num_items = matrix.shape[0]
    if num_items <= DENSE_ITEMS or rank >= num_items - 1 or matrix.nnz == 0:
        left, values, _ = np.linalg.svd(matrix.toarray())
        return left[:, :rank], values[:rank]
    start = np.random.default_rng(seed).normal(size=num_items)
    left, values, _ = scipy.sparse.linalg.svds(matrix, k=rank, v0=start, return_singular_vectors="u")
    order = np.argsort(-values)
    return left[:, order], values[order]


def _fix_signs(left: np.ndarray) -> np.ndarray:
    """Turns each vector so that its largest entry is positive: a decomposition leaves the sign open."""
    largest = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    return left * np.where(largest < 0, -1.0, 1.0)
