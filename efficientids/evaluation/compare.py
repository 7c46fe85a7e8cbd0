"""Runs against the first of them, on the same examples.

Legend: M examples, U users, m metrics, R resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficientids.errors import UserError
from efficientids.evaluation.bootstrap import LEVEL, RESAMPLES, holm, intervals, resampled_means, two_sided_p
from efficientids.evaluation.evaluate import Evaluation
from efficientids.evaluation.metrics import gains
from efficientids.evaluation.text import protocol_line

_OWN = ("history", "unhittable_share")
"""What of a protocol belongs to a model, or follows from the rest."""
_TABLE = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@10", "ndcg@20", "mrr@10", "coverage@10")
_TESTED = ("hr@10", "ndcg@10")
"""What the text has room for; the JSON has every metric."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run: its name for people, its step, and what it is worth."""

    name: str
    step: int
    evaluation: Evaluation


def check_comparable(entries: Sequence[Entry]) -> None:
    """Refuses to compare what was measured differently.

    Raises:
        UserError: another data set, protocol, cut-offs or examples than the first run's; what differs is named.
    """
    first = entries[0]
    for other in entries[1:]:
        pairs: dict[str, tuple[Any, Any]] = {
            "data set (fingerprint)": (first.evaluation.fingerprint, other.evaluation.fingerprint)
        }
        for name in sorted({*first.evaluation.protocol, *other.evaluation.protocol} - set(_OWN)):
            pairs[name] = (first.evaluation.protocol.get(name), other.evaluation.protocol.get(name))
        pairs["cutoffs"] = (first.evaluation.cutoffs, other.evaluation.cutoffs)
        for name, (one, two) in pairs.items():
            if one != two:
                raise UserError(
                    f"{first.name} and {other.name} cannot be compared: {name} {_short(one)} ≠ {_short(two)}. "
                    "Evaluate both on the same data set in the same way"
                )
        for name in ("users", "targets", "history_lengths"):
            if not np.array_equal(getattr(first.evaluation.rows, name), getattr(other.evaluation.rows, name)):
                raise UserError(f"{first.name} and {other.name} have other examples ({name}); evaluate both again")


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def compare(entries: Sequence[Entry], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Each run's metrics, and its differences from the first run on the same users.

    Returns:
        `runs`: metrics and intervals of each. `against_first`: of each run after the first, `metrics` by name, with
        `difference` (run − first), `interval` (95%, paired bootstrap over users), `p` (two-sided), `p_holm` (adjusted
        for the number of runs that stand against the first), `won`, `lost`, `tied` (shares of users); and `overlap` by
        hr@K: examples that both hit, of those that either hits (None where neither hits any). `protocol`, `users`,
        `examples`, `level`, `resamples`, `seed`.

    Raises:
        UserError: as `check_comparable`.
    """
    check_comparable(entries)
    first = entries[0].evaluation
    against = [_against(first, entry, resamples, seed) for entry in entries[1:]]
    for name in against[0]["metrics"] if against else []:
        adjusted = holm(np.array([one["metrics"][name]["p"] for one in against]))
        for one, p in zip(against, adjusted, strict=True):
            one["metrics"][name]["p_holm"] = float(p)
    return {
        "runs": [
            {
                "run": entry.name,
                "step": entry.step,
                "history": entry.evaluation.protocol["history"],
                "metrics": entry.evaluation.metrics,
                "intervals": {name: list(ends) for name, ends in entry.evaluation.intervals.items()},
            }
            for entry in entries
        ],
        "against_first": against,
        "protocol": {name: value for name, value in first.protocol.items() if name != "history"},
        "users": first.users,
        "examples": first.examples,
        "level": LEVEL,
        "resamples": resamples,
        "seed": seed,
    }


def _against(first: Evaluation, entry: Entry, resamples: int, seed: int) -> dict[str, Any]:
    users = first.rows.users
    ours, theirs = (gains(e.rows.ranks, first.cutoffs) for e in (entry.evaluation, first))
    differences_Mm = np.stack([ours[name] - theirs[name] for name in ours], axis=1)
    means_Rm = resampled_means(differences_Mm, users, resamples=resamples, seed=seed)
    ends_m2, p_m = intervals(means_Rm), two_sided_p(means_Rm)
    _, user_M = np.unique(users, return_inverse=True)
    metrics: dict[str, Any] = {}
    for column, name in enumerate(ours):
        by_user_U = np.bincount(user_M, differences_Mm[:, column])
        # Sums of the same gains in another order may differ in the last bit.
        won, lost = float((by_user_U > 1e-9).mean()), float((by_user_U < -1e-9).mean())
        metrics[name] = {
            "difference": float(differences_Mm[:, column].mean()),
            "interval": [float(end) for end in ends_m2[column]],
            "p": float(p_m[column]),
            "won": won,
            "lost": lost,
            "tied": 1 - won - lost,
        }
    overlap: dict[str, float | None] = {}
    for name in (n for n in ours if n.startswith("hr@")):
        either = float(np.maximum(ours[name], theirs[name]).sum())
        overlap[name] = float((ours[name] * theirs[name]).sum()) / either if either else None
    return {"run": entry.name, "step": entry.step, "metrics": metrics, "overlap": overlap}


def as_text(result: dict[str, Any], entries: Sequence[Entry]) -> str:
    """A table of metrics, then each run's differences from the first."""
    runs = result["runs"]
    shown = [name for name in _TABLE if name in runs[0]["metrics"]]
    width = max(10, *(len(run["run"]) for run in runs))
    # One for all, or each run's own.
    same = len({run["history"] for run in runs}) == 1
    lines = [protocol_line(entries[0].evaluation, with_history=same), ""]
    lines.append(f"{'run':<{width}} {'step':>8}" + "".join(f"{name.upper():>13}" for name in shown))
    lines[-1] += "" if same else "  history"
    for run in runs:
        values = "".join(f"{run['metrics'][name]:>13.4f}" for name in shown)
        lines.append(f"{run['run']:<{width}} {run['step']:>8}{values}" + ("" if same else f"  {run['history']}"))
    others = len(result["against_first"])
    method = f"paired bootstrap over users ({result['resamples']:,} resamples)"
    lines += [
        "",
        f"against {runs[0]['run']}: 95% intervals by the {method}"
        + (f"; p adjusted for {others} comparisons (Holm)" if others > 1 else ""),
        f"{'run':<{width}} {'':<8}{'difference':>12}{'95%':>20}{'p':>9}{'won':>8}{'lost':>8}{'tied':>8}{'overlap':>9}",
    ]
    for one in result["against_first"]:
        for name in (n for n in _TESTED if n in one["metrics"]):
            row = one["metrics"][name]
            low, high = row["interval"]
            overlap = one["overlap"].get(name)
            lines.append(
                f"{one['run']:<{width}} {name.upper():<8}{row['difference']:>+12.4f}{f'{low:+.4f} to {high:+.4f}':>20}"
                f"{_p(row['p_holm']):>9}{row['won']:>8.1%}{row['lost']:>8.1%}{row['tied']:>8.1%}"
                + ("" if overlap is None else f"{overlap:>9.1%}")
            )
    lines.append("won, lost, tied: shares of users. overlap: of the examples that either run hits, those that both do.")
    return "\n".join(lines)


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
