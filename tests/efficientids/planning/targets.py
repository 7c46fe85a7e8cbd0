"""What the tests of planning plan for."""

from __future__ import annotations

import functools
import importlib.metadata

import jax
import pytest

from efficientids.planning import gpu
from efficientids.planning.candidates import Target
from efficientids.planning.devices import DEVICES, GIB, Pool


def need_plugin() -> None:
    """Skips where no CUDA plugin is installed; a plugin of another version than jax's fails."""
    try:
        found = importlib.metadata.version("jax-cuda12-plugin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no jax-cuda12-plugin: `make install` installs it on Linux x86-64")
    assert found == jax.__version__


def gpu_target(name: str = "rtx5090", *, compiles: bool = True, pool: int = 30 * GIB) -> Target:
    """A GPU that is not there, with a pool of so many bytes."""
    device = DEVICES[name]
    return Target(
        name=device.target_config(),
        pool=lambda count: Pool(pool, 1.0, 0),
        devices=functools.partial(gpu.described, device) if compiles else None,
        facts=device,
    )
