"""Items → clusters: given in a file, or by popularity; the arrays that the two-level softmax works with.

Legend: N items (1 … N; 0 is padding), C clusters, M members of the largest cluster.

An assignment is an int32 array [N]: the cluster of item i is at i − 1. `load_clustering`, `by_popularity` and
`kmeans` give one, `from_assignment` checks it and makes the arrays.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.kmeans import kmeans

__all__ = ["Clusters", "by_popularity", "default_num_clusters", "from_assignment", "kmeans", "load_clustering"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clusters:
    """A partition of the items 1 … N into C clusters, none empty.

    Attributes:
      cluster_of_item_N1: int32 [N + 1], the cluster of each item; −1 for item 0.
      slot_of_item_N1: int32 [N + 1], the item's place in its cluster's row of `members_CM`; 0 for item 0.
      members_CM: int32 [C, M], the items of each cluster in ascending order, padded on the right with 0.
      sizes_C: int32 [C], all at least 1.
    """

    cluster_of_item_N1: jax.Array
    slot_of_item_N1: jax.Array
    members_CM: jax.Array
    sizes_C: jax.Array

    @property
    def num_clusters(self) -> int:
        return self.members_CM.shape[0]

    @property
    def num_items(self) -> int:
        return self.cluster_of_item_N1.shape[0] - 1

    @property
    def padding_factor(self) -> float:
        """C·M / N: what the padded layout costs over the items themselves; 1 when all clusters are equal."""
        return self.members_CM.size / self.num_items


def from_assignment(assignment_N: np.ndarray, num_clusters: int) -> Clusters:
    """The arrays of a clustering.

    Args:
      assignment_N: int [N], the cluster in [0, C) of items 1 … N.
      num_clusters: C.

    Raises:
      ValueError: no item, a cluster id out of range or not whole, or a cluster without items. (The first level would
        give an empty cluster probability that no item receives: the items' probabilities would not sum to 1.)
    """
    assignment = np.asarray(assignment_N)
    if assignment.ndim != 1 or assignment.size == 0 or not np.issubdtype(assignment.dtype, np.integer):
        raise ValueError(
            f"clustering: expected whole numbers of shape [N], N ≥ 1; found {assignment.dtype} {assignment.shape}"
        )
    wrong = np.flatnonzero((assignment < 0) | (assignment >= num_clusters))
    if wrong.size:
        item = int(wrong[0])
        raise ValueError(
            f"clustering: item {item + 1} is in cluster {assignment[item]}; clusters are 0 to {num_clusters - 1}"
            f" ({wrong.size} items out of range)"
        )
    sizes = np.bincount(assignment, minlength=num_clusters)
    empty = np.flatnonzero(sizes == 0)
    if empty.size:
        raise ValueError(
            f"clustering: {empty.size} of {num_clusters} clusters have no item, the first is {empty[0]};"
            " number the clusters 0 to C − 1 without gaps"
        )
    order = np.argsort(assignment, kind="stable")
    slots = np.arange(assignment.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members = np.zeros((num_clusters, np.max(sizes)), np.int32)
    members[assignment[order], slots] = order + 1
    slot_of_item = np.zeros(assignment.size + 1, np.int32)
    slot_of_item[order + 1] = slots
    cluster_of_item = np.concatenate([[-1], assignment]).astype(np.int32)
    arrays = (cluster_of_item, slot_of_item, members, sizes.astype(np.int32))
    return Clusters(*(jnp.asarray(array) for array in arrays))


def default_num_clusters(num_items: int) -> int:
    """⌈√N⌉: both levels then have about √N entries."""
    return math.isqrt(num_items - 1) + 1


def load_clustering(path: Path, num_items: int) -> np.ndarray:
    """Reads an assignment int32 [N] from a file; pass it to `from_assignment` with C = its maximum + 1.

    Formats: `.npy`, whole numbers [N], or [N + 1] with −1 for item 0; `.json`, a list of the same, or an object
    {item: cluster} with every item 1 … N as a key. Items are the data set's indices.

    Raises:
      ValueError: the file cannot be read as one of these, or does not give every item one whole number.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a .npy or .json file of one cluster an item")
    if path.suffix == ".npy":
        values = _read_npy(path)
    elif path.suffix == ".json":
        values = _read_json(path, num_items)
    else:
        raise ValueError(f"{path}: a clustering is a .npy or a .json file; found {path.suffix or 'no suffix'!r}")
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{path}: expected a list of whole numbers; found {values.dtype} of shape {values.shape}")
    if values.size == num_items + 1:
        if values[0] != -1:
            raise ValueError(
                f"{path}: {values.size} entries for {num_items} items: entry 0 would be the padding item, whose cluster"
                f" must be -1; found {values[0]}. Give one entry an item, or -1 first"
            )
        values = values[1:]
    if values.size != num_items:
        raise ValueError(f"{path}: {values.size} entries; the data set has {num_items} items")
    return values.astype(np.int32)


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a NumPy array of numbers ({error}); write it with numpy.save") from error


def _read_json(path: Path, num_items: int) -> np.ndarray:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list or an object {{item: cluster}}; found {type(content).__name__}")
    if not isinstance(content, _Pairs):
        _require_whole(path, enumerate(content), "entry")
        return np.asarray(content, np.int64)
    _require_whole(path, content, "item")
    values = np.full(num_items, -1, np.int64)
    seen = np.zeros(num_items, bool)
    for key, cluster in content:
        item = int(key) if key.isascii() and key.isdigit() else 0
        if not 1 <= item <= num_items:
            raise ValueError(f"{path}: item {key!r} is not one of 1 to {num_items}")
        if seen[item - 1]:
            raise ValueError(f"{path}: item {item} is given twice; give every item one cluster")
        seen[item - 1], values[item - 1] = True, cluster
    if not seen.all():
        raise ValueError(f"{path}: item {int(np.argmin(seen)) + 1} has no cluster ({num_items - seen.sum()} missing)")
    return values


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs: a dictionary would keep the last of two equal keys and say nothing."""


def _require_whole(path: Path, pairs: Any, what: str) -> None:
    """Refuses cluster ids that are not whole numbers (`true` is none)."""
    for name, cluster in pairs:
        if type(cluster) is not int:
            raise ValueError(f"{path}: {what} {name!r} has cluster {cluster!r}; expected a whole number")


def by_popularity(counts_N: np.ndarray, num_clusters: int) -> np.ndarray:
    """Clusters of consecutive popularity ranks, the popular ones small: an assignment int32 [N].

    The expected cost of the second level is Σ_c p(c)·n_c. With clusters of local size n(r) at rank r it is
    ∫ p(r) n(r) dr under ∫ dr / n(r) = C, which is least for n(r) ∝ 1/√p(r): every cluster holds an equal share of Σ √p.

    Args:
      counts_N: interactions of items 1 … N, ≥ 0. One is added to each, so that unseen items have a share.
      num_clusters: C ≤ N.

    Raises:
      ValueError: C is not in [1, N], or a count is negative.
    """
    counts = np.asarray(counts_N, np.float64)
    _check_num_clusters(num_clusters, counts.size)
    if counts.min() < 0:
        raise ValueError(f"by_popularity: item {int(np.argmin(counts)) + 1} has count {counts.min():g}; expected ≥ 0")
    order = np.argsort(-counts, kind="stable")
    share = np.sqrt(counts[order] + 1)
    middle = (np.cumsum(share) - share / 2) / share.sum()
    ranks = np.arange(counts.size)
    # No cluster may be empty: a step of at most one a rank, and enough ranks left for the clusters to come.
    cluster = np.minimum((middle * num_clusters).astype(np.int64), num_clusters - 1)
    cluster = ranks + np.minimum.accumulate(np.minimum(cluster - ranks, 0))
    cluster = np.maximum(cluster, num_clusters - counts.size + ranks)
    assignment = np.empty(counts.size, np.int32)
    assignment[order] = cluster
    return assignment


def _check_num_clusters(num_clusters: int, num_items: int) -> None:
    if not 1 <= num_clusters <= num_items:
        raise ValueError(f"clustering: {num_clusters} clusters of {num_items} items; expected 1 to {num_items}")
