"""LoRA (arXiv 2106.09685): y = x W + (alpha / r) · drop(x) A B, with W frozen.

The adapters are parameters of the linear map that they adapt, so they lie in the stacked layers like everything else.

Legend: I a map's inputs and O its outputs as one axis each, r rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear maps of a layer that may be adapted; also their number in dropout's key."""


class LoRAParam(nnx.Param):
    """A and B of an adapter: what `--train lora` trains of the Llama. A `Param`: filter for it before `Param`."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which maps of every layer have adapters, and their size.

    Attributes:
        rank: r.
        alpha: the adapters' output is scaled by alpha / r.
        targets: names of `TARGETS`.
        dropout: rate on an adapter's input while training.

    Raises:
        ValueError: values out of range, an unknown or repeated target.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"LoRA targets {','.join(self.targets)!r}: give some of {','.join(TARGETS)}, each once")
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoRA rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: at least 1, above 0, in [0, 1)"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """The inverse of `dataclasses.asdict`, after JSON made lists of its tuples. Raises KeyError, TypeError."""
        return cls(**{**values, "targets": tuple(values["targets"])})

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


class Adapter(nnx.Module):
    """(alpha / r) · drop(x) A B. A starts uniform in ± 1/√I as in PEFT, B at zero: the map starts as it was.

    Both are float32 masters: a [in-axes…, r] and b [r, out-axes…], so that each shares its axes with the base weight.
    """

    def __init__(
        self, key: Array, inputs: tuple[int, ...], outputs: tuple[int, ...], target: str, lora: LoRAConfig
    ) -> None:
        bound = 1 / math.sqrt(math.prod(inputs))
        self.scale, self.dropout, self.site = lora.scale, lora.dropout, TARGETS.index(target)
        self.a = LoRAParam(jax.random.uniform(key, (*inputs, lora.rank), minval=-bound, maxval=bound))
        self.b = LoRAParam(jnp.zeros((lora.rank, *outputs)))

    def __call__(self, x_TI: Array, key: Array | None) -> Array:
        """[T, I] → [T, O] in x's dtype; with a key, under dropout."""
        if key is not None and self.dropout:
            kept = jax.random.bernoulli(jax.random.fold_in(key, 2 + self.site), 1 - self.dropout, x_TI.shape)
            x_TI = jnp.where(kept, x_TI / (1 - self.dropout), 0).astype(x_TI.dtype)
        a_Ir = self.a[...].reshape(x_TI.shape[1], -1).astype(x_TI.dtype)
        b_rO = self.b[...].reshape(a_Ir.shape[1], -1).astype(x_TI.dtype)
        return (x_TI @ a_Ir) @ b_rO * jnp.asarray(self.scale, x_TI.dtype)


def update(a: Array, b: Array, scale: float) -> Array:
    """What an adapter adds to its base weight: scale · A B, float32 [in-axes…, out-axes…] of one layer."""
    # "highest": an NVIDIA GPU would multiply float32 with TF32's 10 bits of mantissa otherwise.
    return scale * jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision="highest")


def adapters(model: nnx.Module) -> dict[tuple[Any, ...], Adapter]:
    """The adapters of a model by the path of the weight that each adapts; stacked, as the layers are."""
    found = ((path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Adapter))
    return {(*path[:-1], "weight"): adapter for path, adapter in found}


def merged(model: nnx.Module) -> nnx.State:
    """The parameters and buffers of a model with every adapter added to its weight, in float32, and gone.

    Raises:
        ValueError: a weight is quantised: the sum could not be held in it.
    """
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.Not(is_adapter))))
    for path, adapter in adapters(model).items():
        if path not in state:
            raise ValueError(
                f"{'.'.join(map(str, path))} is quantised: load the run without --quantize to merge adapters"
            )
        weight = state[path]
        layers_of = jax.vmap(update, in_axes=(0, 0, None))
        sum_ = weight[...].astype(jnp.float32) + layers_of(adapter.a[...], adapter.b[...], adapter.scale)
        state[path] = weight.replace(sum_.astype(weight.dtype))
    return nnx.from_flat_state(list(state.items()))


def is_adapter(path: tuple[Any, ...], variable: Any) -> bool:
    """The NNX filter for adapters, also of abstract states."""
    return isinstance(variable, LoRAParam) or getattr(variable, "type", None) is LoRAParam
