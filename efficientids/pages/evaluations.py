"""`R/evaluation/*.json`, which `evaluate` writes → tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientids.errors import UserError
from efficientids.evaluation.groups import FEWEST_USERS
from efficientids.evaluation.records import FOLDER
from efficientids.evaluation.text import NAMES
from efficientids.pages.curves import Metrics
from efficientids.pages.page import Block, Cell, Table, Text, number

_GROUP_METRICS = ("hr@10", "ndcg@10")
_NONE = (
    "No evaluation is stored in this run's folder, so there are no intervals: "
    "`python -m efficientids evaluate --run R` makes them."
)

Evaluated = Sequence[Mapping[str, Any]]


def read(run_path: Path) -> list[dict[str, Any]]:
    """The stored evaluations, by step, then by name.

    Raises:
        UserError: a file is damaged.
    """
    found = []
    for file in sorted((run_path / FOLDER).glob("*.json")):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            missing = [key for key in ("step", "metrics", "protocol", "users") if key not in values]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read: {error}; delete it and evaluate again") from error
        if missing:
            raise UserError(f"{file}: {', '.join(missing)} missing; delete it and evaluate again")
        found.append(values)
    return sorted(found, key=lambda values: values["step"])


def tables(evaluated: Evaluated, metrics: Metrics) -> list[Block]:
    """Metrics with their 95% intervals; without a stored evaluation, what the log has, and a word about it."""
    blocks: list[Block] = []
    for one in evaluated:
        blocks.append(Table(_caption(one), *_metric_rows(one["metrics"], one.get("intervals", {}))))
        if "best_possible" in one:
            best = "; ".join(f"{name.upper()} {number(value)}" for name, value in one["best_possible"].items())
            blocks.append(Text(f"The best possible on these users, whose process is known: {best}."))
        if "sampled" in one:
            blocks += _sampled(one["sampled"])
    if evaluated:
        return blocks
    for row in metrics.tests:
        values = {name: value for name, value in row.items() if "@" in name}
        blocks.append(Table(f"Test, step {row['step']:,}, fractions", *_metric_rows(values, {})))
    return [Text(_NONE, "warning"), *blocks] if metrics.validations else []


def group_tables(evaluated: Evaluated) -> list[Block]:
    """The groups of each evaluation that has some."""
    return [
        _group_table(one, name, rows) for one in evaluated for name, rows in one.get("groups", {}).items() if rows
    ]  # fmt: skip


def _caption(one: Mapping[str, Any]) -> str:
    protocol = one["protocol"]
    examples = one.get("examples", one["users"])
    number_of = (
        f"{examples:,} examples of {one['users']:,} users" if examples != one["users"] else f"{examples:,} users"
    )
    return (
        f"{protocol['split']}, step {one['step']:,}: {number_of}; {protocol['candidates']}; seen items: "
        f"{protocol['seen']} ({protocol['unhittable_share']:.1%} of targets unhittable); ties {protocol['ties']}; "
        f"history: {protocol['history']}; {protocol['unit']}, 95% intervals by the bootstrap over users"
    )


def _metric_rows(
    metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]] | None
) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows: kinds of metric down, cut-offs across."""
    kinds = list(dict.fromkeys(name.split("@")[0] for name in metrics))
    cutoffs = list(dict.fromkeys(name.split("@")[1] for name in metrics))
    rows: list[list[Cell]] = [[k.upper(), *(_cell(metrics, intervals, f"{k}@{c}") for c in cutoffs)] for k in kinds]
    return ["", *(f"@{cutoff}" for cutoff in cutoffs)], rows


def _cell(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]] | None, name: str) -> str | None:
    if name not in metrics:
        return None
    ends = (intervals or {}).get(name)
    return f"{metrics[name]:.4f}" + (f" ({ends[0]:.4f}–{ends[1]:.4f})" if ends else "")


def _group_table(one: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    protocol = one["protocol"]
    shown = [metric for metric in _GROUP_METRICS if metric in rows[0]["metrics"]]
    few = any(row.get("intervals") is None for row in rows)
    return Table(
        f"By {NAMES.get(name, name)}: {protocol['split']}, step {one['step']:,}, seen items: {protocol['seen']}"
        + (f"; no interval for fewer than {FEWEST_USERS} users" if few else ""),
        ["group", "examples", *(f"{metric.upper()} (95% interval)" for metric in shown)],
        [
            [row["group"], row["examples"], *(_cell(row["metrics"], row.get("intervals"), name) for name in shown)]
            for row in rows
        ],
    )


def _sampled(sampled: Mapping[str, Any]) -> list[Block]:
    caption = f"Among the target and {sampled['negatives']} sampled items"
    return [Text(sampled["warning"], "warning"), Table(caption, *_metric_rows(sampled["metrics"], {}))]
