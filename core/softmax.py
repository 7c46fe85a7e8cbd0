"""Exact softmax over a catalogue, or over the concatenation of several tables, in chunks of positions.

Legend: T positions, B rows to rank, N entries of a table (S of all tables together), D width, k results, E exclusions.

Products are taken in the hidden state's dtype and accumulated in float32; everything after them is float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from core.chunked import chunk_rows, chunked_sum, gathered
from core.rows import sum_over_batch_shards

Table = tuple[jax.Array, jax.Array | None, jax.Array | None]
"""(table [N, D], bias [N] or None, live [N] or None): a segment without its hidden states."""

_Positions = tuple[list[jax.Array], jax.Array, jax.Array, jax.Array | None]
"""(hidden states [T, ·] of each segment, targets [T], weights [T], live entries [T, S] or None)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """One table of a softmax, with the hidden states that meet it: logits h·table_n + bias_n.

    Attributes:
      h_TD: hidden states [T, D], float32 or bfloat16; products are taken in this dtype.
      table_ND: vectors [N, D]; best kept in float32, so that its gradient is not rounded from chunk to chunk.
      bias_N: [N] or None for no bias.
      live_N: bool [N] or None for all. An entry that is not live has probability exactly 0 and no gradient.
    """

    h_TD: jax.Array
    table_ND: jax.Array
    bias_N: jax.Array | None = None
    live_N: jax.Array | None = None


def item_segment(
    h_TD: jax.Array, table_ND: jax.Array, bias_N: jax.Array | None = None, live_N: jax.Array | None = None
) -> Segment:
    """The segment of a table of items, whose row 0 is padding and never live (shapes as in `Segment`)."""
    not_padding_N = jnp.arange(table_ND.shape[0]) > 0
    return Segment(h_TD, table_ND, bias_N, not_padding_N if live_N is None else live_N & not_padding_N)


def cross_entropy(
    segments: Sequence[Segment],
    targets_T: jax.Array,
    weights_T: jax.Array,
    *,
    live_TS: jax.Array | None = None,
    chunk_elements: int | None = None,
) -> jax.Array:
    """Σ_t weights_t · (−log p(target_t | h_t)) under one softmax over all segments' live entries, as a float32 scalar.

    Equal to the dense softmax, but at most one chunk of logits is held; the gradients are taken with it (see
    `core.chunked`). Tables that are not being differentiated cost no gradient product.

    Args:
      segments: one or more tables; their concatenation, in this order, is what targets index.
      targets_T: int32 [T], in [0, S).
      weights_T: float32 [T]. A position of weight 0 contributes nothing, whatever its target.
      live_TS: bool [T, S], of each position the entries that its softmax is over; None: all that are live.
      chunk_elements: logits [rows of a chunk, S] to hold at most; static; None: see `core.chunked.chunk_rows`.

    Returns:
      Float32 scalar; infinite where a target of non-zero weight is out of range or not live. The caller divides.

    Raises:
      ValueError: no segment, or shapes that do not agree.
    """
    _check(segments)
    if targets_T.shape != weights_T.shape or targets_T.shape != segments[0].h_TD.shape[:1]:
        raise ValueError(
            f"cross_entropy: targets {targets_T.shape}, weights {weights_T.shape} and hidden states "
            f"{segments[0].h_TD.shape} do not share one axis of positions"
        )
    tables = [(segment.table_ND, segment.bias_N, segment.live_N) for segment in segments]
    xs = ([segment.h_TD for segment in segments], targets_T, weights_T.astype(jnp.float32), live_TS)
    size = chunk_rows(sum(segment.table_ND.shape[0] for segment in segments), chunk_elements)

    def loss(tables: list[Table], xs: _Positions) -> jax.Array:
        # Padding has weight 0: put together, it fills chunks of its own, which are skipped.
        place_T = gathered(jnp.argsort(xs[2] == 0, stable=True), size)
        xs = jax.tree.map(lambda x: x.at[place_T].get(unique_indices=True, mode="promise_in_bounds"), xs)
        return chunked_sum(_chunk_loss, tables, xs, chunk_size=size, empty=lambda x: ~jnp.any(x[2]))

    return sum_over_batch_shards(loss, tables, xs)


def _chunk_loss(tables: list[Table], xs: _Positions) -> jax.Array:
    """Σ weights·(−log p) of one chunk, segment by segment: concatenated logits would be copied once more."""
    hs, targets_T, weights_T, live_TS = xs
    logits = [segment_logits(Segment(h_TD, *table)) for table, h_TD in zip(tables, hs, strict=True)]
    if live_TS is not None:
        ends = list(itertools.accumulate(x_TN.shape[1] for x_TN in logits))[:-1]
        lives = jnp.split(live_TS, ends, axis=1)
        logits = [jnp.where(live_TN, x_TN, -jnp.inf) for live_TN, x_TN in zip(lives, logits, strict=True)]
    return jnp.sum(weighted(weights_T, joint_nll(logits, targets_T)))


def joint_nll(logits: Sequence[jax.Array], targets_T: jax.Array) -> jax.Array:
    """−log p(target) [T] of the softmax over the concatenation of logits [T, N], all float32.

    The target's logit is a masked sum and not a gather, whose gradient would be a scatter: this one fuses.
    """
    largest_T = jnp.max(jnp.stack([jnp.max(jax.lax.stop_gradient(x), axis=-1) for x in logits]), axis=0)
    shift_T = jnp.where(jnp.isneginf(largest_T), 0.0, largest_T)
    total_T, target_T, offset = jnp.zeros_like(shift_T), jnp.zeros_like(shift_T), 0
    for x_TN in logits:
        total_T += jnp.sum(jnp.exp(x_TN - shift_T[:, None]), axis=-1)
        hit_TN = jnp.arange(x_TN.shape[1], dtype=jnp.int32) == (targets_T - offset)[:, None]
        target_T += jnp.sum(jnp.where(hit_TN, x_TN, 0.0), axis=-1)
        offset += x_TN.shape[1]
    in_range_T = (targets_T >= 0) & (targets_T < offset)
    return jnp.log(total_T) + shift_T - jnp.where(in_range_T, target_T, -jnp.inf)


def weighted(weights_T: jax.Array, nll_T: jax.Array) -> jax.Array:
    """weights·nll [T]; 0 where the weight is 0, even if the loss is infinite (a padding position's target is dead)."""
    return weights_T * jnp.where(weights_T != 0, nll_T, 0.0)


def segment_logits(segment: Segment) -> jax.Array:
    """Float32 logits [T, N] of one segment; −inf at entries that are not live."""
    logits_TN = dot_f32(segment.h_TD, segment.table_ND)
    bias_N = segment.bias_N
    if segment.live_N is not None:
        # Added as a bias, the mask rides on the bias's own addition.
        bias_N = jnp.where(segment.live_N, 0.0 if bias_N is None else bias_N.astype(jnp.float32), -jnp.inf)
    return logits_TN if bias_N is None else logits_TN + bias_N.astype(jnp.float32)


@jax.custom_vjp
def dot_f32(h_TD: jax.Array, table_ND: jax.Array) -> jax.Array:
    """h · tableᵀ → float32 [T, N]: operands in h's dtype, accumulated in float32, in both gradients too.

    Plain autodiff would multiply the float32 cotangent with a bfloat16 operand, which runs at float32's speed, and
    round the table's gradient to bfloat16 even if the table is float32.
    """
    return _dot(h_TD, table_ND.astype(h_TD.dtype), 1, 1)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The float32 product of two matrices over the given axes."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _dot_f32_forward(h_TD: jax.Array, table_ND: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dot_f32(h_TD, table_ND), (h_TD, table_ND)


def _dot_f32_backward(residuals: tuple[jax.Array, jax.Array], g_TN: jax.Array) -> tuple[jax.Array, jax.Array]:
    h_TD, table_ND = residuals
    g_TN = g_TN.astype(h_TD.dtype)
    grad_h_TD = _dot(g_TN, table_ND.astype(h_TD.dtype), 1, 0)
    grad_table_ND = _dot(g_TN, h_TD, 0, 0)
    return grad_h_TD.astype(h_TD.dtype), grad_table_ND.astype(table_ND.dtype)


dot_f32.defvjp(_dot_f32_forward, _dot_f32_backward)


def log_probs(segments: Sequence[Segment]) -> jax.Array:
    """Dense float32 log-probabilities [T, S] over the concatenation of all segments; −inf where not live.

    Raises:
      ValueError: no segment, or shapes that do not agree.
    """
    _check(segments)
    return jax.nn.log_softmax(jnp.concatenate([segment_logits(segment) for segment in segments], axis=-1), axis=-1)


def top_k(
    h_BD: jax.Array,
    table_ND: jax.Array,
    bias_N: jax.Array | None,
    live_N: jax.Array | None,
    k: int,
    exclude_BE: jax.Array | None = None,
    *,
    chunk_elements: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k most probable items of each row by full scoring, in chunks of rows.

    Args:
      h_BD: hidden states [B, D].
      table_ND, bias_N, live_N: as in `Segment`; row 0 is padding and never returned.
      k: results a row; static. It may exceed the number of live items.
      exclude_BE: int32 [B, E] item ids that must not be returned; 0 stands for none.
      chunk_elements: scores [rows of a chunk, N] to hold at most; static; None: see `core.chunked.chunk_rows`.

    Returns:
      (scores_Bk, ids_Bk): float32 log-probabilities under the softmax over *all* live items (excluding an item does
      not renormalise), descending, ties by the smaller id; int32 ids. Where fewer than k items remain: id 0, −inf.
    """

    def score(h: jax.Array) -> jax.Array:
        return log_probs([item_segment(h, table_ND, bias_N, live_N)])

    return top_k_of(score, h_BD, k, exclude_BE, chunk_size=chunk_rows(table_ND.shape[0], chunk_elements))


def top_k_of(
    score: Callable[[jax.Array], jax.Array],
    h_BD: jax.Array,
    k: int,
    exclude_BE: jax.Array | None,
    *,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """`top_k` of any scores: `score` maps h [m, D] to float32 [m, N], −inf at row 0 and at what is not live.

    At most `chunk_size` rows are scored at a time. Returns and orders as `top_k` does.
    """
    rows = h_BD.shape[0]
    if exclude_BE is None:
        exclude_BE = jnp.zeros((rows, 0), jnp.int32)

    def rank(h: jax.Array, exclude: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Id 0 stands for no exclusion: it hits the padding row, which is dead already.
        scores = score(h).at[jnp.arange(h.shape[0])[:, None], exclude].set(-jnp.inf)
        best, ids = jax.lax.top_k(scores, min(k, scores.shape[1]))  # stable: of equal scores the smaller id comes first
        missing = ((0, 0), (0, k - best.shape[1]))
        best = jnp.pad(best, missing, constant_values=-jnp.inf)
        ids = jnp.pad(ids.astype(jnp.int32), missing)
        return best, jnp.where(jnp.isneginf(best), 0, ids)

    if rows <= chunk_size:
        return rank(h_BD, exclude_BE)
    n = -(-rows // chunk_size)
    m = -(-rows // n)
    chunks = [jnp.pad(x, ((0, n * m - rows), (0, 0))).reshape(n, m, -1) for x in (h_BD, exclude_BE)]
    best, ids = jax.lax.map(lambda chunk: rank(*chunk), tuple(chunks))
    return best.reshape(n * m, k)[:rows], ids.reshape(n * m, k)[:rows]


def _check(segments: Sequence[Segment]) -> None:
    """Refuses segments whose shapes do not agree."""
    if not segments:
        raise ValueError("softmax: no segment was given; give at least one table")
    for i, segment in enumerate(segments):
        rows, width = segment.table_ND.shape
        if segment.h_TD.shape != (segments[0].h_TD.shape[0], width):
            raise ValueError(f"softmax: segment {i} has hidden states {segment.h_TD.shape} and a table {(rows, width)}")
        for name, vector in (("bias_N", segment.bias_N), ("live_N", segment.live_N)):
            if vector is not None and vector.shape != (rows,):
                raise ValueError(f"softmax: segment {i} has {name} {vector.shape} for a table of {rows} entries")
