"""Semantic IDs: the codes of every item and the trie over them, one value of one version.

The trie is laid out for accelerators (STATIC, arXiv 2602.22647): no pointers are chased, a step of a search is a gather
of fixed width. Items sorted by their codes make every node a run of leaves, so nodes of a level are numbered in that
order and the children of node n of level l are the nodes starts_l[n] … starts_l[n + 1] − 1 of level l + 1 (CSR). The
first one or two levels have a dense table of children besides.

Arrays are padded to powers of two: another catalogue of about this size has arrays of the same shapes, and no program
compiles anew.

Legend: N items (1 … N; 0 is padding), R rows of the code table (a power of two above N), L levels, K_l codes of level
l, M_l nodes at depth l (M_0 = 1 the root, M_L = N the leaves), C_l ≥ M_l its padded number, w_l children gathered a
node, B rows, W beams, X excluded items.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from core.functional import Buffer

DENSE_ENTRIES = 2**22
"""The second level has a dense table of children if K_0 · K_1 entries (int32: 16 MiB) are not more than this."""


@dataclasses.dataclass(frozen=True)
class TableShape:
    """All that decides the shapes of `SemanticIDs`: equal shapes, equal programs.

    Attributes:
        level_sizes: K_l; the last is the suffix level's, where there is one.
        rows: R.
        nodes: C_0 … C_L.
        widths: w_0 … w_{L−1}.
    """

    level_sizes: tuple[int, ...]
    rows: int
    nodes: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def levels(self) -> int:
        """L."""
        return len(self.level_sizes)

    @property
    def dense_levels(self) -> int:
        """Levels that have a dense table of children: 1 or 2."""
        return dense_levels(self.level_sizes)

    def joined(self, other: TableShape) -> TableShape:
        """The least shape that holds the tables of both.

        Raises:
            ValueError: their alphabets differ.
        """
        if self.level_sizes != other.level_sizes:
            raise ValueError(f"semantic IDs: levels of {self.level_sizes} and of {other.level_sizes} codes do not join")
        nodes = tuple(map(max, self.nodes, other.nodes))
        return TableShape(
            self.level_sizes, max(self.rows, other.rows), nodes, tuple(map(max, self.widths, other.widths))
        )

    @staticmethod
    def from_json(values: dict[str, Any]) -> TableShape:
        """The inverse of `dataclasses.asdict`, after JSON made lists of its tuples."""
        return TableShape(tuple(values["level_sizes"]), values["rows"], tuple(values["nodes"]), tuple(values["widths"]))


def dense_levels(level_sizes: Sequence[int]) -> int:
    """`TableShape.dense_levels` of these alphabets."""
    return 2 if len(level_sizes) > 1 and math.prod(level_sizes[:2]) <= DENSE_ENTRIES else 1


class SemanticIDs(nnx.Module):
    """Codes, trie and version as buffers: arguments of programs, saved with checkpoints.

    `core.code_tables.build` makes one.

    Args:
        shape: decides all shapes.
        arrays: what the buffers hold, by name; None: zeros, for a checkpoint to fill.

    Attributes:
        codes_RL: int32, codes of each item; zeros in row 0 and behind item N.
        starts: of each level int32 [C_l + 1], first child of each node.
        labels: of each level int32 [C_{l+1}], the code by which each node of level l + 1 is reached.
        children: of each dense level int32 [C_l, K_l], the node that a code leads to; −1: none.
        item_of_leaf, leaf_of_item: int32 [C_L] and [R]; leaf −1 where there is no item.
        counts: int32 [L + 1], M_0 … M_L.
        version: uint32 [2], the first half of a SHA-256 over `level_sizes` and codes.
    """

    def __init__(self, shape: TableShape, arrays: Mapping[str, Any] | None = None) -> None:
        self.shape = shape

        def one(name: str, of: tuple[int, ...], dtype: Any = jnp.int32) -> Buffer:
            return Buffer(jnp.zeros(of, dtype) if arrays is None else jnp.asarray(arrays[name], dtype))

        def each(name: str, of: Sequence[tuple[int, ...]]) -> nnx.List[Buffer]:
            given = [None] * len(of) if arrays is None else arrays[name]
            return nnx.List(
                Buffer(jnp.zeros(s, jnp.int32) if a is None else jnp.asarray(a, jnp.int32))
                for s, a in zip(of, given, strict=True)
            )

        nodes, sizes = shape.nodes, shape.level_sizes
        self.codes_RL = one("codes_RL", (shape.rows, shape.levels))
        self.starts = each("starts", [(count + 1,) for count in nodes[:-1]])
        self.labels = each("labels", [(count,) for count in nodes[1:]])
        self.children = each("children", list(zip(nodes, sizes, strict=False))[: shape.dense_levels])
        self.item_of_leaf = one("item_of_leaf", (nodes[-1],))
        self.leaf_of_item = one("leaf_of_item", (shape.rows,))
        self.counts = one("counts", (shape.levels + 1,))
        self.version = one("version", (2,), jnp.uint32)

    @property
    def num_items(self) -> int:
        """N. Reads the device: not for use inside a program."""
        return int(self.counts[...][-1])

    def codes_of(self, item_ids: Array) -> Array:
        """Ids int [...] → codes int32 [..., L]; zeros for padding. Under `jax.jit` ids beyond the table clamp."""
        return self.codes_RL[...][item_ids]

    def step(self, level: int, nodes_BW: Array) -> tuple[Array, Array]:
        """The children of nodes of a level, gathered at their fixed width: (codes, nodes) int32 [B, W, w].

        A node is −1 where there is no such child; so are all children of node −1. Codes there mean nothing, but
        lie in the alphabet.
        """
        parent_BW1 = jnp.maximum(nodes_BW, 0)[..., None]
        real_BW1 = (nodes_BW >= 0)[..., None]
        places_w = jnp.arange(self.shape.widths[level], dtype=jnp.int32)
        if level < self.shape.dense_levels:
            child_BWw = self.children[level][...][parent_BW1[..., 0]]
            return jnp.broadcast_to(places_w, child_BWw.shape), jnp.where(real_BW1, child_BWw, -1)
        starts = self.starts[level][...]
        child_BWw = starts[parent_BW1] + places_w
        real_BWw = real_BW1 & (child_BWw < starts[parent_BW1 + 1])
        labels = self.labels[level][...]
        return labels[jnp.minimum(child_BWw, labels.shape[0] - 1)], jnp.where(real_BWw, child_BWw, -1)

    def siblings(self, item_ids: Array) -> list[Array]:
        """Of each level the codes that lead to an item from where an item's own code is chosen: bool [..., K_l].

        Ids int [...]. Padding, which no choice leads to, has all codes of a level.
        """
        found = []
        path = self.ancestors(self.leaf_of_item[...][item_ids])
        for level, (size, nodes) in enumerate(zip(self.shape.level_sizes, path, strict=False)):
            flat_T1 = nodes.reshape(-1, 1)
            codes_Tw, children_Tw = (x[:, 0] for x in self.step(level, flat_T1))
            real_TK = children_Tw >= 0
            if level >= self.shape.dense_levels:  # where children stand by their number, not by their code
                rows_T1 = jnp.arange(flat_T1.shape[0])[:, None]
                # Where there is no such child, its code falls out of the alphabet and is dropped.
                codes_Tw = jnp.where(real_TK, codes_Tw, size)
                real_TK = jnp.zeros((flat_T1.shape[0], size), bool).at[rows_T1, codes_Tw].set(True, mode="drop")
            found.append((real_TK | (flat_T1 < 0)).reshape(*item_ids.shape, size))
        return found

    def items_at(self, leaves: Array) -> Array:
        """Leaves int [...] → item ids int32 [...]; 0 for −1."""
        return jnp.where(leaves >= 0, self.item_of_leaf[...][jnp.maximum(leaves, 0)], 0)

    def first_leaf(self, level: int, nodes: Array) -> Array:
        """The first leaf below each node of a level; of node M_l, one past the last leaf of all."""
        for starts in self.starts[level:]:
            nodes = starts[...][nodes]
        return nodes

    def ancestors(self, leaves: Array) -> list[Array]:
        """The nodes on the way to each leaf int [...], an array a depth, the root's 0 first; −1 has −1 throughout."""
        path = [leaves]
        for starts in reversed(self.starts):
            path.append(jnp.searchsorted(starts[...], path[-1], side="right").astype(jnp.int32) - 1)
        return path[::-1]


def version_name(version: Any) -> str:
    """A version as 16 hexadecimal digits."""
    return "".join(f"{int(part):08x}" for part in np.asarray(version))
