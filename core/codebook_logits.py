"""Logits over the codes of one level of a semantic ID, tied to the table that embeds them.

A code is predicted by the hidden state at the position *before* it: where the code itself is input, the label would
leak. Which positions these are, the caller says; see `core.code_sequences`.

Legend: T positions, D the Llama's width, d dimension of codes, K codes of a level.
"""

from __future__ import annotations

from flax import nnx
from jax import Array

from core.layers import Init, Linear
from core.softmax import Segment, cross_entropy, dot_f32


class CodebookLogits(nnx.Module):
    """One projector D → d without a bias for all levels; logits are its products with a level's table."""

    def __init__(self, hidden_size: int, code_dim: int, key: Array, init: Init) -> None:
        self.output_projector = Linear(key, (hidden_size,), (code_dim,), False, init)

    def project(self, hidden: Array) -> Array:
        """Hidden states [..., D] → [..., d] in their dtype."""
        return self.output_projector(hidden)

    def logits(self, hidden: Array, table_Kd: Array) -> Array:
        """Hidden states [..., D] before a code → float32 logits [..., K] of its level."""
        y = self.project(hidden)
        return dot_f32(y.reshape(-1, y.shape[-1]), table_Kd).reshape(*y.shape[:-1], -1)


def code_loss(
    projected_Td: Array,
    table_Kd: Array,
    codes_T: Array,
    weights_T: Array,
    *,
    live_TK: Array | None = None,
    chunk_elements: int | None = None,
) -> Array:
    """Σ weights · (−log p(code)) over one level, float32; arguments and chunks as of `core.softmax.cross_entropy`."""
    segment = Segment(projected_Td, table_Kd)
    return cross_entropy([segment], codes_T, weights_T, live_TS=live_TK, chunk_elements=chunk_elements)
