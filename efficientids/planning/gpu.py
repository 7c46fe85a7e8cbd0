"""Compiling the training step for a GPU that is not there.

XLA needs a description of the device, not the device: with the CUDA plugin installed (`requirements-aot.txt`) a machine
without a GPU compiles the same program and reads XLA's own account of its memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from core import sharding
from core.platform import without_known_noise
from efficientids.errors import UserError
from efficientids.planning.devices import Device
from efficientids.planning.records import versions
from efficientids.recommenders.base import Phase
from efficientids.training.step import Program

_NO_TILES = "find output tile sizes"


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


def plugin_installed() -> bool:
    """True where programs can be compiled for NVIDIA GPUs: a CUDA plugin of jax's own version."""
    return jax.__version__ in [version for name, version in versions().items() if name.endswith("-pjrt")]


def described(device: Device, count: int) -> Sequence[Any]:
    """`count` GPUs of one host that are not there, to compile for.

    Raises:
        UserError: no CUDA plugin of jax's own version.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=device.target_config(), topology=f"1x1x{count}"
        )
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"no CUDA plugin for jax {jax.__version__} to compile with; `make install` installs it, or "
            f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} ({error})"
        ) from error
    return topology.devices


def traced_step(program: Program, phase: Phase) -> jax.stages.Traced:
    """The step of an abstract program on its mesh."""
    mesh = program.mesh
    assert mesh is not None

    def placed(tree: Any, place: NamedSharding) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    key = placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.whole(mesh))
    batch = placed(dict(phase.batch_specs[0]), sharding.rows(mesh))
    return program.step.trace(program.state, program.frozen, batch, key)


def compiled_memory(traced: jax.stages.Traced) -> CompiledMemory:
    """XLA's account of a traced step."""
    lowered = traced.lower(lowering_platforms=("cuda",))
    with without_known_noise():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if _NO_TILES not in str(error):
                raise
            # Only a GPU that is there can choose tiles by trying; without it a default is taken that need not do.
            compiled = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    account = compiled.memory_analysis()
    return CompiledMemory(
        arguments=account.argument_size_in_bytes,
        outputs=account.output_size_in_bytes,
        aliased=account.alias_size_in_bytes,
        temporaries=account.temp_size_in_bytes,
    )
