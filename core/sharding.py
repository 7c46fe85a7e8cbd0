"""Many devices: the mesh, and one table of which axis of a parameter lies on which axis of the mesh.

Models name no mesh. A program is compiled with the shardings of its arguments (`shardings`), XLA derives the rest
(arXiv 2105.04663), and the functions of `core.rows` keep it on the right way.

The mesh has three axes. data: every device has all parameters and rows of its own. fsdp: rows of its own too, and a
part of each parameter, gathered where it is used (ZeRO-3, arXiv 1910.02054). tensor: a part of each layer's heads and
MLP, rows shared (arXiv 1909.08053).

Legend: L layers of a stack, r rank of an adapter; the letters of shapes are those of the models.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""Rows of a batch are divided among the devices along these."""

Axis = str | None
AnyMesh = Mesh | AbstractMesh  # shapes can be laid on devices that nobody has named
_WHOLE = PartitionSpec()

# Linear maps by the last part of their path: mesh axes of the in-axes, then of the out-axes. Maps in pairs: the first
# divides its out-axes by tensor, the second its in-axes, so that one sum ends each pair.
_LINEAR: Mapping[str, tuple[tuple[Axis, ...], tuple[Axis, ...]]] = {
    "q": (("fsdp",), ("tensor", None)),  # D → N H
    "k": (("fsdp",), ("tensor", None)),
    "v": (("fsdp",), ("tensor", None)),
    "qkv": (("fsdp",), (None, "tensor", None)),  # SASRec: D → 3 A H
    "o": (("tensor", None), ("fsdp",)),  # N H → D
    "gate": (("fsdp",), ("tensor",)),  # D → F, and E → D of the input adapter
    "up": (("fsdp",), ("tensor",)),
    "down": (("tensor",), ("fsdp",)),
    "out": (("tensor",), ("fsdp",)),
    "output_adapter": (("fsdp",), (None,)),  # D → E
    "output_projector": (("fsdp",), (None,)),  # ETEGRec: D → d
    "scid_projector": ((None,), ("fsdp",)),  # d → D
    "enc_adapter": (("fsdp",), (None,)),
    "dec_adapter": (("fsdp",), (None,)),
}
# Tables by name. N + 1 items hardly ever divide, so an item table is divided by its columns.
_TABLES: Mapping[str, tuple[Axis, ...]] = {
    "embed_VD": ("tensor", "fsdp"),
    "head_VD": ("tensor", "fsdp"),
    "table_NE": (None, "fsdp"),
    "factor_RE": (None, "fsdp"),
    "cluster_vectors_CE": (None, "fsdp"),
    "items_ND": (None, "fsdp"),
    "positions_TD": (None, "fsdp"),
    "tables": (None, "fsdp"),  # a list: of codes
}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices each axis of the mesh has."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @staticmethod
    def parse(text: str) -> MeshShape:
        """Reads `data=2,fsdp=4`; an axis left out is 1.

        Raises:
            ValueError: anything else, an axis named twice, or a size below 1.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if found is None or found[1] not in AXES or found[1] in sizes or int(found[2]) < 1:
                raise ValueError(
                    f"mesh {text!r}: {part.strip()!r} is not understood; write sizes of {', '.join(AXES)}, each "
                    "at most once, as in data=2,fsdp=4"
                )
            sizes[found[1]] = int(found[2])
        return MeshShape(**sizes)

    def __str__(self) -> str:
        sizes = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(sizes) or "data=1"

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.batch_shards * self.tensor

    @property
    def batch_shards(self) -> int:
        """Parts that the rows of a batch are divided into."""
        return self.data * self.fsdp

    def part_of(self, process: int, processes: int) -> tuple[int, int]:
        """Which rows of every batch a process needs for its devices: the i-th of n equal parts, as (i, n).

        Processes hold equal runs of the mesh's devices. Those that share a tensor group need the same rows.

        Raises:
            ValueError: neither divides the tensor axis the devices of a process, nor they it.
        """
        each, left = divmod(self.size, processes)
        if left or (each % self.tensor and self.tensor % each):
            raise ValueError(
                f"mesh {self} has {self.size} devices, which {processes} processes cannot share: give each a whole "
                "number of tensor groups, or each group a whole number of processes"
            )
        sharing = max(1, self.tensor // each)
        return process // sharing, processes // sharing


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first `shape.size` devices, those of a tensor group next to each other.

    Args:
        devices: default `jax.devices()`; those of a topology, to compile for devices that are not there.

    Raises:
        ValueError: fewer devices than the mesh has.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < shape.size:
        raise ValueError(f"mesh {shape} has {shape.size} devices, and {len(devices)} are there")
    sizes = tuple(getattr(shape, axis) for axis in AXES)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: shape.size])


def axes_of(path: Sequence[str]) -> tuple[Axis, ...] | None:
    """The mesh axis that each axis of a parameter is to lie on, without a stack's axis of layers; None: no rule.

    Args:
        path: its names from the root; whatever stands before the last few has no say, so that an optimiser's moments
            lie as their parameter does. What belongs to a linear map lies as its weight: codes and scales of a
            quantised one (`core.quantized`), an adapter's a [in…, r] and b [r, out…] (`core.lora`).
    """
    name, owner = path[-1], path[-2] if len(path) > 1 else ""
    if owner in ("weight", "adapter") and len(path) > 2:
        owner = path[-3]
    for table in (name, owner):  # an entry of a list has a number for its name
        if table in _TABLES:
            return _TABLES[table]
    if owner not in _LINEAR:
        return None
    inputs, outputs = _LINEAR[owner]
    # Of a bias only what tensor divides is worth dividing: the rest is small, and gathering it would cost a message.
    bias = tuple(axis if axis == "tensor" else None for axis in outputs)
    return {
        "weight": (*inputs, *outputs), "codes": (*inputs, *outputs), "scales": (*inputs, *outputs), "bias": bias,
        "a": (*inputs, None), "b": (None, *outputs),
    }.get(name)  # fmt: skip


def sharding_of(path: Sequence[str], shape: Sequence[int], mesh: AnyMesh) -> NamedSharding:
    """How an array lies on the mesh by the table; an axis that its mesh axis does not divide is left whole.

    Args:
        path: as of `axes_of`.
        shape: with at most one axis (layers) more than the rule, in front; another shape lies whole on every device.
    """
    axes = _wanted(path, shape)
    kept = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept) if any(kept) else _WHOLE)


def _wanted(path: Sequence[str], shape: Sequence[int]) -> tuple[Axis, ...]:
    axes = axes_of(path)
    extra = len(shape) - len(axes or ())
    if axes is None or extra not in (0, 1):
        return (None,) * len(shape)
    return (None,) * extra + axes


def shardings(tree: Any, mesh: AnyMesh) -> Any:
    """The sharding of every leaf (an array or its shape) of a state or an optimiser state, in a tree of that form."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharding_of(names(path), leaf.shape, mesh), tree)


def names(path: Sequence[Any]) -> tuple[str, ...]:
    """The names on a leaf's path; what NNX puts behind a variable's own is left out."""
    found = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return found[:-1] if found and found[-1] == "value" else found


def place(tree: Any, mesh: AnyMesh) -> Any:
    """`tree` as the table lays it: arrays are moved (kept where they lie so already), shapes get their sharding."""

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree, shardings(tree, mesh))


class LeftWhole(NamedTuple):
    """A parameter that fsdp or tensor should divide and does not: its path, its bytes, and why."""

    path: str
    bytes: int
    reason: str


def left_whole(tree: Any, mesh: Mesh) -> list[LeftWhole]:
    """What of `tree` (arrays or shapes) is not divided by fsdp or tensor, the largest first; biases and norms aside."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = names(path)
        axes, size = _wanted(parts, leaf.shape), math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        odd = [
            f"{length} does not divide by {axis} {mesh.shape[axis]}"
            for axis, length in zip(axes, leaf.shape, strict=True)
            if axis and length % mesh.shape[axis]
        ]
        if odd:
            found.append(LeftWhole(".".join(parts), size, "; ".join(odd)))
        elif not any(axes) and len(leaf.shape) > 1 and parts[-1] not in ("scale", "bias"):
            found.append(LeftWhole(".".join(parts), size, "no rule divides it"))
    divides = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    return sorted(found, key=lambda entry: -entry.bytes) if divides else []


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, _WHOLE)


def rows(mesh: Mesh) -> NamedSharding:
    """Rows of a batch (the first axis) divided along `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_of_process(batch: Any, mesh: Mesh) -> Any:
    """Host arrays with the rows of this process (`MeshShape.part_of`) → arrays [all rows, ...] on the mesh."""
    sharding = rows(mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = sharding.addressable_devices_indices_map((shards,)).values()
    here = {index[0].indices(shards)[0] for index in indices if index is not None}

    def put(x: np.ndarray) -> jax.Array:
        total = (x.shape[0] * shards // len(here), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, total)

    return jax.tree.map(put, batch)


def split_rows(batch: Any, mesh: Mesh) -> Any:
    """Host arrays [rows, ...], the same in every process → arrays on the mesh, by rows where these divide."""

    def put(x: np.ndarray) -> jax.Array:
        divides = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        return jax.make_array_from_callback(x.shape, rows(mesh) if divides else whole(mesh), lambda index: x[index])

    return jax.tree.map(put, batch)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays lies on; None for one device."""
    found = [leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    meshes = [sharding.mesh for sharding in found if isinstance(sharding, NamedSharding)]
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process, wherever its parts lie; where there are several, all of them must call."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = jax.jit(lambda x: x, out_shardings=whole(x.sharding.mesh))(x)  # type: ignore[attr-defined]
    return np.asarray(x)
