"""Recommendations to look at: users whose target came first, and users whose target was missed.

R/samples.json, an object:

    step, split, seen, k          what was asked: of which checkpoint, which held-out items, "mask", list length
    examined, first, missed       examples looked at; of how many the target came first; of how many it was not listed.
                                  No rates: looking stops as soon as there are enough of both kinds
    hits, misses                  lists of {user, history_length, history, target, rank, recommended}

`user` is the external id, `history` the titles of the newest items (oldest first), `target` a title, `rank` counts from
1 (ties against the model; null: not among the k), `recommended` a list of {title, score, target: bool}, best first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from efficientids.data.batches import EvaluationBatch, evaluation_batches
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.metrics import target_ranks
from efficientids.evaluation.samples import item_name
from efficientids.recommenders.base import Histories, Ranked, Recommender

FILE = "samples.json"
_KEYS = ("step", "split", "seen", "k", "examined", "first", "missed", "hits", "misses")
_HISTORY = 10  # items shown


def make_samples(
    recommender: Recommender,
    model: nnx.Module,
    dataset: Dataset,
    *,
    step: int,
    split: Literal["validation", "test"] = "test",
    each: int = 5,
    k: int = 10,
    most_users: int = 2048,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Looks at users in a random but repeatable order, until there are `each` of both kinds or `most_users` are seen.

    Seen items are masked. Returns what `R/samples.json` holds.

    Raises:
        UserError: the split has no example, or a score is NaN.
    """
    able = np.unique(dataset.examples(split).users)
    order = np.random.default_rng(0).permutation(able)[:most_users]
    name = item_name(dataset)
    ids = dataset.users["user_id"]
    kinds: dict[str, list[dict[str, Any]]] = {"hits": [], "misses": []}
    examined, first, missed = 0, 0, 0
    for start in range(0, len(order), batch_size):
        users = order[start : start + batch_size]
        for batch in evaluation_batches(dataset, split, batch_size, recommender.max_items, users=users):
            # One more than is shown: a target that ties with the last may tie with others that are not listed.
            ranked = recommender.recommend(
                model, Histories(batch.item_ids, batch.lengths, batch.padding), k + 1, batch.seen
            )
            try:
                ranks = target_ranks(ranked, batch.targets)
            except ValueError as error:
                raise UserError(f"samples of {dataset.path}, split {split}: {error}") from error
            real = batch.targets > 0
            examined += int(real.sum())
            first += int((real & (ranks == 1)).sum())
            missed += int((real & (ranks > k)).sum())
            for kind, chosen in (("hits", real & (ranks == 1)), ("misses", real & (ranks > k))):
                for row in np.flatnonzero(chosen)[: each - len(kinds[kind])]:
                    kinds[kind].append(_sample(batch, ranked, ranks, int(row), k, name, ids))
        if all(len(kind) >= each for kind in kinds.values()):
            break
    return {"step": step, "split": split, "seen": "mask", "k": k, "examined": examined, "first": first,
            "missed": missed, **kinds}  # fmt: skip


def _sample(
    batch: EvaluationBatch, ranked: Ranked, ranks: np.ndarray, row: int, k: int, name: Callable[[int], str], ids: Any
) -> dict[str, Any]:
    history = batch.seen[row, : batch.history_lengths[row]].tolist()
    target, rank = int(batch.targets[row]), int(ranks[row])
    listed = [(item, score) for item, score in zip(ranked.item_ids[row], ranked.scores[row], strict=True) if item > 0]
    return {
        "user": ids[int(batch.users[row])],
        "history_length": len(history),
        "history": [name(item) for item in history[-_HISTORY:]],
        "target": name(target),
        "rank": rank if rank <= k else None,
        "recommended": [
            {"title": name(int(item)), "score": float(score), "target": int(item) == target}
            for item, score in listed[:k]
        ],
    }


def write_samples(run_path: Path, samples: dict[str, Any]) -> None:
    """Writes `R/samples.json`, whole or not at all."""
    file = run_path / FILE
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


def read_samples(run_path: Path) -> dict[str, Any] | None:
    """`R/samples.json`; None where there is none. Raises UserError for a file that is not of this form."""
    file = run_path / FILE
    if not file.exists():
        return None
    try:
        samples = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in _KEYS if key not in samples]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}; delete it, or train again") from error
    if missing:
        raise UserError(f"{file}: {', '.join(missing)} missing; delete it, or train again")
    return dict(samples)
