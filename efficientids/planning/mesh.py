"""Which mesh a run takes: what was asked for, or the one with the least communication whose devices hold the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from core.sharding import MeshShape, make_mesh
from efficientids.errors import UserError
from efficientids.options import READS, TrainConfig
from efficientids.planning.memory import kept_between_steps
from efficientids.systems.base import Scale, System, mesh_shape

STATE_SHARE = 0.7
"""Of a device's pool, what parameters, gradients and optimiser may take; the rest is for activations, layers gathered
by fsdp and the program's temporaries. A rule of thumb: the compiled plan knows better."""


def resolve_mesh(config: TrainConfig, system: System, scale: Scale) -> tuple[TrainConfig, str]:
    """The configuration with its mesh settled, and why in words; "" where there was nothing to choose.

    Raises:
        UserError: a mesh of more devices than there are, or, of a job of several processes, not of all of them.
    """
    if "mesh" not in READS[config.recommender]:
        return config, ""
    devices = jax.devices()
    if config.mesh != "auto":
        _check(mesh_shape(config), len(devices))
        return config, "as --mesh says"
    alone = devices[0].platform == "cpu" and jax.process_count() == 1
    if len(devices) == 1 or alone:
        more = f"; --mesh takes more of the {len(devices)} CPU devices" if len(devices) > 1 else ""
        return dataclasses.replace(config, mesh=str(MeshShape())), f"one device{more}"
    pool = (devices[0].memory_stats() or {}).get("bytes_limit")
    parts = kept_between_steps(config, system, scale)
    shape, reason = choose_mesh(len(devices), parts, pool, rows=config.batch_size)
    return dataclasses.replace(config, mesh=str(shape)), reason


def choose_mesh(
    num_devices: int, bytes_per_part: Mapping[str, int], pool_bytes: int | None, *, rows: int | None = None
) -> tuple[MeshShape, str]:
    """The mesh of `num_devices` with the least communication that fits.

    Data parallel sends gradients once a step; fsdp gathers the weights twice as well, the fewer the smaller its axis;
    tensor sums activations in every layer. So: data alone where every device holds everything; else the smallest fsdp
    axis that fits, data for the rest; tensor where there are fewer rows than devices.

    Args:
        bytes_per_part: what one device would hold between steps if it held everything, by part.
        pool_bytes: a device's memory that arrays may take; None: not known, taken to suffice.
        rows: of a batch, all devices together; None: to be chosen, as many as wanted.

    Returns:
        The shape and the reason in words. Where even the whole mesh is too small, its smallest share and that it is.
    """
    few = rows if rows is not None and rows < num_devices else num_devices
    shards = max(n for n in range(1, num_devices + 1) if num_devices % n == 0 and few % n == 0)
    tensor = num_devices // shards
    needed = sum(bytes_per_part.values())
    because = f"; tensor={tensor}, for {rows} rows divide among {shards} devices at most" if tensor > 1 else ""
    if pool_bytes is None:
        return MeshShape(data=shards, tensor=tensor), f"data parallel, the devices' memory is not known{because}"
    room = STATE_SHARE * pool_bytes
    gib = f"{needed / 2**30:.1f} GiB of parameters, gradients and optimiser"
    pool = f"{pool_bytes / 2**30:.1f} GiB of a device"
    for fsdp in (n for n in range(1, shards + 1) if shards % n == 0):
        if needed / (fsdp * tensor) <= room:
            what = "data parallel: every device holds all" if fsdp * tensor == 1 else f"divided by {fsdp * tensor}:"
            return MeshShape(shards // fsdp, fsdp, tensor), f"{what} {gib}, {STATE_SHARE:.0%} of {pool}{because}"
    return MeshShape(1, shards, tensor), f"{gib} are too much even for all {num_devices}, {pool}{because}"


def mesh_of_run(config: TrainConfig) -> Mesh | None:
    """The devices of a resolved configuration; None: one, where nothing needs a mesh."""
    shape = mesh_shape(config)
    return None if shape.size == 1 else make_mesh(shape)


def _check(shape: MeshShape, devices: int) -> None:
    if shape.size > devices:
        raise UserError(
            f"--mesh {shape} has {shape.size} devices, and {devices} are there; give a smaller one, or auto. (A CPU "
            f"shows as many as XLA_FLAGS=--xla_force_host_platform_device_count={shape.size} says.)"
        )
    if jax.process_count() == 1:
        return
    if shape.size != devices:
        raise UserError(
            f"--mesh {shape} has {shape.size} devices; the {jax.process_count()} processes have {devices}, and all "
            "must take part: give a mesh of all of them, or start fewer processes"
        )
    try:
        shape.part_of(jax.process_index(), jax.process_count())
    except ValueError as error:
        raise UserError(f"--{error}") from error
