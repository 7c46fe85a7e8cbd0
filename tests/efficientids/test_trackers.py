"""Who follows a run: plugins, wandb and mlflow (stood in for), TensorBoard's files (read by an independent reader)."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter

from efficientids.errors import UserError
from efficientids.log import RunLog
from efficientids.tracking import trackers
from efficientids.tracking.tensorboard import TensorBoard
from efficientids.tracking.trackers import Status, Trackers, chosen_trackers
from tests.conftest import ROOT

CONFIG = {"learning_rate": 0.1, "data_dir": None, "trackers": "x"}


class Recorder:
    """A plugin that keeps what it is told; `fails` names the method that raises."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails = fails

    def _heard(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name == self._fails:
            raise ConnectionError("the network is down")

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        self._heard("start", run_path, dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._heard("log", step, dict(metrics))

    def finish(self, status: Status) -> None:
        self._heard("finish", status)


def offer(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    """Installs entry points (name, value)."""
    points = [importlib.metadata.EntryPoint(name, value, trackers.GROUP) for name, value in entries]

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return points if group == "efficientids.trackers" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_none_by_default() -> None:
    assert chosen_trackers(None) == {}


def test_a_plugin_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("mine", f"{__name__}:Recorder"), ("other", "not_there:X"))
    chosen = chosen_trackers("mine")
    assert list(chosen) == ["mine"] and type(chosen["mine"]).__name__ == "Recorder"
    assert list(chosen_trackers(" mine , mine")) == ["mine"]
    with pytest.raises(UserError, match=r"'other' \(not_there:X\) cannot be loaded: ModuleNotFoundError"):
        chosen_trackers("mine,other")
    with pytest.raises(UserError, match="'their' is none of wandb, mlflow, mine, other"):
        chosen_trackers("their")


@pytest.mark.parametrize("names", ["", ",", "mine,", " "])
def test_empty_names_are_refused(names: str) -> None:
    with pytest.raises(UserError, match="give names with commas"):
        chosen_trackers(names)


def test_two_packages_with_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("mine", "a:X"), ("mine", "b:Y"))
    with pytest.raises(UserError, match="several packages: a:X, b:Y"):
        chosen_trackers("mine")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    with pytest.raises(UserError, match=f"pip install {name}"):
        chosen_trackers(name)


def test_nothing_is_imported_unless_asked_for() -> None:
    code = "import sys, efficientids.tracking.trackers; print({'wandb', 'mlflow', 'jax'} & set(sys.modules))"
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    program = "import sys; sys.modules['core'] = type(sys)('core'); " + code  # `core` imports jax
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def follow(names: str, run: Path) -> None:
    """A run of two logged steps, a validation and a test of an earlier checkpoint, as the training records it."""
    log = RunLog(run / "metrics.jsonl", 1, io.StringIO())
    with log.followed_by(chosen_trackers(names), run, CONFIG):
        log.step("p", 1, 2, 0.5, {"loss": 2.0, "targets": 4.0})
        log.step("p", 2, 2, 1.0, {"loss": 1.0, "targets": 4.0})
        log.record({"event": "validation", "phase": "p", "step": 2, "ndcg@10": 0.25})
        log.record({"event": "test", "step": 1, "hr@10": 0.5})


def without_rate(metrics: Mapping[str, float]) -> dict[str, float]:
    assert metrics["train/items_per_s"] > 0
    return {name: value for name, value in metrics.items() if name != "train/items_per_s"}


def test_wandb_is_called_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def hear(name: str) -> Any:
        return lambda *arguments, **named: calls.append((name, arguments, named))

    run = types.SimpleNamespace(
        log=hear("log"), finish=hear("finish"), summary=types.SimpleNamespace(update=hear("summary.update"))
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **named: calls.append(("init", (), named)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    follow("wandb", tmp_path)
    assert calls[0] == (
        "init", (), {"project": "films", "name": tmp_path.name, "dir": str(tmp_path), "config": CONFIG}
    )  # fmt: skip
    assert [(name, named) for name, _, named in calls[1:]] == [
        ("log", {"step": 1}), ("log", {"step": 2}), ("log", {"step": 2}),
        ("summary.update", {}),  # it would drop a step that is not the newest
        ("finish", {"exit_code": 0}),
    ]  # fmt: skip
    assert without_rate(calls[1][1][0]) == {"train/loss": 2.0}
    assert calls[3][1][0] == {"validation/ndcg@10": 0.25} and calls[4][1][0] == {"test/hr@10": 0.5}


def test_mlflow_is_called_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    mlflow = types.ModuleType("mlflow")
    mlflow.start_run = lambda *, run_name: calls.append(("start_run", run_name))  # type: ignore[attr-defined]
    mlflow.log_params = lambda params: calls.append(("log_params", params))  # type: ignore[attr-defined]
    mlflow.log_metrics = lambda metrics, *, step: calls.append(("log", metrics, step))  # type: ignore[attr-defined]
    mlflow.end_run = lambda *, status: calls.append(("end_run", status))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    follow("mlflow", tmp_path)
    texts = {"learning_rate": "0.1", "data_dir": "None", "trackers": "x"}
    assert calls[:2] == [("start_run", tmp_path.name), ("log_params", texts)]
    assert without_rate(calls[2][1]) == {"train/loss": 2.0} and calls[2][2] == 1
    assert calls[4:] == [
        ("log", {"validation/ndcg_at_10": 0.25}, 2), ("log", {"test/hr_at_10": 0.5}, 1), ("end_run", "FINISHED")
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_one_that_fails_is_named_once_and_the_others_go_on(method: str, tmp_path: Path) -> None:
    said: list[str] = []
    broken, sound = Recorder(method), Recorder()
    both = Trackers({"broken": broken, "sound": sound}, said.append)
    both.start(tmp_path, CONFIG)
    both.log(1, {"a": 1.0})
    both.log(2, {"a": 2.0})
    both.finish("finished")
    assert said == ["warning: broken failed (ConnectionError: the network is down); the run goes on without it"]
    assert [name for name, *_ in sound.calls] == ["start", "log", "log", "finish"]
    assert [name for name, *_ in broken.calls] == ["start", "log", "log", "finish"][: len(broken.calls)]
    assert broken.calls[-1][0] == method and (method == "finish" or len(broken.calls) < 4)


def read_events(file: Path) -> list[Any]:
    """Every whole event of a file; the loader checks both checksums of each."""
    return list(LegacyEventFileLoader(str(file)).Load())


def only_file(run: Path) -> Path:
    (file,) = (run / "tensorboard").iterdir()
    assert "tfevents" in file.name
    return file


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    board = TensorBoard()
    board.start(tmp_path, CONFIG)
    board.log(0, {"train/loss": 2.5})
    board.log(3_000_000_000, {"validation/ndcg@10": 0.125, "train/größe": -1e-30})
    board.finish("finished")
    first, second, third = read_events(only_file(tmp_path))
    assert first.file_version == "brain.Event:2" and first.wall_time > 1.6e9
    assert [(v.tag, v.simple_value) for v in second.summary.value] == [("train/loss", 2.5)] and second.step == 0
    assert third.step == 3_000_000_000 and third.wall_time >= first.wall_time
    assert [v.tag for v in third.summary.value] == ["validation/ndcg@10", "train/größe"]
    assert third.summary.value[1].simple_value == pytest.approx(-1e-30)


def test_a_killed_run_leaves_its_events_and_metrics(tmp_path: Path) -> None:
    """Killed by SIGKILL right after the line of a step: everything that was said is there."""
    program = (
        "import os, sys, pathlib\n"
        "from efficientids.log import RunLog\n"
        "from efficientids.tracking.tensorboard import TensorBoard\n"
        "run = pathlib.Path(sys.argv[1])\n"
        "log = RunLog(run / 'metrics.jsonl', 1)\n"
        "with log.followed_by({'tensorboard': TensorBoard()}, run, {}):\n"
        "    for step in range(1, 6):\n"
        "        log.step('p', step, 9, 0.0, {'loss': float(step), 'targets': 1.0, 'learning_rate': 0.5})\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == -9, done.stderr
    _, *events = read_events(only_file(tmp_path))
    values = [{v.tag: v.simple_value for v in event.summary.value} for event in events]
    assert [(event.step, value["train/loss"]) for event, value in zip(events, values, strict=True)] == [
        (step, float(step)) for step in range(1, 6)
    ]
    assert {"train/loss", "train/learning_rate", "train/items_per_s"} == set(values[0])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_full_disk_costs_the_events_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path / "metrics.jsonl", 1, stream)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with log.followed_by({"tensorboard": TensorBoard()}, tmp_path, CONFIG):
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in (1, 2):
            log.step("p", step, 2, 0.0, {"loss": 1.0, "targets": 1.0})
    assert stream.getvalue().count("warning: tensorboard failed (OSError: [Errno 28] No space left on device)") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
