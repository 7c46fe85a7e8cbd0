"""ETEGRec's two alignments of a recommender with its tokenizer (arXiv 2409.05546, § 3.3), and where they are taken.

The released code makes a row of every prefix of a history. Here a history is one row, so its prefixes' ends are
*anchors*: what a row has at once are the negatives that small batches lack.

Both give (Σ over rows, number of rows), what is minimised being the quotient. Rows of a mesh's devices are one array
here, so the negatives of `psa_loss` are those of the whole (micro-)batch, wherever its rows lie.

Legend: B rows, H history items, A anchors, K codes of a level, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from core.layers import unit

SIASign = Literal["paper", "released"]


MAX_ANCHORS = 512
"""Anchors of a batch, if it has no more rows: similarities grow with their square."""


class Anchors(NamedTuple):
    """Items that are predicted from what stands before them, each item once.

    rows, places, items int32 [A]: where each stands in its batch [B, H], and what it is. kept bool [A]: the others are
    padding, or an earlier anchor has their item.
    """

    rows: Array
    places: Array
    items: Array
    kept: Array


def anchors(item_ids_BH: Array, lengths_B: Array, *, last_alone: bool) -> Anchors:
    """The newest items of every row, A = `MAX_ANCHORS` of them or fewer; never its first one, which has no history.

    Args:
        item_ids_BH: int, right-padded; lengths_B: items a row.
        last_alone: the newest item of each row, A = B.
    """
    item_ids_BH, lengths_B = jnp.asarray(item_ids_BH), jnp.asarray(lengths_B)
    batch, history = item_ids_BH.shape
    if last_alone:
        rows_A = jnp.arange(batch)
        places_A = jnp.maximum(lengths_B - 1, 0)
    else:
        age_BH = lengths_B[:, None] - 1 - jnp.arange(history)
        real_BH = (age_BH >= 0) & (jnp.arange(history) > 0)
        count = min(batch * history, max(batch, MAX_ANCHORS))
        _, flat_A = jax.lax.top_k(jnp.where(real_BH, -age_BH, -history).ravel(), count)
        rows_A, places_A = flat_A // history, flat_A % history
    items_A = item_ids_BH[rows_A, places_A]
    real_A = (places_A > 0) & (places_A < lengths_B[rows_A])
    kept_A = first_occurrences(jnp.where(real_A, items_A, 0))
    return Anchors(rows_A.astype(jnp.int32), places_A.astype(jnp.int32), items_A.astype(jnp.int32), kept_A)


def first_occurrences(item_ids_B: Array) -> Array:
    """Bool [B]: the rows whose item no earlier row has; padding (item 0) is none.

    A target that stands twice in a batch would be its own negative. A mask keeps the shapes static.
    """
    same_BB = item_ids_B[:, None] == item_ids_B
    return (jnp.argmax(same_BB, axis=1) == jnp.arange(item_ids_B.shape[0])) & (item_ids_B > 0)


def sia_loss(
    sequence_distances: Sequence[Array], item_distances: Sequence[Array], rows_B: Array, sign: SIASign = "paper"
) -> tuple[Array, Array]:
    """Sequence-item alignment: how far apart the code distributions of a history's state and of its target are.

    At each level KL(p ∥ q) + KL(q ∥ p) of p, q = softmax(−distance) over the level's codes; the mean over levels.

    Args:
        sequence_distances, item_distances: `Quantized.distances` of the two sides, float [B, K] a level, each along the
            codes nearest to that side itself.
        rows_B: bool or float [B], the weight of each row; 0 leaves it out.
        sign: "released": softmax(+distance), as the released code has it.

    Returns:
        Σ weight · divergence and Σ weight, float32.

    Raises:
        ValueError: an unknown sign, or levels that do not match.
    """
    if sign not in get_args(SIASign):
        raise ValueError(f"SIA sign {sign!r}: expected one of {', '.join(get_args(SIASign))}")
    shapes = [[level.shape for level in side] for side in (sequence_distances, item_distances)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(f"SIA: distances of shapes {shapes[0]} against {shapes[1]}; expected the same levels")
    factor = -1.0 if sign == "paper" else 1.0
    divergence_B = jnp.zeros(rows_B.shape[0])
    for sequence_BK, item_BK in zip(sequence_distances, item_distances, strict=True):
        log_p_BK, log_q_BK = (
            jax.nn.log_softmax(factor * side_BK.astype(jnp.float32)) for side_BK in (sequence_BK, item_BK)
        )
        divergence_B += jnp.sum((jnp.exp(log_p_BK) - jnp.exp(log_q_BK)) * (log_p_BK - log_q_BK), axis=1)
    weights_B = rows_B.astype(jnp.float32)
    return jnp.sum(weights_B * divergence_B) / len(sequence_distances), jnp.sum(weights_B)


def psa_loss(
    preferences_BE: Array, reconstructions_BE: Array, rows_B: Array, temperature: float = 0.07
) -> tuple[Array, Array]:
    """Preference-semantic alignment: two-way InfoNCE over cosines, the sum of both cross-entropies a row.

    Args:
        preferences_BE: float [B, E], from the histories' states.
        reconstructions_BE: float [B, E], the tokenizer's reconstructions of the targets.
        rows_B: bool [B]: the others are left out and are nobody's negatives (`first_occurrences` of the targets).
        temperature: what cosines are divided by.

    Returns:
        Σ over rows and the number of rows, float32.
    """
    a_BE, b_BE = (unit(x_BE.astype(jnp.float32)) for x_BE in (preferences_BE, reconstructions_BE))
    # "highest": TF32 would change a cosine by 1e-3, a logit by 0.01.
    logits_BB = jnp.matmul(a_BE, b_BE.T, precision="highest") / temperature
    # A row left out keeps its own column: without any its logarithm would not be finite, and 0 · inf is not 0.
    open_BB = rows_B | jnp.eye(rows_B.shape[0], dtype=bool)
    own_B = jnp.diagonal(logits_BB)
    losses_B = sum(
        jax.nn.logsumexp(jnp.where(open_BB, logits, -jnp.inf), axis=1) - own_B for logits in (logits_BB, logits_BB.T)
    )
    return jnp.sum(jnp.where(rows_B, losses_B, 0.0)), jnp.sum(rows_B, dtype=jnp.float32)
