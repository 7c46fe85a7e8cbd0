"""Histories as the codes of their items: the input of a Llama that generates semantic IDs.

Every position says what it is: level and item are carried, never computed from the position's number, so text may stand
anywhere. Right-padded.

Legend: B batch, H history items, L levels, T positions.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

TEXT, BEGIN = -1, -2
"""Levels of what is no code: a token of the Llama's vocabulary; the learned begin vector (and padding)."""


@dataclasses.dataclass(frozen=True)
class Template:
    """Text around a history, as token ids of the Llama: `prefix`, the items' codes, `suffix`, then what is predicted.

    Raises:
        ValueError: no prefix: the first code would have no position before it.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prefix:
            raise ValueError("template: its prefix is empty, but the first code needs a position before it; give a BOS")


class CodeSequence(NamedTuple):
    """What stands at each position.

    Attributes:
        codes: int32 [B, T], level-local; 0 where there is none.
        levels: int32 [B, T], 0 … L − 1, or TEXT or BEGIN.
        items: int32 [B, T], which item of its history a code belongs to, from 0; −1 elsewhere.
        lengths: int32 [B], real positions.
        state: int32 [B], the position whose hidden state stands for the history: the last before the target's first
            code, or the last of all where no target is in the row.
        text: int32 [B, T], the token ids where the level is TEXT, else 0; None: these sequences hold no text.
    """

    codes: Array
    levels: Array
    items: Array
    lengths: Array
    state: Array
    text: Array | None = None


def lay_out(codes_BHL: Array, lengths_B: Array, template: Template | None, *, with_target: bool) -> CodeSequence:
    """Histories → sequences: the begin vector (or the template's prefix), L codes an item, the template's suffix.

    Args:
        codes_BHL: codes of each item, level-local, oldest first.
        lengths_B: items a row that are real.
        template: None: codes alone behind one begin vector.
        with_target: the last item of a row is its target and stands behind the suffix. The row up to `state` is then
            what the other items alone give without a target.
    """
    batch, history, levels = codes_BHL.shape
    prefix = jnp.asarray((0,) if template is None else template.prefix, jnp.int32)
    suffix = jnp.asarray(() if template is None else template.suffix, jnp.int32)
    before, between = prefix.shape[0], suffix.shape[0]
    place_T = jnp.arange(before + history * levels + between)
    target_B = (lengths_B > 0).astype(jnp.int32) * with_target
    context_B1 = (lengths_B - target_B)[:, None] * levels  # codes before the suffix
    behind_BT = place_T - before - context_B1
    in_suffix_BT = (behind_BT >= 0) & (behind_BT < between)
    # Codes, counted as if there were no suffix.
    code_BT = place_T - before - jnp.where(behind_BT >= between, between, 0)
    is_code_BT = (code_BT >= 0) & ~in_suffix_BT & (code_BT < lengths_B[:, None] * levels)
    safe_BT = jnp.clip(code_BT, 0, max(history * levels - 1, 0))
    codes_BT = jnp.take_along_axis(codes_BHL.reshape(batch, -1), safe_BT, axis=1)
    text_BT = jnp.broadcast_to(prefix[jnp.minimum(place_T, before - 1)], behind_BT.shape)
    if between:
        text_BT = jnp.where(in_suffix_BT, suffix[jnp.clip(behind_BT, 0, between - 1)], text_BT)
    is_text_BT = (place_T < before) | in_suffix_BT
    other_BT = jnp.where(is_text_BT & (template is not None), TEXT, BEGIN)
    state_B = before + context_B1[:, 0] + between - 1
    return CodeSequence(
        codes=jnp.where(is_code_BT, codes_BT, 0).astype(jnp.int32),
        levels=jnp.where(is_code_BT, safe_BT % levels, other_BT).astype(jnp.int32),
        items=jnp.where(is_code_BT, safe_BT // levels, -1).astype(jnp.int32),
        lengths=(before + lengths_B * levels + between).astype(jnp.int32),
        state=state_B.astype(jnp.int32),
        text=None if template is None else jnp.where(is_text_BT, text_BT, 0).astype(jnp.int32),
    )
