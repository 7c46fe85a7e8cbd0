"""The small parts that models are made of: how parameters start, linear maps, norms, dropout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from core.lora import Adapter, LoRAConfig
from core.quantized import Format, QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Init:
    """How parameters start, normal(0, std), biases zero, norms one, and how they are held.

    Attributes:
        std: of weights at the start.
        param_dtype: of parameters.
        quantize: hold the weights of the Llama's layers in this format, frozen for good; None: as parameters.
        lora: adapters beside the weights of the Llama's layers; None: none.
    """

    std: float = 0.02
    param_dtype: Any = jnp.float32
    quantize: Format | None = None
    lora: LoRAConfig | None = None

    def normal(self, key: Array, shape: tuple[int, ...]) -> Array:
        return (self.std * jax.random.normal(key, shape)).astype(self.param_dtype)


class Linear(nnx.Module):
    """y = x W (+ b), contracting x's last axes (`inputs`) with W's first; then come its out-axes (`outputs`)."""

    def __init__(self, key: Array, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, init: Init) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.weight: Any = nnx.Param(init.normal(key, (*inputs, *outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs, init.param_dtype)) if bias else None

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """x [..., in-axes…] → [..., out-axes…]; `key` is for dropout, of which a plain linear map has none."""
        # As one plain matrix product: on a CPU the same contraction over many axes takes twice as long backwards.
        x_TI = x.reshape(-1, math.prod(self.inputs))
        y = self._product(x_TI, key).reshape(*x.shape[: x.ndim - len(self.inputs)], *self.outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def _product(self, x_TI: Array, key: Array | None) -> Array:
        """x W as [T, O]."""
        return x_TI @ self.weight[...].astype(x_TI.dtype).reshape(x_TI.shape[1], -1)


class LlamaLinear(Linear):
    """A linear map of the Llama's layers, by its name in `core.lora.TARGETS`: perhaps quantised, perhaps adapted."""

    def __init__(
        self, key: Array, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, init: Init
    ) -> None:
        super().__init__(key, inputs, outputs, bias, init)
        if init.quantize is not None:
            self.weight = QuantizedWeight(self.weight[...], len(inputs) - 1, init.quantize)
        lora = init.lora if init.lora is not None and name in init.lora.targets else None
        # A stream of its own: the base starts the same with adapters and without.
        own = jax.random.fold_in(key, 1)
        self.adapter = None if lora is None else Adapter(own, inputs, outputs, name, lora)

    def _product(self, x_TI: Array, key: Array | None) -> Array:
        quantized = isinstance(self.weight, QuantizedWeight)
        y_TO = self.weight.product(x_TI, math.prod(self.outputs)) if quantized else super()._product(x_TI, key)
        return y_TO if self.adapter is None else y_TO + self.adapter(x_TI, key)


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


def unit(x: Array) -> Array:
    """x [..., D] with rows of Euclidean length 1; a zero row stays zero."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12)
