"""Evaluations as text, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficientids.evaluation.evaluate import Evaluation
from efficientids.evaluation.groups import FEWEST_USERS
from efficientids.evaluation.sampled import WARNING

NAMES = {"history_length": "history length", "target_popularity": "popularity of the target in training"}
_SHOWN = ("hr@10", "ndcg@10")
"""What a group's row has room for; the JSON has all."""


def as_text(evaluation: Evaluation) -> str:
    """The result as a small table, protocol first."""
    metrics = evaluation.metrics
    kinds = list(dict.fromkeys(name.split("@")[0] for name in metrics))
    rows = [f"{'':>10}" + "".join(f"{'@' + str(c):>9}" for c in evaluation.cutoffs)]
    rows += [f"{kind:>10}" + "".join(f"{metrics[f'{kind}@{c}']:>9.4f}" for c in evaluation.cutoffs) for kind in kinds]
    shown = [name for name in _SHOWN if name in evaluation.intervals]
    ends = "; ".join(
        f"{name.upper()} {low:.4f} to {high:.4f}" for name in shown for low, high in [evaluation.intervals[name]]
    )
    if ends:
        rows.append(f"95% intervals (bootstrap over users): {ends}")
    return "\n".join([protocol_line(evaluation), *rows])


def protocol_line(evaluation: Evaluation, *, with_history: bool = True) -> str:
    """How the numbers came about, in one line.

    Args:
        with_history: with what of a history the model looks at; False where runs that differ in it share the line.
    """
    protocol, users = evaluation.protocol, f"{evaluation.users:,} users"
    number = users if evaluation.examples == evaluation.users else f"{evaluation.examples:,} examples of {users}"
    order = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in protocol["order"].items())
    return (
        f"{protocol['split']}: {number}; ranked over the {protocol['candidates']}; "
        f"seen items: {protocol['seen']} ({protocol['unhittable_share']:.1%} of targets unhittable); "
        f"ties {protocol['ties']}; order of interactions: {order}; "
        + (f"history the model looks at: {protocol['history']}; " if with_history else "")
        + str(protocol["unit"])
    )


def groups_as_text(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The tables of `group_tables`, one under the other."""
    return "\n\n".join(_group_table(NAMES.get(name, name), rows) for name, rows in tables.items())


def _group_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [name for name in _SHOWN if name in rows[0]["metrics"]]
    width = max(len(f"by {title}"), *(len(row["group"]) for row in rows))
    lines = [f"{f'by {title}':<{width}} {'examples':>9}" + "".join(f"{name.upper():>9}{'95%':>17}" for name in shown)]
    for row in rows:
        cells = [f"{row['group']:<{width}} {row['examples']:>9,}"]
        for name in shown:
            ends = "–" if row["intervals"] is None else "–".join(f"{end:.4f}" for end in row["intervals"][name])
            cells.append(f"{row['metrics'][name]:>9.4f}{ends:>17}")
        lines.append("".join(cells))
    if any(row["intervals"] is None for row in rows):
        lines.append(f"–: fewer than {FEWEST_USERS} users, too few for an interval")
    return "\n".join(lines)


def sampled_as_text(sampled: Mapping[str, Any]) -> str:
    """Sampled metrics under their warning."""
    values = "  ".join(f"{name.upper()} {value:.4f}" for name, value in sampled["metrics"].items())
    return f"{WARNING}\namong the target and {sampled['negatives']} unseen items: {values}"
