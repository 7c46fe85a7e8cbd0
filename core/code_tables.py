"""Codes → table, trie and version (`core.semantic_ids`), on the host in NumPy, without a loop over items.

Legend: N items (1 … N; 0 is padding), R rows of the code table, L levels, K_l codes of level l.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.semantic_ids import SemanticIDs, TableShape, dense_levels, version_name


def build(codes_NL: np.ndarray, level_sizes: Sequence[int], at_least: TableShape | None = None) -> SemanticIDs:
    """Codes → table, trie and version, on the host in NumPy, without a loop over items.

    Args:
        codes_NL: int [N, L], the codes of items 1 … N (item i at row i − 1), level-local; rows distinct
            (`core.suffixes` sees to it).
        level_sizes: K_l.
        at_least: a shape to fill, or to outgrow where it is too small: with the last table's, re-indexing the
            catalogue compiles nothing as long as nothing outgrows it.

    Raises:
        ValueError: not such an array, no item, an item without codes (−1 throughout), a code outside its alphabet, two
            items with equal codes, or `at_least` of other alphabets.
    """
    sizes = tuple(int(size) for size in level_sizes)
    codes = np.asarray(codes_NL)
    _check_codes(codes, sizes)
    count = len(codes)
    # Narrow integers sort by radix: 10 million items take seconds.
    columns = [codes[:, level].astype(np.min_scalar_type(size - 1)) for level, size in enumerate(sizes)]
    order = np.lexsort(columns[::-1])
    nodes: list[int] = [1]
    begins_of = [np.zeros(1, np.int32)]  # of each depth: the leaf at which each node begins
    starts, labels = [], []
    begins = np.zeros(count, bool)
    begins[0] = True
    for column in columns:
        sorted_N = column[order]
        begins[1:] |= sorted_N[1:] != sorted_N[:-1]
        node_N = np.cumsum(begins, dtype=np.int32) - 1
        starts.append(node_N[begins_of[-1]])
        begins_of.append(np.flatnonzero(begins).astype(np.int32))
        labels.append(sorted_N[begins_of[-1]].astype(np.int32))
        nodes.append(len(begins_of[-1]))
    if nodes[-1] < count:
        _refuse_equal(codes, order, begins)
    widest = [int(np.diff(s, append=n).max()) for s, n in zip(starts, nodes[1:], strict=True)]
    shape = _shape_of(sizes, count, nodes, widest)
    shape = shape if at_least is None else shape.joined(at_least)
    return SemanticIDs(shape, _arrays(codes, order, starts, labels, nodes, shape))


def _shape_of(sizes: tuple[int, ...], count: int, nodes: Sequence[int], widest: Sequence[int]) -> TableShape:
    """The padded shape of a trie with these many nodes a depth and children at most a node."""
    dense = dense_levels(sizes)
    most = [math.prod(sizes[:depth]) for depth in range(len(nodes))]
    # Rows of a dense table are the nodes that there can be at all, so that its shape follows from the alphabets.
    padded = tuple(
        limit if depth < dense else min(_power_of_two(n), limit)
        for depth, (n, limit) in enumerate(zip(nodes, most, strict=True))
    )
    widths = tuple(
        size if level < dense else min(_power_of_two(width), size)
        for level, (size, width) in enumerate(zip(sizes, widest, strict=True))
    )
    return TableShape(sizes, _power_of_two(count + 1), padded, widths)


def _arrays(
    codes_NL: np.ndarray,
    order: np.ndarray,
    starts: list[np.ndarray],
    labels: list[np.ndarray],
    nodes: Sequence[int],
    shape: TableShape,
) -> dict[str, Any]:
    """The padded content of the buffers."""
    count, levels = codes_NL.shape
    codes_RL = np.zeros((shape.rows, levels), np.int32)
    codes_RL[1 : count + 1] = codes_NL
    item_of_leaf = _padded(order.astype(np.int32) + 1, shape.nodes[-1], 0)
    leaf_of_item = np.full(shape.rows, -1, np.int32)
    leaf_of_item[order + 1] = np.arange(count, dtype=np.int32)
    children = []
    for level in range(shape.dense_levels):
        table = np.full((shape.nodes[level], shape.level_sizes[level]), -1, np.int32)
        per_node = np.diff(starts[level], append=nodes[level + 1])
        table[np.repeat(np.arange(nodes[level]), per_node), labels[level]] = np.arange(nodes[level + 1])
        children.append(table)
    # Padding nodes have no children: they begin where the last node's end.
    padded_starts = [
        _padded(s, slots + 1, after) for s, slots, after in zip(starts, shape.nodes, nodes[1:], strict=False)
    ]
    padded_labels = [_padded(s, slots, 0) for s, slots in zip(labels, shape.nodes[1:], strict=True)]
    return {
        "codes_RL": codes_RL, "starts": padded_starts, "labels": padded_labels, "children": children,
        "item_of_leaf": item_of_leaf, "leaf_of_item": leaf_of_item, "counts": np.asarray(nodes, np.int32),
        "version": version_of(codes_NL, shape.level_sizes),
    }  # fmt: skip


def verify(ids: SemanticIDs) -> None:
    """Checks on the host that codes, trie and version are of one making.

    Raises:
        ValueError: they are not; or `ids` was never filled.
    """
    name = version_name(ids.version[...])
    count = ids.num_items
    if count == 0:
        raise ValueError("semantic IDs: the code table is empty; build it, or restore it from a checkpoint")
    codes_NL = np.asarray(ids.codes_RL[...])[1 : count + 1]
    found = version_name(version_of(codes_NL, ids.shape.level_sizes))
    if found != name:
        raise ValueError(
            f"semantic IDs: the code table's content is version {found}, but it says {name}: its trie is of other "
            "codes; build codes and trie together (core.code_tables.build)"
        )
    again = build(codes_NL, ids.shape.level_sizes, ids.shape)
    for mine, theirs in zip(jax.tree.leaves(nnx.state(ids)), jax.tree.leaves(nnx.state(again)), strict=True):
        if mine.shape != theirs.shape or bool(jnp.any(mine != theirs)):
            raise ValueError(
                f"semantic IDs: the trie is not that of the code table, version {name}; build both together "
                "(core.code_tables.build)"
            )


def version_of(codes_NL: np.ndarray, level_sizes: Sequence[int]) -> np.ndarray:
    """The version of a code table, uint32 [2]: equal for equal codes and alphabets."""
    digest = hashlib.sha256(np.asarray([*level_sizes, len(codes_NL)], "<i8").tobytes())
    digest.update(np.ascontiguousarray(codes_NL, "<i4").data)
    return np.frombuffer(digest.digest()[:8], "<u4").astype(np.uint32)


def _check_codes(codes: np.ndarray, sizes: tuple[int, ...]) -> None:
    """Refuses what `build` cannot take, by item and level."""
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not np.issubdtype(codes.dtype, np.integer) or not sizes:
        raise ValueError(
            f"semantic IDs: expected whole numbers of shape [N, {len(sizes)}], one column a level; found {codes.dtype} "
            f"{codes.shape}"
        )
    if not len(codes):
        raise ValueError("semantic IDs: no item; give the codes of at least one")
    for level, size in enumerate(sizes):
        column = codes[:, level]
        if column.min() >= 0 and column.max() < size:
            continue
        item = int(np.flatnonzero((column < 0) | (column >= size))[0])
        if (codes[item] == -1).all():
            raise ValueError(
                f"semantic IDs: item {item + 1} has no codes ({int((codes == -1).all(1).sum())} items have none); "
                "tokenize it with the others, or take it out of the catalogue"
            )
        raise ValueError(
            f"semantic IDs: item {item + 1} has code {int(column[item])} at level {level}, whose alphabet is 0 … "
            f"{size - 1}; enlarge the level or tokenize again"
        )


def _refuse_equal(codes: np.ndarray, order: np.ndarray, begins: np.ndarray) -> None:
    second = int(np.flatnonzero(~begins)[0])
    pair = sorted((int(order[second - 1]) + 1, int(order[second]) + 1))
    raise ValueError(
        f"semantic IDs: items {pair[0]} and {pair[1]} both have the codes {codes[pair[0] - 1].tolist()} "
        f"({int((~begins).sum())} items repeat another's); add a suffix level (core.suffixes.with_suffix)"
    )


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)), constant_values=fill).astype(np.int32)


def _power_of_two(n: int) -> int:
    """The least power of two that is n ≥ 1 or more."""
    return 1 << (n - 1).bit_length()
