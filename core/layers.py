"""The small parts that models are made of: how parameters start, linear maps, norms, dropout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclasses.dataclass(frozen=True)
class Init:
    """How parameters start: normal(0, std), biases zero, norms one."""

    std: float = 0.02
    param_dtype: Any = jnp.float32

    def normal(self, key: Array, shape: tuple[int, ...]) -> Array:
        return (self.std * jax.random.normal(key, shape)).astype(self.param_dtype)


class Linear(nnx.Module):
    """y = x W (+ b), contracting x's last axes with W's first; `shape` is in-axes then out-axes."""

    def __init__(self, key: Array, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, init: Init) -> None:
        self.contract = len(inputs)
        self.weight = nnx.Param(init.normal(key, (*inputs, *outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs, init.param_dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        # As one plain matrix product: on a CPU the same contraction over many axes takes twice as long backwards.
        weight = self.weight[...].astype(x.dtype)
        rows, outputs = x.shape[: x.ndim - self.contract], weight.shape[self.contract :]
        inputs = math.prod(weight.shape[: self.contract])
        y = (x.reshape(-1, inputs) @ weight.reshape(inputs, -1)).reshape(*rows, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale (arXiv 1910.07467); the mean in float32."""

    def __init__(self, size: int, eps: float, init: Init) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), init.param_dtype))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Dropout(NamedTuple):
    """Zeroes each value with probability `rate` and scales the rest by 1 / (1 − rate); no key, no dropout."""

    rate: float
    key: Array | None

    def __call__(self, x: Array, site: int) -> Array:
        if self.key is None or self.rate == 0:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(self.key, site), 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
