"""Evaluations kept in the run folder, so that comparing and reporting need no second pass.

R/evaluation/SPLIT-SEEN-stepN.parquet   a row an example: user, target, history_length (int32), rank (int32, null
                                        where the target was not among the recommendations)
R/evaluation/SPLIT-SEEN-stepN.json      everything else, and the sha256 of the rows; written last

Evaluating again keeps what the earlier record has beyond the new one: sampled metrics, groups by other columns.
"""

from __future__ import annotations

import json
import math
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
_ROUNDING = 1e-3
"""Metrics of the same checkpoint differ by less: another batch size or device rounds other ties."""


def record_path(run: Path, split: str, seen: str, step: int) -> Path:
    """Where the JSON of an evaluation stands; its rows are beside it."""
    return run / FOLDER / f"{split}-{seen}-step{step}.json"


def save_evaluation(run: Path, step: int, split: str, evaluation: Evaluation, more: dict[str, Any]) -> Path:
    """Writes an evaluation of the run at a step, rows first, each file whole or not at all; returns the JSON's path.

    Args:
        more: further plain values for the JSON (groups, name of the data set, …). What the earlier record of the same
            evaluation had beyond them is kept.

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
    more = _with_earlier(path, evaluation, more)
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


def _with_earlier(path: Path, evaluation: Evaluation, more: dict[str, Any]) -> dict[str, Any]:
    """`more`, and what else an earlier record at `path` has, where it is of the same model, data and protocol."""
    new = evaluation.to_json()
    try:
        old = json.loads(path.read_text())
        same = all(old[name] == new[name] for name in ("fingerprint", "protocol", "cutoffs", "examples")) and all(
            math.isclose(old["metrics"][name], value, abs_tol=_ROUNDING) for name, value in new["metrics"].items()
        )
        groups = {**old.get("groups", {}), **more.get("groups", {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # None yet, or a damaged one, which this evaluation mends.
        return more
    if not same:
        return more
    kept = {name: value for name, value in old.items() if name not in new and name not in ("step", "rows")}
    return kept | more | ({"groups": groups} if groups else {})


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
