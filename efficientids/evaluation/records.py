"""Evaluations kept in the run folder, so that comparing and reporting need no second pass.

R/evaluation/SPLIT-SEEN-stepN.parquet   a row an example: user, target, history_length (int32), rank (int32, null
                                        where the target was not among the recommendations)
R/evaluation/SPLIT-SEEN-stepN.json      everything else, and the sha256 of the rows; written last
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from efficientids.data.layout import sha256_of
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import Evaluation, Rows
from efficientids.evaluation.metrics import MISSED

FOLDER = "evaluation"


def record_path(run: Path, split: str, seen: str, step: int) -> Path:
    """Where the JSON of an evaluation stands; its rows are beside it."""
    return run / FOLDER / f"{split}-{seen}-step{step}.json"


def save_evaluation(run: Path, step: int, split: str, evaluation: Evaluation, more: dict[str, Any]) -> Path:
    """Writes an evaluation of the run at a step, rows first, each file whole or not at all; returns the JSON's path.

    Args:
        more: further plain values for the JSON (groups, name of the data set, …).

    Raises:
        UserError: the run folder cannot be written.
    """
    path = record_path(run, split, evaluation.protocol["seen"], step)
    rows, parquet = evaluation.rows, path.with_suffix(".parquet")
    table = pl.DataFrame(
        {
            "user": rows.users.astype(np.int32),
            "target": rows.targets.astype(np.int32),
            "history_length": rows.history_lengths.astype(np.int32),
            "rank": pl.Series(np.where(rows.ranks == MISSED, -1, rows.ranks).astype(np.int32)).replace(-1, None),
        }
    )
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
            new = Path(folder) / "rows"
            table.write_parquet(new)
            files = {"rows": {"file": parquet.name, "sha256": sha256_of(new)}}
            os.replace(new, parquet)
            new.write_text(json.dumps({"step": step, **evaluation.to_json(), **more, **files}, indent=2) + "\n")
            os.replace(new, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    return path


def load_evaluation(run: Path, step: int, split: str, seen: str, fingerprint: str) -> Evaluation | None:
    """The stored evaluation of a run at a step on the data set with this fingerprint; None where there is none.

    One whose files do not belong together (the process was killed between them, or they were changed) is none, too.
    """
    path = record_path(run, split, seen, step)
    try:
        record = json.loads(path.read_text())
        parquet = path.parent / Path(record["rows"]["file"]).name
        if record["fingerprint"] != fingerprint or sha256_of(parquet) != record["rows"]["sha256"]:
            return None
        table = pl.read_parquet(parquet)
        users, targets, lengths = (table[name].to_numpy() for name in ("user", "target", "history_length"))
        rows = Rows(users, targets, lengths, table["rank"].cast(pl.Int64).fill_null(MISSED).to_numpy())
        coverage = {name: value for name, value in record["metrics"].items() if name.startswith("coverage@")}
        return Evaluation(rows, coverage, record["protocol"], fingerprint, tuple(record["cutoffs"]))
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        return None
