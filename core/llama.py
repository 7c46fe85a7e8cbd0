"""The Llama transformer (arXiv 2302.13971, 2307.09288, 2407.21783), top to bottom.

Layers are stacked: every parameter of `Llama.layers` has a leading axis L, and one scan runs them. Right-padded input
needs no mask (see `core.attention`).

Legend: B batch, T positions, D hidden, N query heads, K key-value heads, H head dim, F MLP width, V vocabulary,
L layers, S slots of the cache, W branches of a row, P slots that each has of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from core.attention import Choice, Kernel, Wish, branching_attention, cached_attention, causal_attention, choose
from core.config import LlamaConfig
from core.layers import Dropout, Init, LlamaLinear, RMSNorm
from core.rope import rotate, rotation
from core.rows import keep_rows, lookup

# What the backward pass may keep of a layer's forward pass: nothing, the matrix products, or all.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: nothing here changes a parameter or, but for rounding, a result.

    Attributes:
        dtype: of activations and products.
        remat: a name of `REMAT_POLICIES`.
        chunk_elements: logits of a loss to hold at a time (`core.chunked.chunk_rows`); None: by the backend at hand.
        attention: the kernel of full passes; "auto": cuDNN's where it can be (`core.attention.choose`).
        platform: what programs are compiled for; None: the backend at hand. A plan for a GPU that is not there says
            "gpu".
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    chunk_elements: int | None = None
    attention: Wish = "auto"
    platform: Literal["gpu"] | None = None

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat policy {self.remat!r}: choose one of {', '.join(REMAT_POLICIES)}")

    def attention_kernel(self, head_dim: int, packed: bool = False) -> Choice:
        """The kernel for heads of this width; `packed`: with segments. Raises as `core.attention.choose`."""
        return choose(self.attention, self.dtype, head_dim, packed=packed, platform=self.platform)


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far.

    Row b holds positions 0 … lengths_B[b] − 1; slots beyond are garbage that is never read. A row that is pushed past
    S turns to NaN, for a compiled program cannot raise.
    """

    k_LBSKH: Array
    v_LBSKH: Array
    lengths_B: Array


class BranchCache(NamedTuple):
    """Keys and values of W continuations of each row of a `KVCache`, which they share and which is not repeated."""

    k_LBWPKH: Array
    v_LBWPKH: Array

    def reordered(self, parents_BW: Array) -> BranchCache:
        """Branch w of row b becomes what branch parents_BW[b, w] was; W may change."""
        places = parents_BW[None, :, :, None, None, None]
        return BranchCache(*(jnp.take_along_axis(x, places, axis=2) for x in self))


class _Branches(NamedTuple):
    """One layer's part of a `KVCache` and of its `BranchCache`."""

    k_BSKH: Array
    v_BSKH: Array
    own_k_BWPKH: Array
    own_v_BWPKH: Array


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, key: Array, init: Init) -> None:
        d, n, k, h, bias = (
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.attention_bias,
        )  # fmt: skip
        key_q, key_k, key_v, key_o = jax.random.split(key, 4)
        self.q = LlamaLinear(key_q, "q", (d,), (n, h), bias, init)
        self.k = LlamaLinear(key_k, "k", (d,), (k, h), bias, init)
        self.v = LlamaLinear(key_v, "v", (d,), (k, h), bias, init)
        self.o = LlamaLinear(key_o, "o", (n, h), (d,), bias and config.attention_bias_on_o, init)
        self.q_norm = RMSNorm(h, config.rms_norm_eps, init) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.rms_norm_eps, init) if config.qk_norm else None

    def __call__(
        self, x_BTD: Array, at: Positions, cache: tuple[Array, Array] | None, key: Array | None
    ) -> tuple[Array, Any]:
        q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD, key), self.k(x_BTD, key), self.v(x_BTD, key)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, at.cos, at.sin), rotate(k_BTKH, at.cos, at.sin)
        if cache is None:
            return self.o(causal_attention(q_BTNH, k_BTKH, v_BTKH, at.segments, at.kernel), key), None
        if isinstance(cache, _Branches):
            # Branches stand where positions stand elsewhere: T is W.
            own_k_BWPKH = cache.own_k_BWPKH.at[:, :, at.step].set(k_BTKH.astype(cache.own_k_BWPKH.dtype))
            own_v_BWPKH = cache.own_v_BWPKH.at[:, :, at.step].set(v_BTKH.astype(cache.own_v_BWPKH.dtype))
            parts = (x.astype(x_BTD.dtype) for x in (cache.k_BSKH, cache.v_BSKH))
            y_BTNH = branching_attention(q_BTNH, *parts, at.place[:, 0] - at.step, own_k_BWPKH, own_v_BWPKH, at.step)
            return self.o(y_BTNH, key), (own_k_BWPKH, own_v_BWPKH)
        row_B1 = jnp.arange(x_BTD.shape[0])[:, None]
        k_BSKH = cache[0].at[row_B1, at.place].set(k_BTKH.astype(cache[0].dtype), mode="drop")
        v_BSKH = cache[1].at[row_B1, at.place].set(v_BTKH.astype(cache[1].dtype), mode="drop")
        y_BTNH = cached_attention(q_BTNH, k_BSKH.astype(x_BTD.dtype), v_BSKH.astype(x_BTD.dtype), at.place)
        return self.o(y_BTNH, key), (k_BSKH, v_BSKH)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) · up x)."""

    def __init__(self, config: LlamaConfig, key: Array, init: Init) -> None:
        d, f = config.hidden_size, config.intermediate_size
        key_gate, key_up, key_down = jax.random.split(key, 3)
        self.gate = LlamaLinear(key_gate, "gate", (d,), (f,), config.mlp_bias, init)
        self.up = LlamaLinear(key_up, "up", (d,), (f,), config.mlp_bias, init)
        self.down = LlamaLinear(key_down, "down", (f,), (d,), config.mlp_bias, init)

    def __call__(self, x_BTD: Array, key: Array | None) -> Array:
        return self.down(jax.nn.silu(self.gate(x_BTD, key)) * self.up(x_BTD, key), key)


class Block(nnx.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: LlamaConfig, key: Array, init: Init) -> None:
        key_attention, key_mlp = jax.random.split(key)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, init)
        self.attention = Attention(config, key_attention, init)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, init)
        self.mlp = MLP(config, key_mlp, init)

    def __call__(self, x_BTD: Array, at: Positions, cache: Any, drop: Dropout) -> tuple[Array, Any]:
        with jax.named_scope("attention"):
            y_BTD, cache = self.attention(keep_rows(self.attention_norm(x_BTD)), at, cache, drop.key)
            x_BTD = keep_rows(x_BTD + drop(keep_rows(y_BTD), 0))
        with jax.named_scope("mlp"):
            y_BTD = self.mlp(keep_rows(self.mlp_norm(x_BTD)), drop.key)
            return x_BTD + drop(keep_rows(y_BTD), 1), cache


class Llama(nnx.Module):
    """Token ids, or embeddings, to hidden states or logits.

    Args:
        config: the shape.
        key: for the random start; checkpoints overwrite it (`core.llama_loader`).
        compute: the dtype and remat policy of the forward pass.
        init: the standard deviation and dtype of the parameters.
    """

    def __init__(
        self, config: LlamaConfig, key: Array, compute: Compute | None = None, init: Init | None = None
    ) -> None:
        self.config, self.compute, init = config, compute or Compute(), init or Init()
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        self.embed_VD = nnx.Param(init.normal(key_embed, (config.vocab_size, config.hidden_size)))
        self.layers = jax.vmap(lambda k: Block(config, k, init))(jax.random.split(key_layers, config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, init)
        head = None if config.tie_word_embeddings else init.normal(key_head, (config.vocab_size, config.hidden_size))
        self.head_VD = None if head is None else nnx.Param(head)

    def __call__(self, input_ids: Array) -> Array:
        """Token ids int [B, T] → logits float32 [B, T, V]."""
        return self.logits(self.hidden(self.embed(input_ids)))

    def embed(self, input_ids: Array) -> Array:
        """Token ids int [..., T] → embeddings [..., T, D] in the compute dtype."""
        return lookup(self.embed_VD[...], input_ids).astype(self.compute.dtype)

    def output_table(self) -> Array:
        """The LM head's rows [V, D]: the embedding itself where the head is tied; of length 1 if `normalised_head`."""
        table_VD = self.embed_VD[...] if self.head_VD is None else self.head_VD[...]
        if not self.config.normalised_head:
            return table_VD
        wide_VD = table_VD.astype(jnp.float32)
        # torch's F.normalize divides by 1e-12 at least.
        squared_V1 = jnp.maximum(jnp.sum(wide_VD**2, axis=-1, keepdims=True), 1e-24)
        return (wide_VD * jax.lax.rsqrt(squared_V1)).astype(table_VD.dtype)

    def logits(self, x_BTD: Array) -> Array:
        """Hidden states after the final norm → logits float32 [B, T, V]."""
        table_VD = self.output_table().astype(x_BTD.dtype)
        return jnp.einsum("btd,vd->btv", x_BTD, table_VD, preferred_element_type=jnp.float32)

    def hidden(
        self, x_BTD: Array, *, dropout: float = 0.0, key: Array | None = None, segments_BT: Array | None = None
    ) -> Array:
        """Input embeddings [B, T, D], right-padded → hidden states after the final norm [B, T, D]; no LM head.

        `dropout` (with its `key`) drops from each residual branch: for small models trained from scratch.
        `segments_BT` (int) tells the sequences of a packed row apart by a number of its own for each: a sequence is
        computed as if it stood alone in a row, from position 0 on. (But for dynamic NTK: beyond
        `max_position_embeddings` its frequencies follow from T, the whole row's length.)

        Raises:
            ValueError: T beyond `sliding_window`, packed or not.
        """
        return keep_rows(self.norm(self._run(x_BTD, None, dropout, key, segments_BT=segments_BT)[0]))

    def layer_outputs(self, x_BTD: Array) -> Array:
        """What `hidden` computes, layer by layer and before the final norm: [L, B, T, D]. For parity tests."""
        return self._run(x_BTD, None, 0.0, None, keep_layers=True)[1]

    def init_cache(self, batch_size: int, slots: int) -> KVCache:
        """An empty cache for `slots` positions a row.

        Raises:
            ValueError: dynamic NTK beyond `max_position_embeddings`: its frequencies would change under cached keys;
                slots beyond `sliding_window`.
        """
        config = self.config
        _refuse_cache(config, slots)
        shape = (config.num_layers, batch_size, slots, config.num_kv_heads, config.head_dim)
        empty = jnp.zeros(shape, self.compute.dtype)
        return KVCache(empty, empty, jnp.zeros((batch_size,), jnp.int32))

    def extend(self, x_BTD: Array, cache: KVCache, lengths_B: Array | None = None) -> tuple[Array, KVCache]:
        """Continues each row of the cache by T positions, of which the first `lengths_B` (default all) are real.

        Returns:
            Hidden states after the final norm [B, T, D], and the longer cache.
        """
        x_BTD, (k_LBSKH, v_LBSKH) = self._run(x_BTD, cache, 0.0, None)
        steps_B = jnp.full(x_BTD.shape[:1], x_BTD.shape[1]) if lengths_B is None else lengths_B
        grown_B = cache.lengths_B + steps_B.astype(jnp.int32)
        overflow_B = grown_B > cache.k_LBSKH.shape[2]
        x_BTD = jnp.where(overflow_B[:, None, None], jnp.nan, self.norm(x_BTD))
        return x_BTD, KVCache(k_LBSKH, v_LBSKH, grown_B)

    def init_branches(self, cache: KVCache, branches: int, slots: int) -> BranchCache:
        """Empty slots for W = `branches` continuations of each row of `cache`, of `slots` positions at most.

        Raises:
            ValueError: as `init_cache`, for both caches' positions together.
        """
        layers, batch, prefix, *heads = cache.k_LBSKH.shape
        _refuse_cache(self.config, prefix + slots)
        empty = jnp.zeros((layers, batch, branches, slots, *heads), self.compute.dtype)
        return BranchCache(empty, empty)

    def extend_branches(
        self, x_BWD: Array, cache: KVCache, branches: BranchCache, step: int
    ) -> tuple[Array, BranchCache]:
        """One more position for every branch: the `step`-th (from 0) behind its row's prefix.

        Args:
            x_BWD: the position's input embedding for each branch.
            cache: the prefixes; left as it is.
            branches: with the positions before `step` of each branch.

        Returns:
            Hidden states after the final norm [B, W, D], and the branches with this position.
        """
        x_BWD, own = self._run(x_BWD, cache, 0.0, None, branches=branches, step=step)
        return self.norm(x_BWD), BranchCache(*own)

    def _run(
        self,
        x_BTD: Array,
        cache: KVCache | None,
        dropout: float,
        key: Array | None,
        keep_layers: bool = False,
        segments_BT: Array | None = None,
        branches: BranchCache | None = None,
        step: int = 0,
    ) -> tuple[Array, Any]:
        """Scans the layers; also returns each layer's cache, or its output where `keep_layers`."""
        if cache is None:
            _refuse_beyond_window(self.config, x_BTD.shape[1])
        x_BTD = x_BTD.astype(self.compute.dtype)
        if branches is not None and cache is not None:
            at = Positions.of_branches(self.config, cache, branches, step)
        else:
            kernel = self.compute.attention_kernel(self.config.head_dim, segments_BT is not None).kernel
            at = Positions.of(self.config, x_BTD, cache, segments_BT, kernel)
        keys_L = None if key is None else jax.random.split(key, self.config.num_layers)

        def layer(x_BTD: Array, inputs: tuple[Block, Any, Array | None]) -> tuple[Array, Any]:
            block, layer_cache, layer_key = inputs
            x_BTD, layer_cache = block(keep_rows(x_BTD), at, layer_cache, Dropout(dropout, layer_key))
            return x_BTD, x_BTD if keep_layers else layer_cache

        policy = REMAT_POLICIES[self.compute.remat]
        body = layer if policy is None else jax.checkpoint(layer, prevent_cse=False, policy=policy)
        caches: tuple[Array, Array] | _Branches | None = None
        if cache is not None:
            kept = cache.k_LBSKH, cache.v_LBSKH
            caches = kept if branches is None else _Branches(*kept, branches.k_LBWPKH, branches.v_LBWPKH)
        return jax.lax.scan(body, x_BTD, (self.layers, caches, keys_L))


def _refuse_cache(config: LlamaConfig, slots: int) -> None:
    """Refuses a cache of so many positions where its keys would not stay right."""
    _refuse_beyond_window(config, slots)
    dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
    if dynamic and slots > config.max_position_embeddings:
        raise ValueError(
            f"a cache of {slots} positions with rope_scaling 'dynamic' and max_position_embeddings "
            f"{config.max_position_embeddings}: beyond it every cached key would need new frequencies; "
            "use at most that many positions, or a full pass without a cache"
        )


def _refuse_beyond_window(config: LlamaConfig, length: int) -> None:
    """Full attention is a sliding window's only up to its width."""
    if config.sliding_window is not None and length > config.sliding_window:
        raise ValueError(
            f"{length} positions, but the Llama has a sliding_window of {config.sliding_window}: beyond it a position "
            "attends to the newest alone, which is not computed here; give at most that many"
        )


class Positions(NamedTuple):
    """Where the positions of a pass stand: place [B or 1, T], the rotation that follows from it, segment.

    `kernel`: of the attention among them, without a cache. `step`: the slot of a position among its branch's own.
    """

    place: Array
    cos: Array
    sin: Array
    segments: Array | None
    kernel: Kernel
    step: int = 0

    @staticmethod
    def of_branches(config: LlamaConfig, cache: KVCache, branches: BranchCache, step: int) -> Positions:
        """One position, the same for all branches of a row."""
        place_B1 = cache.lengths_B[:, None] + step
        length = cache.k_LBSKH.shape[2] + branches.k_LBWPKH.shape[3]
        return Positions(place_B1, *rotation(config, place_B1, length), None, "xla", step)

    @staticmethod
    def of(
        config: LlamaConfig, x_BTD: Array, cache: KVCache | None, segments_BT: Array | None, kernel: Kernel
    ) -> Positions:
        place, length = jnp.arange(x_BTD.shape[1])[None], x_BTD.shape[1]
        if cache is not None:
            place, length = cache.lengths_B[:, None] + place, cache.k_LBSKH.shape[2]
        if segments_BT is not None:
            # Within its segment: from the newest beginning of one on.
            begins_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
            place = place - jax.lax.cummax(jnp.where(begins_BT, place, 0), axis=1)
        return Positions(place, *rotation(config, place, length), segments_BT, kernel)
