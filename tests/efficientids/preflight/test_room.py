"""Checks of disk and memory: what they ask for, what they say, and that a run is refused before weights load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from efficientids import systems
from efficientids import train as main_job
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.preflight import room
from efficientids.preflight.room import available_memory, check_disk, check_host_memory, check_room
from efficientids.recommenders.base import in_base
from efficientids.systems.base import Scale
from tests.efficientids.tiny import SMALL_JOB, flags


class Usage(NamedTuple):
    free: int


def test_the_disk_refuses_by_both_amounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(3 * 2**30))
    check_disk(tmp_path, 3 * 2**30, "2 checkpoints")
    with pytest.raises(UserError, match=r"3.0 GiB free, and 4.0 GiB is needed \(2 checkpoints\).*--checkpoint_dir"):
        check_disk(tmp_path, 4 * 2**30, "2 checkpoints")


def test_the_memory_refuses_by_both_amounts() -> None:
    check_host_memory(2**30, "parameters", available=2**30)
    with pytest.raises(UserError, match=r"512 MiB available, and 1.0 GiB is needed \(parameters\)"):
        check_host_memory(2**30, "parameters", available=2**29)


def test_available_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  32000 kB\nMemFree:  100 kB\nMemAvailable:  8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 3000\nfile 2000\n")
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("6000\n")
    assert available_memory(tmp_path) == 3000


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_what_a_run_is_held_to(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen Llama's checkpoints hold the rest with two Adam moments; a CPU holds it all, with the gradients."""
    asked: dict[str, int] = {}
    monkeypatch.setattr(room, "check_disk", lambda folder, needed, what: asked.update(disk=needed))
    monkeypatch.setattr(room, "check_host_memory", lambda needed, what: asked.update(memory=needed))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    system, scale = systems.get("efficientids"), Scale(num_items=50)
    config = system.resolve(TrainConfig(freeze_llama=True, num_steps=25), scale)
    recommender = system.planned(config, scale)
    state = nnx.state(nnx.eval_shape(recommender.init, jax.random.key(0)))
    sizes = [(path[0] == "llama", leaf.size * np.dtype(leaf.dtype).itemsize) for path, leaf in nnx.to_flat_state(state)]
    llama, own = (sum(size for is_llama, size in sizes if is_llama == kind) for kind in (True, False))
    for eval_every, kept in ((10, 3), (1, 5)):
        check_room(recommender, nnx.Not(in_base), eval_every, tmp_path)
        assert kept * 3 * own <= asked["disk"] < kept * (3 * own + 100)  # Adam counts its steps, too
        wanted = llama + 4 * own if backend == "cpu" else 3 * own
        assert wanted <= asked["memory"] < wanted + 100


def test_a_run_without_room_is_refused_before_weights_load(
    tiny_data: Dataset, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = flags(data_dir=tiny_data.path, weights=weights, checkpoint_dir=tmp_path / "run", **SMALL_JOB)
    monkeypatch.setattr(room, "available_memory", lambda: 1000)
    monkeypatch.setattr(main_job, "weights_folder", lambda _: pytest.fail("weights were downloaded"))
    monkeypatch.setattr("efficientids.systems.llama_defaults.load_llama", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="host memory"):
        main_job.main(given)
    assert not (tmp_path / "run" / "model.json").exists()
