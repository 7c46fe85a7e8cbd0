"""`python -m efficientids compare`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core.platform import start_devices
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.compare import Entry, as_text, check_comparable, compare
from efficientids.evaluation.evaluate import CUTOFFS
from efficientids.evaluation.of_run import evaluate_run
from efficientids.evaluation.records import load_evaluation
from efficientids.flags import command_line
from efficientids.loading import open_run
from efficientids.log import progress
from efficientids.runs import RunFolder, locate


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Runs on the same data set: their metrics, and whether each differs from the first one's."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Two or more run folders: R, R/STEP or R/checkpoints/STEP; R alone is the best step by validation NDCG@10
    (of equals the later)."""
    split: Literal["validation", "test"] = "test"
    """Which held-out items are the targets."""
    seen: Literal["mask", "keep"] = "mask"
    """Whether items of the user's history may be recommended."""
    data_dir: Path | None = None
    """Where the runs' data set is now. Default: where it was."""
    batch_size: int = 256
    """Examples at a time, for runs that were not evaluated yet."""
    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str]) -> int:
    """Compares; returns the exit code."""
    config = command_line(CompareConfig, arguments, prog="efficientids compare")
    if len(config.runs) < 2:
        given = f"only {config.runs[0]} is given" if config.runs else "none is given"
        raise UserError(
            f"compare needs two or more run folders, and {given}: `compare R1 R2`, or two steps of one run, "
            "`compare R/STEP1 R/STEP2`"
        )
    if config.batch_size < 1:
        raise UserError(f"--batch_size {config.batch_size}: at least 1")
    found = [_Found.at(path, config.data_dir) for path in config.runs]
    for other in found[1:]:
        if other.fingerprint != found[0].fingerprint:
            raise UserError(
                f"{config.runs[0]} and {other.path} cannot be compared: they are runs on other data sets (fingerprints "
                f"{found[0].fingerprint[:12]}… ≠ {other.fingerprint[:12]}…); train both on the same one"
            )
    entries = [one.entry(config) for one in found]
    check_comparable(entries)
    result = compare(entries)
    print(json.dumps(result, indent=2) if config.json else as_text(result, entries))
    return 0


@dataclasses.dataclass(frozen=True)
class _Found:
    """A run folder, the step to compare, and the fingerprint of the data set to evaluate it on."""

    path: Path
    run: RunFolder
    step: int
    fingerprint: str

    @staticmethod
    def at(path: Path, data_dir: Path | None) -> _Found:
        run, named = locate(str(path))
        step = run.choose_step(named)
        if data_dir is not None:
            return _Found(path, run, step, Dataset.open(data_dir).fingerprint)
        try:
            fingerprint = run.read_model()["dataset"]["fingerprint"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{run.path / 'model.json'}: damaged, no fingerprint of the data set ({error!r})"
            ) from error
        return _Found(path, run, step, str(fingerprint))

    def entry(self, config: CompareConfig) -> Entry:
        """The stored evaluation, or a new one (which is stored)."""
        stored = load_evaluation(self.run.path, self.step, config.split, config.seen, self.fingerprint)
        if stored is not None and stored.cutoffs == CUTOFFS:
            return Entry(str(self.path), self.step, stored)
        print(f"{self.path}: step {self.step} has no evaluation on {config.split} yet; evaluating", file=sys.stderr)
        start_devices()
        loaded = open_run(self.run.path, self.step)
        evaluation, _ = evaluate_run(
            loaded,
            loaded.dataset(config.data_dir),
            config.split,
            seen=config.seen,
            batch_size=config.batch_size,
            progress=progress("evaluated", "examples", sys.stderr),
        )
        return Entry(str(self.path), self.step, evaluation)
