"""Fixtures shared by all tests: where the real data and the golden values are, and devices for meshes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import core  # isort: skip  # noqa: F401  # before jax: keeps its CUDA plugin quiet

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# For the tests of meshes. What names no mesh runs on the first of them alone, as on any machine.
jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).resolve().parents[1]


def _shared(variable: str, name: str) -> Path:
    """The folder named by the environment variable, else `../shared/<name>`; skips where neither is there.

    A folder that is there but cannot be read fails the test: a skip would hide it.
    """
    given = os.environ.get(variable)
    folder = Path(given) if given else ROOT.parent / "shared" / name
    if not folder.exists():
        if given:
            pytest.fail(f"{variable}={given} does not exist")
        pytest.skip(f"no {name} at ../shared/{name}; set {variable} to the folder to run this test")
    if not any(folder.iterdir()):
        pytest.fail(f"{folder} is empty")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep out of the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENTIDS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and weights."""
    return _shared("EFFICIENTIDS_REAL_DATA", "data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden values of the released code."""
    return _shared("EFFICIENTIDS_GOLDEN", "golden")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept for the rest of the session: many tests train the same ones."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return tmp_path_factory.mktemp("programs")
    shared = tmp_path_factory.getbasetemp().parent / "programs"  # all workers' own
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="module")
def quick_compile(programs: Path) -> Iterator[None]:
    """Compiles once and with few optimisations: here programs run for milliseconds and compile for seconds."""
    settings = {
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (str(programs), None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
    }
    for name, (here, _) in settings.items():
        jax.config.update(name, here)
    # jax looks for the folder only at the first compilation of a process.
    compilation_cache.reset_cache()
    yield
    for name, (_, elsewhere) in settings.items():
        jax.config.update(name, elsewhere)
    compilation_cache.reset_cache()
