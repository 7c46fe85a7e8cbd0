"""Trie-constrained beam search over semantic IDs: only items come out, each once.

score(item) = Σ_l log p(code l | history, codes before it). The trie masks what no item has; by default it does not
renormalise; whichever is chosen is what the model is trained on, too.

What is exact:
  - Every result is an item, none twice, none excluded; scores are exact whatever the width.
  - A prefix whose items are all excluded takes no beam. So each beam leads to a result, and at least
    min(k, beams, items left) come out.
  - With as many beams as there are prefixes with an item left at every depth but the last (the number of items is
    always enough), order and scores are those of scoring every item. With fewer it is a search: an item may be missed
    whose prefix was not among the best. Excluding items leaves beams to the others, but a prefix of which few items
    are left competes with its whole probability.
  - Results with equal scores come by the smaller item id, also at the border of the k-th. Prefixes with equal scores
    come by the order of the trie.

Legend: B rows, L levels, K codes of a level, W beams (1 at the first level), w children gathered a node, X exclusions,
k results.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from core.semantic_ids import SemanticIDs

Normalise = Literal["alphabet", "children"]
"""Log-probabilities over all codes of a level, or over those that lead to an item. Train on what is to be scored."""


class Continue(Protocol):
    """A model one code further."""

    def __call__(self, carry: Any, level: int, parents_BW: Array, codes_BW: Array) -> tuple[Array, Any]:
        """Logits of the codes of `level` for every beam.

        Args:
            carry: what the last call returned.
            level: 1 … L − 1.
            parents_BW: which beam of the last call each one continues.
            codes_BW: the code of level − 1 by which it does.

        Returns:
            float32 [B, W, K] logits, and a carry whose beams are these.
        """


class _Exclusions(NamedTuple):
    """Of one level: nodes of the next depth without an item left, where their children are to be struck off.

    All [B, X]: the parent's node (−1: none), and the place among its gathered children.
    """

    parents: Array
    places: Array


def beam_search(
    ids: SemanticIDs,
    logits_BK: Array,
    carry: Any,
    advance: Continue,
    *,
    k: int,
    beams: int,
    exclude_BX: Array | None = None,
    normalise: Normalise = "alphabet",
) -> tuple[Array, Array]:
    """The k best items of every row.

    Args:
        ids: code table and trie.
        logits_BK: float32 logits of the first level's codes.
        carry, advance: the model behind them; see `Continue`.
        k: results; beams: W. Static. More results than beams may be asked for; they come out where the last beams
            have several items, or are missing.
        exclude_BX: int32 items never to return, in any order, also twice; 0 for none.
        normalise: by which log-probabilities to score.

    Returns:
        (scores float32 [B, k], items int32 [B, k]), best first; −∞ and 0 where no item is left.

    Raises:
        ValueError: k or `beams` below 1, or an unknown `normalise`.
    """
    if k < 1 or beams < 1:
        raise ValueError(f"beam search: {k} results of {beams} beams; give at least 1 of each")
    if normalise not in ("alphabet", "children"):
        raise ValueError(f"normalise {normalise!r}: choose alphabet or children")
    levels = ids.shape.levels
    exclusions = [None] * levels if exclude_BX is None else _exclusions(ids, exclude_BX)
    scores_BW = jnp.zeros((logits_BK.shape[0], 1), jnp.float32)
    nodes_BW = jnp.zeros(scores_BW.shape, jnp.int32)
    logits_BWK = logits_BK[:, None]
    for level in range(levels):
        codes_BWw, children_BWw = ids.step(level, nodes_BW)
        gains_BWw = _gains(logits_BWK, codes_BWw, children_BWw >= 0, normalise)
        left_BWw = _left(children_BWw, nodes_BW, exclusions[level])
        candidates_BWw = jnp.where(left_BWw, scores_BW[..., None] + gains_BWw, -jnp.inf)
        if level == levels - 1:
            return _best_items(ids, candidates_BWw, children_BWw, k)
        width = codes_BWw.shape[2]
        scores_BW, flat_BW = jax.lax.top_k(_flat(candidates_BWw), min(beams, _flat(candidates_BWw).shape[1]))
        codes_BW = jnp.take_along_axis(_flat(codes_BWw), flat_BW, axis=1)
        nodes_BW = jnp.take_along_axis(_flat(children_BWw), flat_BW, axis=1)
        nodes_BW = jnp.where(jnp.isneginf(scores_BW), -1, nodes_BW)
        logits_BWK, carry = advance(carry, level + 1, flat_BW // width, codes_BW)
    raise AssertionError("a table has at least one level")


def _gains(logits_BWK: Array, codes_BWw: Array, real_BWw: Array, normalise: Normalise) -> Array:
    """Log-probabilities of the children [B, W, w]."""
    if normalise == "alphabet":
        return jnp.take_along_axis(jax.nn.log_softmax(logits_BWK, axis=-1), codes_BWw, axis=2)
    chosen_BWw = jnp.take_along_axis(logits_BWK, codes_BWw, axis=2)
    # A beam without children has no distribution: its row is struck off by `_left`, and must not be NaN before.
    total_BW1 = jax.nn.logsumexp(chosen_BWw, axis=-1, keepdims=True, where=real_BWw)
    return chosen_BWw - jnp.where(jnp.isneginf(total_BW1), 0.0, total_BW1)


def _left(children_BWw: Array, nodes_BW: Array, exclusions: _Exclusions | None) -> Array:
    """Which children exist and have an item left."""
    real_BWw = children_BWw >= 0
    if exclusions is None:
        return real_BWw
    batch, beams, _ = children_BWw.shape
    hit_BXW = (exclusions.parents[:, :, None] == nodes_BW[:, None, :]) & (exclusions.parents >= 0)[:, :, None]
    beam_BX = jnp.where(hit_BXW.any(axis=2), jnp.argmax(hit_BXW, axis=2), beams)
    return real_BWw.at[jnp.arange(batch)[:, None], beam_BX, exclusions.places].set(False, mode="drop")


def _exclusions(ids: SemanticIDs, exclude_BX: Array) -> list[_Exclusions | None]:
    """Of each level, what excluded items leave without any."""
    leaves_BX = jnp.sort(ids.leaf_of_item[...][exclude_BX], axis=1)
    # Each item once: a second mention counts as none.
    again_BX = jnp.diff(leaves_BX, axis=1, prepend=-1) == 0
    leaves_BX = jnp.sort(jnp.where(again_BX, -1, leaves_BX), axis=1)
    path = ids.ancestors(leaves_BX)
    codes_BXL = ids.codes_of(ids.items_at(leaves_BX))
    position = jax.vmap(jnp.searchsorted)
    found: list[_Exclusions | None] = []
    for level in range(ids.shape.levels):
        node_BX, parent_BX = path[level + 1], path[level]
        real_BX = node_BX >= 0
        safe_BX = jnp.maximum(node_BX, 0)
        first_BX, after_BX = ids.first_leaf(level + 1, safe_BX), ids.first_leaf(level + 1, safe_BX + 1)
        # Leaves are sorted: those below a node are a run of them.
        excluded_BX = position(leaves_BX, after_BX) - position(leaves_BX, first_BX)
        empty_BX = real_BX & (excluded_BX == after_BX - first_BX)
        if level < ids.shape.dense_levels:
            place_BX = codes_BXL[..., level]
        else:
            place_BX = node_BX - ids.starts[level][...][jnp.maximum(parent_BX, 0)]
        found.append(_Exclusions(jnp.where(empty_BX, parent_BX, -1), jnp.maximum(place_BX, 0)))
    return found


def _best_items(ids: SemanticIDs, candidates_BWw: Array, leaves_BWw: Array, k: int) -> tuple[Array, Array]:
    """The k best leaves by score, then by item id."""
    scores_BC, leaves_BC = _flat(candidates_BWw), _flat(leaves_BWw)
    size = scores_BC.shape[1]
    best_Bk, flat_Bk = jax.lax.top_k(scores_BC, min(k + 1, size))
    chosen_Bk = jnp.take_along_axis(leaves_BC, flat_Bk[:, :k], axis=1)
    few = (best_Bk[:, :k], ids.items_at(chosen_Bk))

    def sort_all() -> tuple[Array, Array]:
        return _sorted(scores_BC, ids.items_at(leaves_BC))

    def sort_few() -> tuple[Array, Array]:
        return _sorted(*few)

    if size > k:
        # Only where the k-th and the next are equal does the choice need a sort of all, which is slow.
        tied = jnp.any((best_Bk[:, k - 1] == best_Bk[:, k]) & ~jnp.isneginf(best_Bk[:, k]))
        scores, items = jax.lax.cond(tied, lambda: tuple(x[:, :k] for x in sort_all()), sort_few)
    else:
        scores, items = sort_few()
    missing = ((0, 0), (0, k - scores.shape[1]))
    scores, items = jnp.pad(scores, missing, constant_values=-jnp.inf), jnp.pad(items, missing)
    return scores, jnp.where(jnp.isneginf(scores), 0, items)


def _sorted(scores: Array, items: Array) -> tuple[Array, Array]:
    """By score from the largest, equal scores by item id."""
    negative, items = jax.lax.sort((-scores, items), dimension=1, num_keys=2)
    return -negative, items


def _flat(x_BWw: Array) -> Array:
    return x_BWw.reshape(x_BWw.shape[0], -1)
