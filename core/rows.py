"""Rows of a batch on the devices of a mesh: what a model may say of them while it is traced, without naming a mesh.

On one device these functions do nothing. On a mesh (`on`) XLA would find a correct program without them, but one that
moves what could stay: they were put where the compiled program sent activations about.

Legend: T rows of a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from core.sharding import AXES, BATCH_AXES

_WHOLE = PartitionSpec()


@contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """Inside, what is traced knows `mesh`: around the body of a compiled function. None: one device."""
    if mesh is None:
        yield
    else:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def _traced_axes(wanted: Sequence[str], length: int) -> tuple[str, ...] | None:
    """Those of `wanted` that have several devices on the mesh being traced for; None: no mesh, or inside a shard_map.

    Where together they do not divide `length`: none of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds.get(axis) != AxisType.Auto for axis in AXES):
        return None
    axes = tuple(axis for axis in wanted if mesh.shape[axis] > 1)
    return axes if length % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def keep_rows(x: jax.Array) -> jax.Array:
    """The same array [rows, ...], its rows divided along `BATCH_AXES` and nothing else of it.

    Where both a weight and the rows lie on fsdp, XLA might move the activations: the weights are fewer. Elsewhere, too,
    it takes over what the other end of a program suggests: what a loss does with its rows would spread into the layers.
    """
    axes = _traced_axes(BATCH_AXES, x.shape[0])
    return x if axes is None else jax.lax.with_sharding_constraint(x, PartitionSpec(axes or None))


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids] for ids [rows, ...]: each device looks up its columns for the rows of all its fsdp group, and the
    group then exchanges columns for rows. Left to itself XLA would give every device all rows of the batch.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), _traced_axes(("data",), ids.shape[0])
    if axes is None:
        return table[ids]
    along = PartitionSpec(axes or None)
    columns = "fsdp" if table.shape[-1] % mesh.shape["fsdp"] == 0 else None
    found = table[jax.lax.with_sharding_constraint(ids, along)]
    spec = PartitionSpec(axes or None, *(None,) * (ids.ndim - 1), columns)
    return keep_rows(jax.lax.with_sharding_constraint(found, spec))


def sum_over_batch_shards(fn: Callable[[Any, Any], jax.Array], tables: Any, rows: Any) -> jax.Array:
    """fn(tables, rows), each device computing the sum over its own rows.

    A loss that sorts positions, or gathers them, would move all of them to every device if XLA divided it. Here rows
    are divided among all devices, those of a tensor group too (which hold the same rows, and would else compute the
    same), and every device sees the tables whole: gathered before, their gradients summed after.

    Args:
        fn: (tables, rows) → scalar, a sum over rows: fn of parts of them must add up to fn of all.
        tables: pytree of arrays that every row may need; None leaves are allowed.
        rows: pytree of arrays [T, ...]. Where T does not divide among all devices, it is divided along `BATCH_AXES`;
            where not among these either, XLA divides fn as it can.

    Returns:
        What fn(tables, rows) would, but for the order of summation. On one device it is exactly that.
    """
    length = jax.tree.leaves(rows)[0].shape[0]
    axes = _traced_axes(AXES, length) or _traced_axes(BATCH_AXES, length)
    if not axes:
        return fn(tables, rows)
    # check_vma would refuse the loss's scans, whose sums start the same on every device and then differ.
    local = jax.shard_map(
        lambda tables, rows: fn(tables, rows)[None],
        in_specs=(_WHOLE, PartitionSpec(axes)), out_specs=PartitionSpec(axes), check_vma=False,
    )  # fmt: skip
    return local(tables, rows).sum()
