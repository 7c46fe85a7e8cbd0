"""`metrics.jsonl` → plots of how a training went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientids.checkpoints import BEST_METRIC
from efficientids.errors import UserError
from efficientids.pages.figures import Mark, Series, line_plot
from efficientids.pages.page import Plot, number

_NOT_METRICS = frozenset({"time", "event", "phase", "step", "epoch"})
_TITLES = {
    "loss": ("Training loss", "loss"),
    "learning_rate": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm, before clipping", "norm"),
    "items_per_s": ("Throughput", "items a second"),
    "input_wait": ("Waiting for input", "share of time"),
}
_FROM_ZERO = frozenset({"learning_rate", "items_per_s", "input_wait"})

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metrics:
    """The rows of a run by what they are, oldest first; `cut` tells that the last line was not written whole.

    `others`: those of any other event, such as a catalogue that was indexed anew, by its name.
    """

    steps: Sequence[Row]
    validations: Sequence[Row]
    tests: Sequence[Row]
    others: Mapping[str, Sequence[Row]]
    cut: bool

    @property
    def best(self) -> Row | None:
        """The validation whose checkpoint is the best: of equals the later; None where there was none."""
        able = [row for row in self.validations if BEST_METRIC in row]
        return max(able, key=lambda row: (row[BEST_METRIC], row["step"]), default=None)

    @property
    def seconds(self) -> float:
        """From the first to the last row."""
        times = [row["time"] for row in (*self.steps, *self.validations, *self.tests)]
        return max(times) - min(times) if times else 0.0


def read_metrics(file: Path) -> Metrics:
    """The rows of `metrics.jsonl`; none where there is no file yet.

    Raises:
        UserError: a line other than the last is no JSON object with `event`, `step` and `time`.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows: list[Row] = []
    cut = False
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not {"event", "step", "time"} <= row.keys():
                raise ValueError("event, step or time is missing")
            rows.append(row)
        except (ValueError, AttributeError) as error:
            # A run that was killed may leave half a line at the end, and nowhere else.
            cut = place == len(lines)
            if not cut:
                raise UserError(f"{file}, line {place}: {error}; mend or remove the line") from error
    of_kind: dict[str, list[Row]] = {"step": [], "validation": [], "test": []}
    for row in rows:
        of_kind.setdefault(row["event"], []).append(row)
    return Metrics(of_kind.pop("step"), of_kind.pop("validation"), of_kind.pop("test"), of_kind, cut)


def curves(metrics: Metrics) -> list[Plot]:
    """One plot a metric of the steps, one for all validation metrics with the best checkpoint marked."""
    names = dict.fromkeys(name for row in metrics.steps for name in row if name not in _NOT_METRICS)
    known = [name for name in _TITLES if name in names]
    losses = [name for name in known if name == "loss"] + [name for name in names if name not in _TITLES]
    plots = [_of_steps(metrics.steps, name) for name in losses]
    if metrics.validations:
        plots.append(_of_validations(metrics))
    return plots + [_of_steps(metrics.steps, name) for name in known if name not in losses]


def event_curves(rows: Sequence[Row]) -> list[Plot]:
    """One plot for each number that events of one kind tell, with a line for each of its levels where it is a list;
    over the steps, or over the epochs where all are of one step."""
    along = "step" if len({row["step"] for row in rows}) > 1 else "epoch"
    rows = [row for row in rows if along in row]
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_METRICS)
    return [plot for name in names if (plot := _of_events(rows, name, along)) is not None]


def _of_events(rows: Sequence[Row], name: str, along: str) -> Plot | None:
    """None where it is no number, or the number of its levels changes."""
    having = [(row[along], row[name]) for row in rows if name in row]
    values = [value if isinstance(value, list) else [value] for _, value in having]
    numbers = all(type(one) in (int, float) for value in values for one in value)
    if not numbers or len({len(value) for value in values}) != 1 or not values[0]:
        return None
    x, levels = [place for place, _ in having], list(zip(*values, strict=True))
    series = [Series(name if len(levels) == 1 else f"level {i}", x, level) for i, level in enumerate(levels, start=1)]
    return line_plot(name, series, x_label=along, y_label=name, from_zero=True)


def _of_steps(rows: Sequence[Row], name: str) -> Plot:
    title, label = _TITLES.get(name, (name, name))
    having = [row for row in rows if name in row]
    phases = dict.fromkeys(row["phase"] for row in having)
    series = [_series(phase, [row for row in having if row["phase"] == phase], name) for phase in phases]
    return line_plot(title, series, x_label="step", y_label=label, from_zero=name in _FROM_ZERO)


def _of_validations(metrics: Metrics) -> Plot:
    rows, best = metrics.validations, metrics.best
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_METRICS)
    series = [_series(name, [row for row in rows if name in row], name) for name in names]
    mark = Mark(best["step"], best[BEST_METRIC], f"best: {number(best[BEST_METRIC])}") if best else None
    return line_plot(
        "Validation", series, x_label="step", y_label="metric (fraction)", from_zero=True, mark=mark
    )  # fmt: skip


def _series(name: str, rows: Sequence[Row], metric: str) -> Series:
    return Series(name, [row["step"] for row in rows], [row[metric] for row in rows])
