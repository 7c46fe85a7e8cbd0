"""Where the metrics of a run go beside `metrics.jsonl`: experiment trackers, off by default.

A tracker is told of a run's beginning, of its metrics and of its end. Two are built in (wandb, mlflow; their packages
are imported only when asked for), others come with packages that declare an entry point in the group
`efficientids.trackers`: a callable without arguments that gives a `Tracker`, under the name for `--trackers`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from efficientids.errors import UserError

GROUP = "efficientids.trackers"
Status = Literal["finished", "failed", "killed"]


class Tracker(Protocol):
    """A plugin. Whatever it raises is said once, and the run goes on without it."""

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        """Before the first step: the run folder, and the complete configuration as plain values."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics by name (`train/loss`, `validation/ndcg@10`, `test/hr@10`, …) at `step`, counted over all phases.

        Steps rise, but for the test metrics: they are those of the best checkpoint, which is not the last step.
        """

    def finish(self, status: Status) -> None:
        """After the last: `finished`, `failed` (an error) or `killed` (interrupted)."""


class Wandb:
    """Weights & Biases. The project is $WANDB_PROJECT, or efficientids; its files go into the run folder."""

    def __init__(self) -> None:
        self._wandb = _package("wandb")
        self._run: Any = None
        self._last = -1

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", "efficientids")
        self._run = self._wandb.init(project=project, name=run_path.name, dir=str(run_path), config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step < self._last:
            # wandb drops what goes back in steps.
            self._run.summary.update(dict(metrics))
            return
        self._last = step
        self._run.log(dict(metrics), step=step)

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Mlflow:
    """MLflow. Where to and which experiment: its own variables, $MLFLOW_TRACKING_URI and $MLFLOW_EXPERIMENT_NAME."""

    _STATUS: Mapping[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}

    def __init__(self) -> None:
        self._mlflow = _package("mlflow")

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        self._mlflow.start_run(run_name=run_path.name)
        self._mlflow.log_params({name: str(value) for name, value in config.items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # Its names have no @; its own ranking metrics are called ndcg_at_10.
        named = {name.replace("@", "_at_"): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step)

    def finish(self, status: Status) -> None:
        self._mlflow.end_run(status=self._STATUS[status])


_BUILT_IN: Mapping[str, Callable[[], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def chosen_trackers(names: str | None) -> dict[str, Tracker]:
    """The trackers of `--trackers`, by name; none for None.

    Raises:
        UserError: an unknown or doubtful name, or a package that is missing or does not load.
    """
    wanted = list(dict.fromkeys(name.strip() for name in (names or "").split(",")))
    if names is None:
        return {}
    if not all(wanted):
        raise UserError(f"--trackers {names!r}: give names with commas between them, such as --trackers wandb,mlflow")
    return {name: _make(name) for name in wanted}


def _make(name: str) -> Tracker:
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    offered = importlib.metadata.entry_points(group=GROUP)
    found = [entry for entry in offered if entry.name == name]
    if not found:
        known = ", ".join([*_BUILT_IN, *sorted({entry.name for entry in offered})])
        raise UserError(f"--trackers: {name!r} is none of {known}; others come with packages (entry points {GROUP})")
    if len(found) > 1:
        raise UserError(f"--trackers: {name!r} is offered by several packages: {', '.join(e.value for e in found)}")
    try:
        tracker: Tracker = found[0].load()()
    except Exception as error:  # whatever a stranger's module raises
        raise UserError(f"--trackers: {name!r} ({found[0].value}) cannot be loaded: {error!r}") from error
    return tracker


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--trackers {name}: the package cannot be imported ({error}); install it with `pip install {name}`, "
            "or leave it out"
        ) from error


class Trackers:
    """Tells all trackers of a run; one that fails is named once and told nothing more."""

    def __init__(self, trackers: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self._trackers, self._warn = dict(trackers), warn

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        """As `Tracker.start`."""
        self._tell(lambda tracker: tracker.start(run_path, config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        self._tell(lambda tracker: tracker.log(step, metrics))

    def finish(self, status: Status) -> None:
        """As `Tracker.finish`."""
        self._tell(lambda tracker: tracker.finish(status))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # a network that is down must not end hours of training
                del self._trackers[name]
                self._warn(f"warning: {name} failed ({type(error).__name__}: {error}); the run goes on without it")
