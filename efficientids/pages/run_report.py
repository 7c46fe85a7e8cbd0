"""R/report.html: what a run was, how it went and what it is worth, from the files of its folder alone.

`python -m efficientids report --run R` writes it again; a training writes it after each validation and at its end.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientids.checkpoints import BEST_METRIC
from efficientids.errors import UserError
from efficientids.flags import command_line
from efficientids.log import duration
from efficientids.pages import evaluations, page
from efficientids.pages.curves import Metrics, curves, event_curves, read_metrics
from efficientids.pages.page import Block, Cell, Entry, Facts, Lists, Section, Text, number
from efficientids.pages.samples import read_samples
from efficientids.runs import RunFolder
from efficientids.tracking.trackers import Status

FILE = "report.html"
_PAGE_SHARE = 20  # times as long as a page took passes before the next one
_DATA_FACTS = {
    "name": "name", "num_users": "users", "num_items": "items with an interaction",
    "catalogue_size": "items in the catalogue", "num_interactions": "interactions",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Writes a run's report.html again: curves, metrics, recommendations, configuration."""

    run: Path
    """The run folder R."""
    output: Path | None = None
    """The file to write. Default: R/report.html."""


def main(arguments: Sequence[str]) -> int:
    """Writes the page; returns the exit code."""
    config = command_line(ReportConfig, arguments, prog="efficientids report")
    file = config.output or config.run / FILE
    html = to_html(RunFolder.open(config.run))
    try:
        page.write(file, html)
    except OSError as error:
        raise UserError(f"--output {file} cannot be written: {error}") from error
    print(file)
    return 0


class ReportPage:
    """Follows a run (`tracking.trackers.Tracker`) and keeps its report up to date.

    After the first validation, at the end, and between them after a validation as soon as a twentieth of the time since
    the last page pays for another one: plots take a second or two, and a small job validates every few.
    """

    def __init__(self) -> None:
        self._run: RunFolder | None = None
        self._next = 0.0

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        """Learns where the run is."""
        self._run = RunFolder(run_path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the page after a validation, if it is time: not after a step, whose time it would take."""
        if any(name.startswith("validation/") for name in metrics) and time.monotonic() >= self._next:
            self._write()

    def finish(self, status: Status) -> None:
        """Writes the page for good."""
        self._write()

    def _write(self) -> None:
        assert self._run is not None, "log comes after start"
        began = time.monotonic()
        refresh(self._run)
        ended = time.monotonic()
        self._next = ended + _PAGE_SHARE * (ended - began)


def refresh(run: RunFolder) -> Path:
    """Writes `R/report.html` as the run's folder is now; returns it.

    Raises:
        UserError: as `to_html`.
        OSError: the file cannot be written.
    """
    file = run.path / FILE
    page.write(file, to_html(run))
    return file


def to_html(run: RunFolder) -> str:
    """The report of a run, finished or not.

    Raises:
        UserError: a file of the run is damaged; it is named.
    """
    model, metrics = run.read_model(), read_metrics(run.metrics)
    evaluated = evaluations.read(run.path)
    return page.page(
        f"Run {run.path.resolve().name}",
        f"{model['recommender']} on {_data_facts(run, model)['name']}",
        [
            Section("Summary", _summary(metrics)),
            Section("Test and validation metrics", evaluations.tables(evaluated, metrics)),
            Section("By group", evaluations.group_tables(evaluated)),
            Section("How the training went", curves(metrics)),
            *(Section(f"Events: {kind}", event_curves(rows)) for kind, rows in metrics.others.items() if len(rows) > 1),
            *_recommendations(read_samples(run.path)),
            Section("Data", [Facts(_data_facts(run, model))]),
            Section("How to have it again", _origin(run)),
        ],
    )


def _summary(metrics: Metrics) -> list[Block]:
    facts: dict[str, Cell] = {"time from the first to the last record": duration(metrics.seconds)}
    if metrics.steps:
        last = metrics.steps[-1]
        facts |= {"steps": last["step"], "epochs": round(last["epoch"], 2), "last training loss": last.get("loss")}
    if metrics.best is not None:
        facts |= {
            "best checkpoint": f"step {metrics.best['step']:,}",
            f"its validation {BEST_METRIC.upper()}": metrics.best[BEST_METRIC],
        }
    blocks: list[Block] = [Facts(facts)]
    if not metrics.steps and not metrics.validations:
        blocks.append(Text("Nothing is recorded yet."))
    if metrics.cut:
        blocks.append(Text("The last line of metrics.jsonl was not written whole and is left out.", "warning"))
    return blocks


def _recommendations(samples: dict[str, Any] | None) -> list[Section]:
    if samples is None:
        return []
    told = (
        f"Step {samples['step']:,}, {samples['split']} targets, seen items masked. Users were looked at in a random "
        "order until there were enough with the target in the first place and enough without it among the "
        f"{samples['k']}. They are examples to read: how many of each are shown does not tell how often the model is "
        "right; the metrics do."
    )
    return [
        Section("Recommendations that were right", [Text(told), *map(_lists, samples["hits"])]),
        Section("Recommendations that missed", list(map(_lists, samples["misses"]))),
    ]


def _lists(sample: Mapping[str, Any]) -> Lists:
    before = sample["history_length"] - len(sample["history"])
    left = f"History, {sample['history_length']:,} items" + (
        f" (the newest {len(sample['history'])})" if before else ""
    )
    recommended = [
        Entry(f"{one['title']} ({number(one['score'])})", "chosen next" if one["target"] else None)
        for one in sample["recommended"]
    ]
    return Lists(
        f"User {sample['user']}, who chose {sample['target']}",
        left,
        [Entry(title) for title in sample["history"]],
        f"Recommended, best first (with scores); {_place(sample['rank'])}",
        recommended,
    )


def _place(rank: int | None) -> str:
    return "the target is not among them" if rank is None else f"the target is number {rank}"


def _data_facts(run: RunFolder, model: Mapping[str, Any]) -> dict[str, Cell]:
    """Of the data set's report or its manifest, which name their counts alike; the path alone where both are gone."""
    folder = run.path / model["dataset"]["path"]
    facts: dict[str, Cell] = {"name": folder.name, "folder": str(model["dataset"]["path"])}
    for file in (folder / "report.json", folder / "manifest.json"):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if all(key in found for key in _DATA_FACTS):
            facts |= {words: found[key] for key, words in _DATA_FACTS.items()}
            facts |= {f"split: {k.replace('_', ' ')}": _plain(v) for k, v in found.get("split", {}).items()}
            return facts | {f"order: {k.replace('_', ' ')}": _plain(v) for k, v in found.get("order", {}).items()}
    return facts | {"note": "the data set is not there any more, so its numbers are not known"}


def _origin(run: RunFolder) -> list[Block]:
    environment = run.read_environment()
    versions = {name: _plain(version) for name, version in environment.pop("versions", {}).items()}
    return [
        Facts({name: _plain(value) for name, value in environment.items()}),
        Facts(versions, "Versions"),
        Facts({name: _plain(value) for name, value in run.read_config().items()}, "Configuration (config.yaml)"),
    ]


def _plain(value: Any) -> Cell:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if value is None or isinstance(value, int | float | str) else json.dumps(value)
