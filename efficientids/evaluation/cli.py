"""`python -m efficientids evaluate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from core.platform import start_devices
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import Evaluation
from efficientids.evaluation.of_run import evaluate_run
from efficientids.evaluation.text import as_text, groups_as_text, sampled_as_text
from efficientids.flags import command_line
from efficientids.loading import LoadedRun, open_run
from efficientids.log import progress
from efficientids.runs import RunFolder


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Ranking metrics of a run over the full catalogue, with intervals and by group; kept in the run's evaluation/."""

    run: Path
    """The run folder R, R/STEP or R/checkpoints/STEP."""
    step: int | None = None
    """Which checkpoint. Default: the best by validation NDCG@10 (of equals the later)."""
    data_dir: Path | None = None
    """Where the run's data set is now. Default: where it was."""
    split: Literal["validation", "test"] = "test"
    """Which held-out items are the targets."""
    seen: Literal["mask", "keep"] = "mask"
    """Whether items of the user's history may be recommended."""
    group_by: str | None = None
    """A column of the data set's users.parquet to group by, such as gender."""
    sampled_negatives: int | None = None
    """Metrics among so many sampled items too, to stand beside a paper's. They do not order models."""
    batch_size: int = 256
    """Examples at a time."""
    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str]) -> int:
    """Evaluates; returns the exit code."""
    config = command_line(EvaluateConfig, arguments, prog="efficientids evaluate")
    if config.batch_size < 1:
        raise UserError(f"--batch_size {config.batch_size}: at least 1")
    start_devices()
    loaded = open_run(config.run, config.step)
    evaluation, more = evaluate_run(
        loaded,
        loaded.dataset(config.data_dir),
        config.split,
        seen=config.seen,
        batch_size=config.batch_size,
        group_by=config.group_by,
        sampled_negatives=config.sampled_negatives,
        progress=progress("evaluated", "examples", sys.stderr),
    )
    if config.json:
        print(json.dumps({"step": loaded.step, **evaluation.to_json(), **more}, indent=2))
    else:
        _print(loaded, evaluation, more)
    _refresh_report(loaded.run, say=not config.json)
    return 0


def _print(loaded: LoadedRun, evaluation: Evaluation, more: Mapping[str, Any]) -> None:
    print(f"{more['run']}, step {loaded.step}, data {more['dataset']}")
    print(as_text(evaluation))
    for name, value in more.get("best_possible", {}).items():
        print(f"best possible {name}: {value:.4f}")
    print("\n" + groups_as_text(more["groups"]))
    if "sampled" in more:
        print("\n" + sampled_as_text(more["sampled"]))


def _refresh_report(run: RunFolder, *, say: bool) -> None:
    """Writes R/report.html again, so that it shows what was stored, for a run that has one or could have one."""
    # Drawing takes a second to import, and pages read evaluations.
    from efficientids.pages import run_report

    if not (run.metrics.exists() or (run.path / run_report.FILE).exists()):
        return
    try:
        file = run_report.refresh(run)
    except (UserError, OSError) as error:
        # The evaluation is done, printed and stored: that the page is not is no reason to call it failed.
        print(f"warning: {run.path / run_report.FILE} was not refreshed: {error}", file=sys.stderr)
        return
    if say:
        print(f"refreshed {file}", file=sys.stderr)
