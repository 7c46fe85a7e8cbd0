"""The one door to attention kernels.

Right padding is the rule everywhere: under causal attention what follows a row's end cannot reach what comes before,
so a full pass needs no mask at all. Packed rows (`core.packing`) are the exception: their segments keep apart.

Legend: B batch, T query positions, S key positions, N query heads, K key-value heads (N a multiple of K), H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def causal_attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None) -> Array:
    """Softmax attention of every position over itself and what comes before, scaled by 1/√H: [B, T, N, H].

    Query head n reads key-value head n·K // N (grouped queries, as Hugging Face orders them). The softmax is taken
    in float32. Materialises [B, N, T, T] (XLA). With `segments_BT` (int), a position sees its own segment alone; the
    mask [B, 1, T, T] is made by broadcasting and meets the logits in the same fusion.
    """
    mask_B1TT = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, is_causal=True, implementation="xla")


def cached_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, positions_BT: Array) -> Array:
    """Attention of new queries over a cache of S slots: query (b, t) sees the slots 0 … positions_BT[b, t].

    Rows may stand at different positions, hence a mask of [B, 1, T, S]; T is one or a short prompt here.
    """
    mask_B1TS = jnp.arange(k_BSKH.shape[1]) <= positions_BT[:, None, :, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, implementation="xla")
