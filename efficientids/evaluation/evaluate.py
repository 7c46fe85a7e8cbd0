"""Full-catalogue, leave-one-out evaluation of any recommender, through `recommend` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from flax import nnx

from efficientids.data.batches import evaluation_batches
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.metrics import ranking_metrics, target_ranks
from efficientids.recommenders.base import Histories, Recommender

Seen = Literal["mask", "keep"]
CUTOFFS = (1, 5, 10, 20)


def evaluate(
    recommender: Recommender,
    model: nnx.Module,
    dataset: Dataset,
    split: Literal["validation", "test"],
    *,
    seen: Seen = "mask",
    max_items: int,
    batch_size: int = 256,
    cutoffs: tuple[int, ...] = CUTOFFS,
    history: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ranks the whole catalogue for every user of `split`.

    Args:
        seen: `mask` never recommends an item of the user's history (the whole history, not its truncated end), and
            a target that is itself in the history counts as a miss; `keep` recommends anything.
        max_items: newest items of a history that the recommender is given.
        batch_size: users at a time.
        cutoffs: the K of HR@K, NDCG@K, MRR@K and coverage@K.
        history: what the model looks at, in words, where that is not simply the newest `max_items` items.
        progress: called with (users done, users in all).

    Returns:
        `metrics` (fractions), `protocol` (how they came about) and `users` (their number).

    Raises:
        UserError: no user has a target in this split, or a score is NaN.
    """
    ranks: list[np.ndarray] = []
    shown = {cutoff: np.zeros(dataset.catalogue_size + 1, bool) for cutoff in cutoffs}
    masked_targets, done = 0, 0
    total = int((dataset.targets(split) > 0).sum())
    for batch in evaluation_batches(dataset, split, batch_size, max_items):
        real = batch.targets > 0
        exclude = batch.seen if seen == "mask" else None
        ranked = recommender.recommend(model, Histories(batch.item_ids, batch.lengths), max(cutoffs) + 1, exclude)
        try:
            ranks.append(target_ranks(ranked, batch.targets)[real])
        except ValueError as error:
            raise UserError(f"evaluation on {dataset.path}, split {split}: {error}") from error
        masked_targets += int((batch.seen == batch.targets[:, None])[real].any(axis=1).sum())
        for cutoff, items in shown.items():
            items[ranked.item_ids[real, :cutoff].ravel()] = True
        done += int(real.sum())
        if progress is not None:
            progress(done, total)
    if not done:
        raise UserError(f"{dataset.path}: no user has a target in split {split!r}; leave-one-out needs 3 interactions")
    metrics = ranking_metrics(np.concatenate(ranks), cutoffs)
    metrics |= {f"coverage@{c}": float(items[1:].sum() / dataset.catalogue_size) for c, items in shown.items()}
    protocol = _protocol(dataset, split, seen, history or f"newest {max_items} items")
    protocol["unhittable_share"] = masked_targets / done if seen == "mask" else 0.0
    return {"metrics": metrics, "protocol": protocol, "users": done}


def _protocol(dataset: Dataset, split: str, seen: Seen, history: str) -> dict[str, Any]:
    return {
        "split": f"leave-one-out, {split}",
        "candidates": f"full catalogue, {dataset.catalogue_size} items",
        "seen": seen,
        "ties": "against the model",
        "order": dataset.manifest["order"],
        "unit": "fractions",
        "history": history,
    }


def as_text(result: dict[str, Any]) -> str:
    """The result as a small table, protocol first."""
    protocol, metrics = result["protocol"], result["metrics"]
    cutoffs = sorted({int(name.split("@")[1]) for name in metrics})
    kinds = list(dict.fromkeys(name.split("@")[0] for name in metrics))
    head = (
        f"{protocol['split']}: {result['users']:,} users; ranked over the {protocol['candidates']}; "
        f"seen items: {protocol['seen']} ({protocol['unhittable_share']:.1%} of targets unhittable); "
        f"ties {protocol['ties']}; {protocol['unit']}"
    )
    rows = [f"{'':>10}" + "".join(f"{'@' + str(c):>9}" for c in cutoffs)]
    rows += [f"{kind:>10}" + "".join(f"{metrics[f'{kind}@{c}']:>9.4f}" for c in cutoffs) for kind in kinds]
    return "\n".join([head, *rows])
