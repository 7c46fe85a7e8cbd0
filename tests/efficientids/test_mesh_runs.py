"""Whole runs on meshes: the same curve, checkpoints that restore on other meshes, refusals, several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from core import sharding
from core.sharding import MeshShape, make_mesh
from efficientids import processes
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import evaluate
from efficientids.loading import open_run
from efficientids.options import TrainConfig
from efficientids.planning.mesh import STATE_SHARE, choose_mesh
from efficientids.train import main
from tests.conftest import ROOT
from tests.efficientids.tiny import ETEGREC_JOB, FROZEN, SMALL_JOB, events, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

Trained = Callable[..., Path]
MESH = "data=2,fsdp=2,tensor=2"


def curve(run: Path) -> list[float]:
    """Every loss and metric of a run."""
    rows = [row for event in ("step", "validation", "test") for row in events(run, event)]
    return [row[name] for row in rows for name in ("loss", "ndcg@10", "hr@10") if name in row]


@pytest.fixture(scope="module")
def on_mesh(trained: Trained) -> Path:
    return trained(*FROZEN, "--log_every=1", f"--mesh={MESH}")


def test_a_run_on_a_mesh_is_the_run_on_one_device(trained: Trained, on_mesh: Path) -> None:
    alone = trained(*FROZEN, "--log_every=1")
    assert len(curve(alone)) == 4 + 2 * 2 + 2
    np.testing.assert_allclose(curve(on_mesh), curve(alone), rtol=1e-5)
    assert yaml.safe_load((on_mesh / "config.yaml").read_text())["mesh"] == MESH
    assert yaml.safe_load((alone / "config.yaml").read_text())["mesh"] == "data=1"


@pytest.mark.parametrize("shape", [MeshShape(2, 2), MeshShape(1, 2, 2), None], ids=str)
def test_a_checkpoint_of_eight_devices_restores_on_fewer(on_mesh: Path, tiny_data: Dataset, shape: MeshShape) -> None:
    wanted = open_run(on_mesh, mesh=make_mesh(MeshShape.parse(MESH)))
    mesh = None if shape is None else make_mesh(shape)
    found = open_run(on_mesh, mesh=mesh)
    leaves = jax.tree_util.tree_leaves_with_path(found.params)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
        if mesh is None:
            assert len(leaf.sharding.device_set) == 1
        else:
            laid = sharding.sharding_of(sharding.names(path), leaf.shape, mesh)
            assert leaf.sharding.is_equivalent_to(laid, leaf.ndim), path
    metrics = [evaluate(run.recommender, run.model, tiny_data, "test").metrics for run in (wanted, found)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_from_another_mesh(on_mesh: Path, tiny_data: Dataset, tmp_path: Path) -> None:
    given = flags(
        data_dir=tiny_data.path, load_checkpoint=on_mesh, checkpoint_dir=tmp_path / "run", mesh="fsdp=2",
        **{**SMALL_JOB, "num_steps": 1},
    )  # fmt: skip
    weights = yaml.safe_load((on_mesh / "config.yaml").read_text())["weights"]
    assert main([*given, *FROZEN, f"--weights={weights}"]) == 0
    assert events(tmp_path / "run", "test")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mesh": "data=16"}, "16 devices, and 8 are there"),
        ({"mesh": "pipeline=2"}, "data=2,fsdp=4"),
        ({"mesh": "data=8", "batch_size": 12}, "--batch_size 12: does not divide among the 8 devices"),
        ({"mesh": "tensor=8"}, "tensor=8 does not divide"),
        ({"coordinator": "localhost:1"}, "--num_processes is missing"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "--process_id 2: expected 0 … 1"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(tmp_path: Path, given: dict[str, object], said: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=said.replace("…", ".")):
        main(flags(checkpoint_dir=run, num_steps=1, **given))
    assert not run.exists()


def test_batch_sizes_are_counted_over_the_devices_that_take_rows() -> None:
    from efficientids.systems.base import Scale, resolve_batch

    def resolved(default: int = 8, **given: object) -> int | None:
        return resolve_batch(TrainConfig(mesh="data=2,fsdp=2,tensor=2", **given), Scale(), default).batch_size  # type: ignore[arg-type]

    assert resolved(batch_size_per_device=3) == 12
    assert resolved() == 8
    assert resolved(default=6) == 8


def test_the_mesh_with_the_least_communication_that_fits() -> None:
    gib = 2**30
    parts = {"Llama, frozen": 10 * gib, "optimiser": 4 * gib}

    def shape(pool: float | None, devices: int = 8, rows: int | None = None) -> MeshShape:
        return choose_mesh(devices, parts, None if pool is None else int(pool * gib), rows=rows)[0]

    assert shape(14.1 / STATE_SHARE) == MeshShape(data=8)
    assert shape(14.1 / STATE_SHARE / 2) == MeshShape(4, 2)
    assert shape(14.1 / STATE_SHARE / 8) == MeshShape(1, 8)
    assert shape(0.1) == MeshShape(1, 8)
    assert "too much even for all 8" in choose_mesh(8, parts, gib // 10)[1]
    assert shape(100, rows=4) == MeshShape(data=4, tensor=2)
    assert shape(14.1 / STATE_SHARE / 4, rows=4) == MeshShape(2, 2, 2)  # tensor divides the state, too
    assert shape(14.1 / STATE_SHARE / 8, rows=4) == MeshShape(1, 4, 2)
    assert shape(None) == MeshShape(data=8)
    assert shape(10, devices=1) == MeshShape()


def test_only_tasks_of_a_slurm_step_look_for_sisters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not processes._in_slurm_step()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert not processes._in_slurm_step()  # a shell of the job, outside any step
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "0")
    assert processes._in_slurm_step()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not processes._in_slurm_step()  # the batch script: a step of one task in a job of two


def by_two_processes(job: list[str]) -> list[tuple[str, str]]:
    """Runs a job on loopback by two processes of two devices each; (stdout, stderr) of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [*job, "--mesh=data=2,fsdp=2", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    environment = {
        **os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, ROOT / "train_llama.py", *job, f"--process_id={i}"],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    return said


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(
    trained: Trained, tiny_data: Dataset, tmp_path: Path, weights: Path
) -> None:
    """On loopback, two devices each: the same curve, one run folder, and one of them speaks."""
    run = tmp_path / "run"
    given = flags(data_dir=tiny_data.path, weights=weights, checkpoint_dir=run, log_every=1, **SMALL_JOB)
    said = by_two_processes([*given, *FROZEN])
    assert "mesh data=2,fsdp=2" in said[0][0] and "of 2 processes" in said[0][0]
    assert [line for line in said[1][0].splitlines() if "[Gloo]" not in line] == []  # the library greets on stdout
    alone = trained(*FROZEN, "--log_every=1")
    np.testing.assert_allclose(curve(run), curve(alone), rtol=1e-5)
    described = json.loads((run / "environment.json").read_text())
    assert len(described["devices"]) == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["process_id"] is None
    # What two processes wrote, one reads.
    loaded, other = open_run(run), open_run(alone, open_run(run).step)
    for path, leaf in nnx.to_flat_state(loaded.params):
        np.testing.assert_allclose(leaf[...], dict(nnx.to_flat_state(other.params))[path][...], atol=1e-4)


@pytest.mark.slow
def test_two_processes_take_turns_with_shared_codebooks(tiny_data: Dataset, tmp_path: Path) -> None:
    """Codes that each process looked up anew are saved by both, as one table."""
    run = tmp_path / "run"
    given = flags(
        data_dir=tiny_data.path, checkpoint_dir=run, num_steps=2, eval_every=1, recommender_epochs=0.1,
        tokenizer_epochs=0.1, finetune_epochs=0, **ETEGREC_JOB,
    )  # fmt: skip
    by_two_processes([*given, "--tie_to_tokenizer"])
    assert {row["phase"] for row in events(run, "step")} == {"tokenizer", "recommender"}
    assert events(run, "reindexed")
    open_run(run)


def test_a_slurm_task_alone_on_its_host_takes_all_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax itself would take the one with the task's local number."""
    monkeypatch.setattr(processes, "has_nvidia_device", lambda: True)
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    assert processes._gpus_of_this_task() == [0, 1, 2, 3]
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert processes._gpus_of_this_task() is None  # one each
    monkeypatch.delenv("SLURM_LOCALID")
    assert processes._gpus_of_this_task() is None
