"""The one door to attention kernels, and the one place that chooses among them.

Right padding is the rule everywhere: under causal attention what follows a row's end cannot reach what comes before,
so a full pass needs neither a mask nor the rows' lengths. Packed rows (`core.packing`) are the exception: their
segments keep apart.

Legend: B batch, T query positions, S key positions, N query heads, K key-value heads (N a multiple of K), G = N / K, H
head dim, W branches of a row (beams), P positions that a branch has of its own.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

Kernel = Literal["cudnn", "xla"]
Wish = Literal["auto", "cudnn", "xla"]

# Of `jax.nn.dot_product_attention(implementation="cudnn")`. Its own check of the head width asks the device at hand, so
# beyond 128 a program is compiled only where such a device is.
MAX_HEAD_DIM, MAX_HEAD_DIM_SM90 = 128, 256


class Choice(NamedTuple):
    """A kernel, and in a few words why not cuDNN's (empty where it is, or where XLA's was asked for)."""

    kernel: Kernel
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} ({self.reason})" if self.reason else self.kernel


def choose(wish: Wish, dtype: Any, head_dim: int, *, packed: bool = False, platform: str | None = None) -> Choice:
    """The kernel of full passes on `platform` ("cpu", "gpu", …; None: the one at hand).

    cuDNN's needs bfloat16 or float16, heads of a multiple of 8 and no mask. "auto" falls back to XLA's with the reason.

    Raises:
        ValueError: an unknown wish; or "cudnn", and it cannot be: the message says why and what to do.
    """
    if wish not in get_args(Wish):
        raise ValueError(f"attention {wish!r}: choose one of {', '.join(get_args(Wish))}")
    if wish == "xla":
        return Choice("xla")
    here = jax.default_backend()
    capability = _capability() if here == "gpu" and platform in (None, "gpu") else None
    obstacle = cudnn_obstacle(dtype, head_dim, packed, platform or here, capability, cudnn_version())
    if obstacle is None:
        return Choice("cudnn")
    if wish == "cudnn":
        raise ValueError(f"cuDNN attention cannot be used: {obstacle}")
    return Choice("xla", obstacle)


def cudnn_obstacle(
    dtype: Any, head_dim: int, packed: bool, platform: str, capability: tuple[int, int] | None, version: int | None
) -> str | None:
    """What stands against cuDNN attention, as the first of all reasons; None: nothing.

    Args:
        packed: rows hold several segments, which takes a mask.
        platform: what the program is for, as jax names it.
        capability: of the device; None: not at hand, and taken to be 8.0 at least.
        version: of cuDNN's library in this process, as 10,000 major + 100 minor + patch; None: there is none.
    """
    if platform != "gpu":
        return f"it is for NVIDIA GPUs, not {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype).name}; it computes in bfloat16: --precision bfloat16"
    if packed:
        return "packed rows need a mask"
    if capability is not None and capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; it needs 8.0"
    widest = MAX_HEAD_DIM_SM90 if capability is not None and capability >= (9, 0) else MAX_HEAD_DIM
    if head_dim % 8 or head_dim > widest:
        return f"heads of {head_dim}; it takes multiples of 8 up to {widest}"
    if version is None:
        return "no cuDNN library here: pip install nvidia-cudnn-cu12 (-cu13 for CUDA 13)"
    return None


@functools.cache
def cudnn_version() -> int | None:
    """cuDNN's version as its library gives it (91002 is 9.10.2); None where jax's CUDA plugin finds none."""
    try:  # in the order in which jax looks for them
        from jax_cuda13_plugin import _versions
    except ImportError:
        try:
            from jax_cuda12_plugin import _versions
        except ImportError:
            return None
    try:
        return int(_versions.cudnn_get_version())
    except RuntimeError:
        return None


def _capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU; None where it has none (AMD's)."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    return None if found is None else (int(found[1]), int(found[2]))


def causal_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None, kernel: Kernel = "xla"
) -> Array:
    """Softmax attention of every position over itself and what comes before, scaled by 1/√H: [B, T, N, H].

    Query head n reads key-value head n·K // N (grouped queries, as Hugging Face orders them). The softmax is taken in
    float32. XLA's kernel materialises [B, N, T, T]; cuDNN's (flash attention; see `choose`) does not. With
    `segments_BT` (int), a position sees its own segment alone; the mask [B, 1, T, T] is made by broadcasting and meets
    the logits in the same fusion.

    Raises:
        ValueError: segments with cuDNN's kernel, where their mask would be a dense bias.
    """
    if segments_BT is not None and kernel == "cudnn":
        raise ValueError("cuDNN attention takes no segments; choose(packed=True) gives XLA's kernel")
    # cuDNN has no backward pass for a single key (its release notes, "known issues").
    implementation = kernel if q_BTNH.shape[1] > 1 else "xla"
    mask_B1TT = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, is_causal=True, implementation=implementation
    )


def cached_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, positions_BT: Array) -> Array:
    """Attention of new queries over a cache of S slots: query (b, t) sees the slots 0 … positions_BT[b, t].

    Rows may stand at different positions, hence a mask of [B, 1, T, S]; T is one or a short prompt here.
    """
    mask_B1TS = jnp.arange(k_BSKH.shape[1]) <= positions_BT[:, None, :, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, implementation="xla")


def branching_attention(
    q_BWNH: Array, k_BSKH: Array, v_BSKH: Array, lengths_B: Array, own_k_BWPKH: Array, own_v_BWPKH: Array, newest: int
) -> Array:
    """Attention of one new position a branch over its row's prefix, which all branches share, and its own positions.

    The prefix is read once a row and never repeated: its W queries meet it as the positions of one query would. One
    softmax in float32 over both parts, as `cached_attention` over their concatenation.

    Args:
        lengths_B: positions of the prefix that are real.
        newest: slot of the own part that the new position stands in; it sees the slots 0 … newest.
    """
    batch, width, heads, dim = q_BWNH.shape
    q_BWKGH = q_BWNH.reshape(batch, width, k_BSKH.shape[2], -1, dim)
    shared_BWKGS = jnp.einsum("bwkgh,bskh->bwkgs", q_BWKGH, k_BSKH, preferred_element_type=jnp.float32)
    own_BWKGP = jnp.einsum("bwkgh,bwpkh->bwkgp", q_BWKGH, own_k_BWPKH, preferred_element_type=jnp.float32)
    seen_B111S = jnp.arange(k_BSKH.shape[1]) < lengths_B[:, None, None, None, None]
    seen_P = jnp.arange(own_k_BWPKH.shape[2]) <= newest
    logits = [jnp.where(seen_B111S, shared_BWKGS, -jnp.inf), jnp.where(seen_P, own_BWKGP, -jnp.inf)]
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1) * dim**-0.5, axis=-1).astype(q_BWNH.dtype)
    on_shared_BWKGS, on_own_BWKGP = jnp.split(weights, [k_BSKH.shape[1]], axis=-1)
    y_BWKGH = jnp.einsum("bwkgs,bskh->bwkgh", on_shared_BWKGS, v_BSKH)
    y_BWKGH += jnp.einsum("bwkgp,bwpkh->bwkgh", on_own_BWKGP, own_v_BWPKH)
    return y_BWKGH.reshape(batch, width, heads, dim)
