"""Frozen weights in 8 or 4 bits, dequantised where they are used (inside the scan over layers).

int8 is symmetric; nf4 is the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E), two codes a byte. Both scale
blocks of at most 64 weights by their largest magnitude, rounded up to a bfloat16, so that no code is clipped: 8.25 and
4.25 bits a weight where 64 divides the axis. qwix 0.1.8 was tried first: it changes modules while they run and fails
inside a scan over layers.

A block lies along the last in-axis of a weight, and codes and scales keep the weight's other axes: sharding rules of
the weight hold for both.

Legend: W axes before the last in-axis, I the last in-axis, O out-axes, b blocks of s weights along I.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

Format = Literal["int8", "nf4"]
BLOCK = 64
_SHORTEST = 16  # below it scales would cost more than 1 bit a weight

# The quantiles of a normal distribution, scaled to [−1, 1], 0 among them (QLoRA, appendix E).
_NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


class QuantizedParam(nnx.Variable):
    """Codes or scales of a frozen weight: never a `Param`, so no filter for parameters trains it."""


class QuantizedWeight(nnx.Module):
    """A weight [W…, I, O…] as codes and scales.

    Args:
        weight: to quantise; `axis`, the last in-axis, is what blocks lie along.
        axis: counted from 0.
        format: "int8" or "nf4".

    Raises:
        ValueError: as `quantize`.
    """

    def __init__(self, weight: Array, axis: int, format: Format) -> None:
        self.axis, self.format = axis, format
        codes, scales = quantize(weight, axis, format)
        self.codes = QuantizedParam(codes)
        self.scales = QuantizedParam(scales)

    def product(self, x_TI: Array, outputs: int) -> Array:
        """x W [T, O], all in-axes of W as one and all out-axes (O = `outputs` in all) as one, in x's dtype."""
        shape = (x_TI.shape[1], outputs)
        return _product(x_TI, self.codes[...], self.scales[...], self.axis, self.format, shape)


def quantize(weight: Array, axis: int, format: Format) -> tuple[Array, Array]:
    """weight [W…, I, O…] → codes int8 [W…, I, O…] or uint8 [W…, I / 2, O…] (nf4), scales bfloat16 [W…, b, O…].

    Raises:
        ValueError: I does not divide into blocks of 16 to 64 (or is one of less), or is odd (nf4).
    """
    size = weight.shape[axis]
    block = block_size(size)
    if block < min(_SHORTEST, size) or (format == "nf4" and size % 2):
        raise ValueError(f"{format}: an axis of {size} does not divide into blocks of 16 to 64 (and pairs)")
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:axis], size // block, block, *weight.shape[axis + 1 :])
    largest = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
    unit = _bfloat16_above(largest / (127.0 if format == "int8" else 1.0))
    ratio = blocks / jnp.where(unit == 0, 1, unit).astype(jnp.float32)
    scales = jnp.squeeze(unit, axis + 1)
    if format == "int8":
        return jnp.round(ratio).astype(jnp.int8).reshape(weight.shape), scales
    middles = jnp.asarray((_NF4[1:] + _NF4[:-1]) / 2)
    codes = jnp.searchsorted(middles, ratio.reshape(weight.shape)).astype(jnp.uint8)
    pairs = codes.reshape(*weight.shape[:axis], size // 2, 2, *weight.shape[axis + 1 :])
    low, high = jnp.take(pairs, 0, axis + 1), jnp.take(pairs, 1, axis + 1)
    return low | (high << 4), scales


def block_size(size: int) -> int:
    """The largest divisor of an axis that is at most `BLOCK`."""
    return next(block for block in range(min(BLOCK, size), 0, -1) if size % block == 0)


def quantize_as(weight: Array, codes: jax.ShapeDtypeStruct, scales: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
    """`quantize` into codes and scales of the given shapes and dtypes: they tell the axis and the format."""
    axis = next(i for i, (whole, blocks) in enumerate(zip(weight.shape, scales.shape, strict=True)) if whole != blocks)
    return quantize(weight, axis, "int8" if codes.dtype == jnp.int8 else "nf4")


def dequantize(codes: Array, scales: Array, axis: int, format: Format, dtype: Any) -> Array:
    """The inverse of `quantize`, but for rounding: [W…, I, O…] in `dtype`."""
    if format == "nf4":
        pairs = jnp.stack([codes & 15, codes >> 4], axis=axis + 1)
        codes = pairs.reshape(*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])
        values = jnp.asarray(_NF4)[codes]
    else:
        values = codes.astype(jnp.float32)
    number = scales.shape[axis]
    blocks = values.reshape(*codes.shape[:axis], number, -1, *codes.shape[axis + 1 :])
    return (blocks * jnp.expand_dims(scales.astype(jnp.float32), axis + 1)).reshape(codes.shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(x_TI: Array, codes: Array, scales: Array, axis: int, format: Format, shape: tuple[int, int]) -> Array:
    """x_TI W [T, O] with W dequantised to [I, O] = `shape`, in x's dtype. Gradients reach x alone.

    A rule of its own, so that the backward pass dequantises again: kept, every layer's dense weights would be in
    memory at once.
    """
    return x_TI @ dequantize(codes, scales, axis, format, x_TI.dtype).reshape(shape)


def _forward(x_TI: Array, codes: Array, scales: Array, axis: int, format: Format, shape: tuple[int, int]) -> Any:
    return _product(x_TI, codes, scales, axis, format, shape), (codes, scales)


def _backward(axis: int, format: Format, shape: tuple[int, int], kept: tuple[Array, Array], dy_TO: Array) -> Any:
    codes, scales = kept
    weight_IO = dequantize(codes, scales, axis, format, dy_TO.dtype).reshape(shape)
    no_codes = np.zeros(codes.shape, jax.dtypes.float0)
    return dy_TO @ weight_IO.T, no_codes, jnp.zeros_like(scales)


_product.defvjp(_forward, _backward)


def _bfloat16_above(x: Array) -> Array:
    """The least bfloat16 that is not below x ≥ 0."""
    rounded = x.astype(jnp.bfloat16)
    return jnp.where(rounded.astype(jnp.float32) < x, jnp.nextafter(rounded, jnp.array(jnp.inf, jnp.bfloat16)), rounded)
