"""Compiling the training step for a GPU that is not there.

XLA needs a description of the device, not the device: with the CUDA plugin installed (`requirements-aot.txt`) a machine
without a GPU compiles the same program and reads XLA's own account of its memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficientids.errors import UserError
from efficientids.recommenders.base import Phase
from efficientids.training.step import Program


@dataclasses.dataclass(frozen=True)
class Device:
    """Public facts of a GPU, as XLA's `GpuDeviceInfoProto` names them (CUDA's deviceQuery and NVIDIA's data sheets)."""

    name: str
    compute_capability: tuple[int, int]
    cores: int
    memory_bytes: int
    memory_bandwidth: int
    clock_ghz: float
    l2_bytes: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_optin: int

    def target_config(self) -> str:
        """The device as the text of a `GpuTargetConfigProto`."""
        major, minor = self.compute_capability
        facts = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared_memory_per_core,
            "threads_per_core_limit": self.threads_per_core,
            "core_count": self.cores,
            "fpus_per_core": 128,
            "block_dim_limit_x": 2147483647,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "memory_bandwidth": self.memory_bandwidth,
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            "shared_memory_per_block_optin": self.shared_memory_optin,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        listed = " ".join(f"{name}: {value}" for name, value in facts.items())
        return (
            f"gpu_device_info {{ {listed} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} '
            f'device_description_str: "{self.name}"'
        )


DEVICES: Mapping[str, Device] = {
    "rtx5090": Device(
        name="NVIDIA GeForce RTX 5090",
        compute_capability=(12, 0),
        cores=170,
        memory_bytes=34_190_458_880,
        memory_bandwidth=1_792_000_000_000,
        clock_ghz=2.4,
        l2_bytes=100_663_296,
        threads_per_core=1536,
        shared_memory_per_core=131_072,
        shared_memory_optin=101_376,
    ),
}


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """XLA's buffer assignment of a compiled step, in bytes on one device."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def peak(self) -> int:
        """arguments + outputs − aliased + temporaries; the CUDA context and libraries' workspaces come on top."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def compile_step(program: Program, phase: Phase, device: str) -> CompiledMemory:
    """Compiles the step of an abstract program (`planning.memory.abstract_program`) for one GPU.

    Raises:
        UserError: an unknown device, or no CUDA plugin of jax's own version.
    """
    if device not in DEVICES:
        raise UserError(f"device {device!r}: choose one of {', '.join(DEVICES)}")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=DEVICES[device].target_config(), topology="1x1x1"
        )
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"no CUDA plugin for jax {jax.__version__} to compile with; `make install` installs it, or "
            f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} ({error})"
        ) from error
    whole = NamedSharding(Mesh(np.array(topology.devices), ("device",)), PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree)

    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = placed((program.state, program.frozen, dict(phase.batch_specs[0]), key))
    lowered = program.step.trace(*arguments).lower(lowering_platforms=("cuda",))
    memory = lowered.compile().memory_analysis()
    return CompiledMemory(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )
