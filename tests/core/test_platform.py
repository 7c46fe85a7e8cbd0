"""What is settled before jax looks for devices, and where compiled programs are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from core import platform
from tests.conftest import ROOT

OLD, NEW = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
PREALLOCATE, ALLOCATOR = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (OLD, NEW, PREALLOCATE, ALLOCATOR):
        monkeypatch.setenv(name, "")  # so that what a test leaves there is undone
        monkeypatch.delenv(name)


@pytest.mark.parametrize("given", [{}, {OLD: "0.5"}, {NEW: "0.5"}, {PREALLOCATE: "false"}, {PREALLOCATE: "true"}])
def test_the_preference_yields_to_the_users_own(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_nvidia_device", lambda: True)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    platform.prefer_memory_fraction()
    preferred = {OLD: "0.92"} if given in ({}, {PREALLOCATE: "true"}) else {}
    found = {name: os.environ[name] for name in (OLD, NEW, PREALLOCATE) if name in os.environ}
    assert found == {**given, **preferred}


def test_nothing_is_set_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_nvidia_device", lambda: False)
    platform.prefer_memory_fraction()
    assert OLD not in os.environ


@pytest.mark.parametrize(
    "given, share",
    [
        ({}, 0.92),  # a plan on a laptop: what the run will take
        ({OLD: "0.6"}, 0.6),
        ({NEW: "0.7"}, 0.7),
        ({PREALLOCATE: "false"}, 0.75),
        ({PREALLOCATE: "false", OLD: "0.9"}, 0.9),
        ({ALLOCATOR: "platform"}, 1.0),
    ],
)
def test_the_fraction_that_a_run_would_take(
    given: dict[str, str], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert platform.memory_fraction() == share


@pytest.mark.parametrize("text", ["much", "-1", "0", "nan"])
def test_a_fraction_that_is_none_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OLD, text)
    with pytest.raises(ValueError, match=f"{OLD}={text}.*unset it"):
        platform.memory_fraction()


def test_a_command_settles_the_fraction_before_jax_is_imported() -> None:
    """With a driver's device node (pretended), in a process of its own."""
    told = """
import os, pathlib, sys, types
real = pathlib.Path.exists
pathlib.Path.exists = lambda path, **more: str(path) == "/dev/nvidiactl" or real(path, **more)
from efficientids import __main__ as application
probe = types.ModuleType("probe")
probe.main = lambda arguments: print(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"], "jax" in sys.modules) or 0
sys.modules["probe"] = probe
application.COMMANDS["train"] = ("probe", "")
import runpy
runpy.run_path("train_llama.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0.92 False\n"), done.stderr


def test_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFICIENTIDS_CACHE", str(tmp_path))
    assert platform.cache_root() == tmp_path
    monkeypatch.delenv("EFFICIENTIDS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert platform.cache_root() == tmp_path / "efficientids"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert platform.cache_root() == tmp_path / ".cache" / "efficientids"


NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_remove_custom_partitioning_ptr_from_cache_key",
)


@pytest.fixture
def cache_settings() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("cache_settings")
def test_programs_are_kept_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFICIENTIDS_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    platform.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    platform.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla") and (tmp_path / "xla").is_dir()
    assert jax.config.jax_compilation_cache_max_size > 0
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    platform.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"


@pytest.mark.usefixtures("cache_settings")
def test_a_cache_that_cannot_be_written_is_said_and_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFICIENTIDS_CACHE", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    platform.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "no cache" in capsys.readouterr().err
