"""SASRec: self-attention over a user's items (arXiv 1808.09781), trained with the full softmax.

The original scores one sampled negative a position; with cross-entropy over the whole catalogue the same model is far
stronger (arXiv 2309.07602). Layers are pre-norm, stacked, and run by one scan.

Legend: B batch, T positions, D width, N items (1 … N; 0 is padding), L layers, A heads, H head width, M positions that
predict, k results.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from core import softmax
from core.attention import causal_attention
from core.layers import Dropout, Init, Linear, unit
from core.rope import rotate, turned_by
from core.rows import keep_rows, lookup

_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class SASRecConfig:
    """The shape of a SASRec.

    Attributes:
        num_items: N.
        max_items: T at most; the table of positions has so many rows.
        width: D.
        num_layers, num_heads: L and A; A divides D.
        dropout: rate on inputs and residual branches while training.
        positions: "learned": a vector for each position, added to the item's (the original's way); "rotary": queries
            and keys turned by their positions (`core.rope`, θ 10,000), which knows distances from the first step on.
        temperature: None: logits are plain products h·e_n + b_n; else cosines divided by it, without a bias.
        init_std: of item vectors and positions at the start; matrices start at 1/√fan-in.
    """

    num_items: int
    max_items: int
    width: int = 64
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.2
    positions: Literal["learned", "rotary"] = "learned"
    temperature: float | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"SASRec: width {self.width} does not divide among {self.num_heads} heads")
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise ValueError(f"SASRec: heads of {self.width // self.num_heads} are odd; rotary positions turn pairs")


class LayerNorm(nnx.Module):
    """(x − mean) / √(variance + 1e-6) · scale + bias."""

    def __init__(self, size: int) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones((size,))), nnx.Param(jnp.zeros((size,)))

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
        return normed * self.scale[...] + self.bias[...]


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x), with dropout on both branches."""

    def __init__(self, config: SASRecConfig, key: Array) -> None:
        d, heads = config.width, (config.num_heads, config.width // config.num_heads)
        key_qkv, key_o, key_up, key_down = jax.random.split(key, 4)
        self.attention_norm, self.mlp_norm = LayerNorm(d), LayerNorm(d)
        self.qkv = Linear(key_qkv, (d,), (3, *heads), True, Init(d**-0.5))
        self.o = Linear(key_o, heads, (d,), True, Init(d**-0.5))
        self.up = Linear(key_up, (d,), (4 * d,), True, Init(d**-0.5))
        self.down = Linear(key_down, (4 * d,), (d,), True, Init((4 * d) ** -0.5))

    def __call__(self, x_BTD: Array, drop: Dropout, turn: tuple[Array, Array] | None) -> Array:
        qkv_BT3AH = self.qkv(self.attention_norm(x_BTD))
        q_BTAH, k_BTAH, v_BTAH = (qkv_BT3AH[:, :, i] for i in range(3))
        if turn is not None:
            q_BTAH, k_BTAH = rotate(q_BTAH, *turn), rotate(k_BTAH, *turn)
        x_BTD = x_BTD + drop(self.o(causal_attention(q_BTAH, k_BTAH, v_BTAH)), 0)
        return x_BTD + drop(self.down(jax.nn.gelu(self.up(self.mlp_norm(x_BTD)))), 1)


class SASRec(nnx.Module):
    """Item and position vectors, causal blocks, and the item vectors again as the output table."""

    def __init__(self, config: SASRecConfig, key: Array) -> None:
        self.config = config
        key_items, key_positions, key_layers = jax.random.split(key, 3)
        init = Init(config.init_std)
        self.items_ND = nnx.Param(init.normal(key_items, (config.num_items + 1, config.width)))
        learned = config.positions == "learned"
        self.positions_TD = nnx.Param(init.normal(key_positions, (config.max_items, config.width))) if learned else None
        self.item_bias_N = nnx.Param(jnp.zeros((config.num_items + 1,))) if config.temperature is None else None
        self.layers = jax.vmap(functools.partial(Block, config))(jax.random.split(key_layers, config.num_layers))
        self.final_norm = LayerNorm(config.width)

    def item_vectors(self) -> Array:
        """The item table [N + 1, D]; row 0 is padding's."""
        return self.items_ND[...]

    def hidden(self, item_ids_BT: Array, key: Array | None = None) -> Array:
        """Right-padded items int [B, T] → hidden states [B, T, D]: state t has seen items 0 … t.

        With a key, under dropout. T may be anything up to `max_items`.
        """
        config = self.config
        keys = None if key is None else jax.random.split(key, config.num_layers + 1)
        # √D as in the original: item vectors start small, positions must not drown them.
        x_BTD = lookup(self.items_ND[...], item_ids_BT) * config.width**0.5
        turn = None
        if self.positions_TD is not None:
            x_BTD = x_BTD + self.positions_TD[...][: item_ids_BT.shape[1]]
        else:
            half = np.arange(0, config.width // config.num_heads, 2) / (config.width // config.num_heads)
            turn = turned_by((_THETA**-half).astype(np.float32), jnp.arange(item_ids_BT.shape[1])[None])
        x_BTD = Dropout(config.dropout, None if keys is None else keys[0])(x_BTD, 0)

        def layer(x: Array, inputs: tuple[Block, Array | None]) -> tuple[Array, None]:
            block, layer_key = inputs
            return block(keep_rows(x), Dropout(config.dropout, layer_key), turn), None

        x_BTD, _ = jax.lax.scan(layer, x_BTD, (self.layers, None if keys is None else keys[1:]))
        return keep_rows(self.final_norm(x_BTD))

    def loss(self, item_ids_BT: Array, lengths_B: Array, key: Array | None = None) -> tuple[Array, Array]:
        """(Σ −log p(next item), number of targets) over every item that has one before it."""
        hidden_BTD = self.hidden(item_ids_BT, key)[:, :-1]
        weights_BT = jnp.arange(1, item_ids_BT.shape[1]) < lengths_B[:, None]
        segment = self._segment(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]))
        targets_M, weights_M = item_ids_BT[:, 1:].ravel(), weights_BT.ravel().astype(jnp.float32)
        return softmax.cross_entropy([segment], targets_M, weights_M), weights_M.sum()

    def top_k(self, item_ids_BT: Array, lengths_B: Array, k: int, exclude_BX: Array) -> tuple[Array, Array]:
        """The k most probable next items without those in `exclude_BX` (0 for none).

        Returns log-probabilities float32 [B, k] and ids int32 [B, k], best first, as `core.softmax.top_k`.
        """
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        last_BD = jnp.take_along_axis(self.hidden(item_ids_BT), last_B11, axis=1)[:, 0]
        segment = self._segment(last_BD)
        return softmax.top_k(segment.h_TD, segment.table_ND, segment.bias_N, None, k, exclude_BX)

    def _segment(self, hidden_MD: Array) -> softmax.Segment:
        """Hidden states and the table that they meet."""
        config, table_ND = self.config, self.items_ND[...]
        if config.temperature is None:
            assert self.item_bias_N is not None
            return softmax.item_segment(hidden_MD, table_ND, self.item_bias_N[...])
        return softmax.item_segment(unit(hidden_MD) / config.temperature, unit(table_ND))
