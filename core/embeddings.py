"""Item vectors, the adapters between items and the Llama, codes of semantic IDs, and text woven between the items.

Legend: B batch, H history items, T sequence positions, K title tokens, N items (1 … N; 0 is padding), E item
dimension, R rank, D the Llama's width, L levels of codes, K_l codes of level l, d their dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from core.layers import Init, Linear
from core.rows import keep_rows, lookup


class ItemVectors(nnx.Module):
    """One vector for each of the ids 0 … N; id 0 is padding and its vector is never read by a loss.

    With `rank`, vectors are a low-rank product [N + 1, R] · [R, E] (the original system's form for large catalogues).
    """

    def __init__(self, num_items: int, dim: int, rank: int | None, key: Array, init: Init) -> None:
        key_table, key_factor = jax.random.split(key)
        if rank is None:
            self.table_NE = nnx.Param(init.normal(key_table, (num_items + 1, dim)))
            self.factor_RE = None
        else:
            # Unit-variance rows of the factor / √R keep the product's deviation at `init.std`.
            self.table_NE = nnx.Param(init.normal(key_table, (num_items + 1, rank)))
            factor_RE = jax.random.normal(key_factor, (rank, dim)) / rank**0.5
            self.factor_RE = nnx.Param(factor_RE.astype(init.param_dtype))

    def __call__(self, item_ids: Array) -> Array:
        """Ids int [...] → vectors [..., E] in the parameters' dtype."""
        rows = lookup(self.table_NE[...], item_ids)
        return rows if self.factor_RE is None else keep_rows(rows @ self.factor_RE[...])

    def table(self) -> Array:
        """All vectors [N + 1, E]."""
        return self.table_NE[...] if self.factor_RE is None else self.table_NE[...] @ self.factor_RE[...]


class InputAdapter(nnx.Module):
    """Item space to the Llama's: Linear, GELU, Linear (E → D → D)."""

    def __init__(self, item_dim: int, hidden_size: int, key: Array, std: float | None, param_dtype: Any) -> None:
        key_up, key_out = jax.random.split(key)
        self.up = Linear(key_up, (item_dim,), (hidden_size,), True, fan_in(item_dim, std, param_dtype))
        self.out = Linear(key_out, (hidden_size,), (hidden_size,), True, fan_in(hidden_size, std, param_dtype))

    def __call__(self, x: Array) -> Array:
        return self.out(jax.nn.gelu(self.up(x)))


def fan_in(inputs: int, std: float | None, param_dtype: Any) -> Init:
    """How an adapter starts: normal(0, std), by default 1/√inputs so that magnitudes pass through unchanged."""
    return Init(inputs**-0.5 if std is None else std, param_dtype)


class SoftEmbedding(nnx.Module):
    """Codes of semantic IDs as input: the row of their level's table, up to the Llama's width without a bias.

    The Llama's vocabulary has no row for them and is not resized. The tables are the caller's (`core.codebook_logits`
    reads the same ones).
    """

    def __init__(self, code_dim: int, hidden_size: int, key: Array, init: Init) -> None:
        self.scid_projector = Linear(key, (code_dim,), (hidden_size,), False, init)

    def __call__(self, tables: Sequence[Array], levels: Array, codes: Array, dtype: Any) -> Array:
        """Level-local codes int [...] of levels int [...] → [..., D] in `dtype`.

        Args:
            tables: of each level its vectors [K_l, d]; alphabets may differ.
        """
        sizes = [table.shape[0] for table in tables]
        first_L = jnp.asarray([sum(sizes[:level]) for level in range(len(sizes))], jnp.int32)
        rows = lookup(jnp.concatenate(tables), first_L[levels] + codes)
        return self.scid_projector(rows.astype(dtype))


class Woven(NamedTuple):
    """A sequence of text tokens and items: at each position an item where `item_mask`, else a token.

    input_ids, item_ids int32 [B, T]; item_mask bool [B, T]; lengths int32 [B]; right-padded with zeros. `segments`
    int32 [B, T] in packed rows (see `core.packing`): 1, 2, … for a row's sequences, 0 behind the last; None where a row
    is one sequence.
    """

    input_ids: Array
    item_ids: Array
    item_mask: Array
    lengths: Array
    segments: Array | None = None


def weave(
    item_ids_BH: Array,
    lengths_B: Array,
    titles_NK: Array,
    bos: int,
    seq_len: int,
    segments_BH: Array | None = None,
) -> Woven:
    """Puts each item's title *after* the item: BOS, item 1, its title, item 2, its title, …

    Before the item, its title would give the label away. Where the sequence is longer than `seq_len`, whole oldest
    items are dropped with their titles.

    Args:
        item_ids_BH: histories, right-padded, oldest first.
        lengths_B: items a row.
        titles_NK: token ids of each item's title, padded with −1 (row 0 all −1).
        bos: the token at the start of every row, and of every segment.
        seq_len: T, the positions of the result.
        segments_BH: of a packed row, which history an item is of: 1, 2, … in order, 0 behind the last. Such a row
            must fit, as `core.packing.pack_histories` sees to; items that do not are dropped from its end.
    """
    batch, items = item_ids_BH.shape
    row_B1 = jnp.arange(batch)[:, None]
    valid_BH = jnp.arange(items) < lengths_B[:, None]
    titles_BHK = jnp.where(valid_BH[..., None], titles_NK[item_ids_BH], -1)
    width_BH = jnp.where(valid_BH, 1 + (titles_BHK >= 0).sum(-1), 0)
    if segments_BH is None:
        place_BH, fits_BH = _places_of_newest(width_BH, valid_BH, seq_len)
        start_BH = jnp.zeros((batch, 1), jnp.int32)  # an empty history has its BOS, too
    else:
        begins_BH = valid_BH & (jnp.diff(segments_BH, axis=1, prepend=0) != 0)
        place_BH, fits_BH = _places_of_segments(width_BH, valid_BH, begins_BH, seq_len)
        start_BH = jnp.where(begins_BH & fits_BH, place_BH - 1, seq_len)
    blank_BT = jnp.zeros((batch, seq_len), jnp.int32)
    woven_items_BT = blank_BT.at[row_B1, place_BH].set(item_ids_BH, mode="drop")
    places_BHK = place_BH[..., None] + 1 + jnp.arange(titles_NK.shape[1])
    places_BHK = jnp.where((titles_BHK >= 0) & fits_BH[..., None], places_BHK, seq_len)
    tokens_BT = blank_BT.at[row_B1[..., None], places_BHK].set(titles_BHK, mode="drop")
    tokens_BT = tokens_BT.at[row_B1, start_BH].set(bos, mode="drop")
    lengths_B = jnp.sum(start_BH < seq_len, axis=1) + jnp.sum(jnp.where(fits_BH, width_BH, 0), axis=1)
    woven = Woven(tokens_BT, woven_items_BT, woven_items_BT > 0, lengths_B.astype(jnp.int32))
    if segments_BH is None:
        return woven
    # Each segment's number stands at its BOS; numbers rise, so the largest so far is the one that holds.
    segments_BT = jax.lax.cummax(blank_BT.at[row_B1, start_BH].set(segments_BH, mode="drop"), axis=1)
    return woven._replace(segments=jnp.where(jnp.arange(seq_len) < woven.lengths[:, None], segments_BT, 0))


def _places_of_newest(width_BH: Array, valid_BH: Array, seq_len: int) -> tuple[Array, Array]:
    """Where items begin behind one BOS (past the end: not at all), and which fit: the newest."""
    ends_BH = jnp.cumsum(width_BH, axis=1)
    starts_BH = ends_BH - width_BH
    surplus_B1 = ends_BH[:, -1:] - (seq_len - 1)
    fits_BH = valid_BH & (starts_BH >= surplus_B1)
    # The first position after BOS belongs to the first item that fits; what does not fit is sent past the end.
    first_B1 = jnp.min(jnp.where(fits_BH, starts_BH, ends_BH[:, -1:]), axis=1, keepdims=True)
    return jnp.where(fits_BH, starts_BH - first_B1 + 1, seq_len), fits_BH


def _places_of_segments(width_BH: Array, valid_BH: Array, begins_BH: Array, seq_len: int) -> tuple[Array, Array]:
    """Where the items of a packed row begin, with a BOS before each that begins a segment; and which fit."""
    ends_BH = jnp.cumsum(width_BH + begins_BH, axis=1)
    fits_BH = valid_BH & (ends_BH <= seq_len)
    return jnp.where(fits_BH, ends_BH - width_BH, seq_len), fits_BH


def items_only(item_ids_BH: Array, lengths_B: Array, segments_BH: Array | None = None) -> Woven:
    """The sequence that is the history itself, one position an item."""
    return Woven(jnp.zeros_like(item_ids_BH), item_ids_BH, item_ids_BH > 0, lengths_B, segments_BH)
