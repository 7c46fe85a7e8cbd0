"""What one configuration needs on one number of devices, and whether that fits: the question that a plan asks often."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from core.sharding import MeshShape, make_mesh
from efficientids.errors import UserError
from efficientids.options import READS, PlanOptions, TrainConfig
from efficientids.planning import gpu, records, traced
from efficientids.planning.bound import Bound, bound
from efficientids.planning.devices import Device, Pool
from efficientids.planning.gpu import CompiledMemory
from efficientids.planning.memory import (
    ACTIVATIONS,
    IDLE,
    Estimate,
    abstract_program,
    account,
    bytes_of,
    kept_between_steps,
)  # fmt: skip
from efficientids.planning.mesh import choose_mesh
from efficientids.recommenders.base import turns
from efficientids.systems.base import Scale, System, mesh_shape
from efficientids.training.step import Program

ACTIVATIONS_ALLOWANCE = 0.25
"""On top of estimated activations, where nothing is compiled: long sequences were seen a fifth under XLA's account."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        name: of the device; programs compiled for it are known by it.
        pool: number of devices → the pool of each.
        devices: number → devices to compile for, there or not; None: nothing is compiled.
        facts: for the bound of the step's time; None: no bound.
    """

    name: str
    pool: Callable[[int], Pool]
    devices: Callable[[int], Sequence[Any]] | None
    facts: Device | None


@dataclasses.dataclass(frozen=True)
class Need:
    """What a step needs of each device.

    Attributes:
        config: resolved.
        estimate: exact parts, with activations estimated.
        compiled: XLA's account; None where nothing was compiled.
        bound: of the step's time; None for a device without facts.
        pool: of each device.
        cudnn: whether attention is cuDNN's kernel.
    """

    config: TrainConfig
    devices: int
    estimate: Estimate
    compiled: CompiledMemory | None
    bound: Bound | None
    pool: Pool
    cudnn: bool = False

    @property
    def peak(self) -> int:
        """Bytes: XLA's with what waiting phases keep, else the estimate with `ACTIVATIONS_ALLOWANCE`."""
        if self.compiled is None:
            return self.estimate.total + int(ACTIVATIONS_ALLOWANCE * self.estimate.parts[ACTIVATIONS])
        return self.compiled.peak + self.estimate.parts.get(IDLE, 0)

    @property
    def fits(self) -> bool:
        return self.peak <= self.pool.size

    def to_json(self) -> dict[str, Any]:
        """The verdict in plain values; bytes."""
        return {
            "num_devices": self.devices,
            "batch_size": self.config.batch_size,
            "mesh": str(mesh_shape(self.config)),
            "peak": self.peak,
            "fits": self.fits,
            "by": "estimate" if self.compiled is None else "compiler",
            "attention": "cudnn" if self.cudnn else "xla",
        }


class Candidates:
    """Configurations of one system on one kind of device, each traced and compiled once."""

    def __init__(self, system: System, scale: Scale, target: Target) -> None:
        self.system, self.scale, self.target = system, scale, target
        self._step, self.need = functools.cache(self._traced), functools.cache(self._need)

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """The configuration as training would resolve it on a GPU."""
        return self.system.resolve(_for_gpu(config), self.scale)

    def _meshed(self, config: TrainConfig, devices: int, pool: Pool) -> TrainConfig:
        """An unresolved configuration with its mesh settled, as a run on that many devices would settle it.

        Raises:
            UserError: a mesh of another number of devices.
        """
        shape = mesh_shape(config)
        if config.mesh == "auto" and devices > 1:
            parts = kept_between_steps(_for_gpu(config), self.system, self.scale)
            shape, _ = choose_mesh(devices, parts, pool.size, rows=config.batch_size)
        if shape.size != devices:
            raise UserError(
                f"--mesh {shape} has {shape.size} devices, and {devices} are planned for; give --num_devices "
                f"{shape.size}, or leave --mesh out"
            )
        return dataclasses.replace(config, mesh=str(shape))

    def _traced(self, config: TrainConfig, shape: MeshShape) -> tuple[Program, int, jax.stages.Traced, Any]:
        """The program of a resolved configuration over shapes, the rows of its batch, its traced step, and what waits.

        See `abstract_program`.
        """
        places = jax.devices("cpu")[:1] if self.target.devices is None else self.target.devices(shape.size)
        program, phase, idle = abstract_program(config, self.system, self.scale, make_mesh(shape, places))
        rows = min(spec.shape[0] for spec in phase.batch_specs[0].values())
        return program, rows, gpu.traced_step(program, phase), idle

    def _need(self, config: TrainConfig, devices: int = 1, compiled: bool = True) -> Need:
        """What an unresolved configuration needs; from disk, where it was compiled before.

        Args:
            compiled: ask the compiler, where there is one for the target. A configuration whose exact parts alone
                exceed the pool is not compiled: no program makes them smaller.

        Raises:
            UserError: flags that training would refuse, too, or a batch that does not split over the devices.
        """
        pool = self.target.pool(devices)
        resolved = self.resolve(self._meshed(config, devices, pool))
        key = self._key(resolved, devices)
        known = None if key is None else _recalled(records.read(key))
        if known is not None:
            return Need(resolved, devices, *known[:3], pool, known[3])
        # Arithmetic and activations are counted on one device: on a mesh the program says less plainly what is whose.
        program, rows, step, idle = self._step(resolved, MeshShape())
        estimate = account(resolved, program, self.scale, traced.activations(step.jaxpr), idle)
        limit = None
        if self.target.facts is not None:
            limit = bound(
                traced.cost(step.jaxpr), bytes_of(program.state.params), bytes_of(program.frozen),
                bytes_of(program.state), rows * resolved.seq_len, self.target.facts, mesh_shape(resolved),
            )  # fmt: skip
        found, cudnn = None, traced.fuses_attention(step.jaxpr)
        if compiled and key is not None and estimate.exact <= pool.size:
            if devices > 1:
                step = self._step(resolved, mesh_shape(resolved))[2]
            found = gpu.compiled_memory(step)
            records.write(key, {
                "estimate": dataclasses.asdict(estimate),
                "compiled": dataclasses.asdict(found),
                "bound": None if limit is None else dataclasses.asdict(limit),
                "cudnn": cudnn,
            })  # fmt: skip
        return Need(resolved, devices, estimate, found, limit, pool, cudnn)

    def _key(self, resolved: TrainConfig, devices: int) -> str | None:
        """What the record of a compiled step is kept by; None: nothing is compiled for this target."""
        if self.target.devices is None:
            return None
        recommender = self.system.planned(resolved, self.scale)
        shapes = [phase.batch_specs[0] for phase, _ in turns(recommender.plan())]
        settings = {f.name: getattr(resolved, f.name) for f in dataclasses.fields(resolved)}
        for name in _NO_PART:
            settings.pop(name)
        return records.key_of(self.target.name, devices, settings, recommender.spec.to_json(), shapes)


def _for_gpu(config: TrainConfig) -> TrainConfig:
    """`--precision auto` is a GPU's, whatever machine plans."""
    if config.precision == "auto" and "precision" in READS[config.recommender]:
        return dataclasses.replace(config, precision="bfloat16")
    return config


# Flags that say where a run lies and what is asked of a plan: the program is the same.
_NO_PART = (
    "data_dir", "checkpoint_dir", "trackers", "force", "seed", "log_every", "eval_every", "eval_users", "patience",
    "check_gradients",
    *(f.name for f in dataclasses.fields(PlanOptions)),
)  # fmt: skip


def _recalled(values: dict[str, Any] | None) -> tuple[Estimate, CompiledMemory, Bound | None, bool] | None:
    """A record's parts; None for one that cannot be read."""
    if values is None:
        return None
    try:
        limit = None if values["bound"] is None else Bound(**values["bound"])
        return Estimate(**values["estimate"]), CompiledMemory(**values["compiled"]), limit, bool(values["cudnn"])
    except (KeyError, TypeError):
        return None
