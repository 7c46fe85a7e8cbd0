"""Tensors of weight files → parameters in place, quantised if so asked, on one device or divided among many.

Stacks of layers are allocated once, on a mesh as `core.sharding` lays them, and each tensor is written into its row:
beside what is kept, one tensor lives on the host and one on its devices. A host reads of each tensor the rows that its
devices need, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core import sharding
from core.hf_names import STACK, Layout, Place
from core.quantized import quantize_as
from core.weight_files import WeightFile

Path = tuple[Any, ...]
_HALVES = ("codes", "scales")


class Filling:
    """The parameters that `abstract` describes, filled tensor by tensor.

    Args:
        abstract: shapes and dtypes.
        mesh: where they are to lie; None: on the default device. Of several processes, all must do the same.
    """

    def __init__(self, abstract: nnx.State, mesh: Mesh | None) -> None:
        self._variables: dict[Path, Any] = dict(nnx.to_flat_state(abstract))
        self._mesh = mesh
        self._laid = {path: _laid(path, leaf.shape, mesh) for path, leaf in self._variables.items()}
        # Stacks are there from the start; other parameters are one tensor each and come as they are read.
        stacks = [(path, leaf) for path, leaf in self._variables.items() if path[0] == STACK]
        self._arrays = {path: jnp.zeros(leaf.shape, leaf.dtype, device=self._laid[path]) for path, leaf in stacks}

    def put(self, file: WeightFile, name: str, place: Place) -> bool:
        """Puts a tensor of a file into its place; False: not all of it is finite there."""
        tensor, path = _read(file, name, place, self._mesh), place.path
        if place.layer is None:
            dtype = self._variables[path].dtype
            self._arrays[path], finite = _converter(self._laid[path])(tensor, place.layout, dtype)
        elif path in self._arrays:
            writer = _writer(self._laid[path])
            self._arrays[path], finite = writer(self._arrays[path], tensor, place.layer, place.layout)
        else:
            halves = [(*path, half) for half in _HALVES]
            quantizer = _quantizer(*(self._laid[half] for half in halves))
            stacks, finite = quantizer([self._arrays[half] for half in halves], tensor, place.layer, place.layout)
            self._arrays.update(zip(halves, stacks, strict=True))
        # Fetching the flag waits for the write: tensors must not queue up in memory.
        return bool(finite)

    def equals(self, file: WeightFile, name: str, place: Place) -> bool:
        """Whether a tensor of a file is what stands in `place` already."""
        there = self._arrays[place.path]
        read = _read(file, name, place, self._mesh)
        tensor, _ = _converter(self._laid[place.path])(read, place.layout, there.dtype)
        return bool((tensor == there).all())

    def state(self) -> nnx.State:
        """The parameters."""
        return nnx.from_flat_state([(path, leaf.replace(self._arrays[path])) for path, leaf in self._variables.items()])


def _laid(path: Iterable[Any], shape: tuple[int, ...], mesh: Mesh | None) -> NamedSharding | None:
    """Where a parameter lies; None: on the default device."""
    return None if mesh is None else sharding.sharding_of([str(part) for part in path], shape, mesh)


def _read(file: WeightFile, name: str, place: Place, mesh: Mesh | None) -> Array:
    """A tensor of Hugging Face's on its devices, divided there as ours is: converting it then moves nothing."""
    layout = place.layout
    ours = _laid(place.path, layout.our_shape, mesh)
    if ours is None:
        return jax.device_put(file.read(name), may_alias=True)  # never written to afterwards
    spec = tuple(ours.spec) + (None,) * (len(layout.our_shape) - len(ours.spec))
    theirs = NamedSharding(ours.mesh, PartitionSpec(*layout.axes_in_hf(spec)))
    indices = theirs.addressable_devices_indices_map(layout.hf_shape).values()
    bounds = [index[0].indices(layout.hf_shape[0])[:2] for index in indices if index is not None]
    first, end = min(low for low, _ in bounds), max(high for _, high in bounds)
    tensor = file.read(name, slice(first, end))

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        low, high, _ = index[0].indices(layout.hf_shape[0])
        return tensor[(slice(low - first, high - first), *index[1:])]

    return jax.make_array_from_callback(layout.hf_shape, theirs, part)


def _convert(tensor: Array, layout: Layout, dtype: Any) -> tuple[Array, Array]:
    """A tensor of Hugging Face's as we hold it, and whether it is finite there."""
    ours = layout.to_ours(tensor).astype(dtype)
    # Both extremes are, or one is NaN. Asked of each number, XLA on a CPU would write all the answers to memory first.
    return ours, jnp.isfinite(ours.max()) & jnp.isfinite(ours.min())


def _write(stack: Array, tensor: Array, layer: int, layout: Layout) -> tuple[Array, Array]:
    """Puts a tensor of Hugging Face's into its layer's row, in place; also, is it finite there?"""
    ours, finite = _convert(tensor, layout, stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, ours, layer, 0), finite


def _quantize(stacks: list[Array], tensor: Array, layer: int, layout: Layout) -> tuple[list[Array], Array]:
    """The same into the stacks of codes and scales."""
    ours, finite = _convert(tensor, layout, jnp.float32)
    rows = quantize_as(ours, *(jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype) for stack in stacks))
    written = [
        jax.lax.dynamic_update_index_in_dim(stack, row, layer, 0) for stack, row in zip(stacks, rows, strict=True)
    ]
    return written, finite


@functools.cache
def _converter(laid: NamedSharding | None) -> Callable[..., tuple[Array, Array]]:
    """`_convert`, compiled for a parameter that lies so."""
    return jax.jit(_convert, static_argnames=("layout", "dtype"), out_shardings=_with_flag(laid, laid))


@functools.cache
def _writer(laid: NamedSharding | None) -> Callable[..., tuple[Array, Array]]:
    """`_write`, compiled for a stack that lies so."""
    return jax.jit(_write, static_argnames="layout", donate_argnums=0, out_shardings=_with_flag(laid, laid))


@functools.cache
def _quantizer(codes: NamedSharding | None, scales: NamedSharding | None) -> Callable[..., tuple[list[Array], Array]]:
    """`_quantize`, compiled for stacks that lie so."""
    laid = _with_flag(codes, [codes, scales])
    return jax.jit(_quantize, static_argnames="layout", donate_argnums=0, out_shardings=laid)


def _with_flag(one: NamedSharding | None, laid: Any) -> Any:
    return None if one is None else (laid, NamedSharding(one.mesh, PartitionSpec()))
