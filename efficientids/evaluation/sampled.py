"""Metrics among a few sampled items, as some papers report them. They do not order models.

Legend: B examples, N items, K cut-off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from efficientids.data.batches import EvaluationBatch
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import CUTOFFS, Held, Progress, Seen, ranked_batches
from efficientids.evaluation.metrics import checked_scores
from efficientids.recommenders.base import Ranked, Recommender

LARGEST_CATALOGUE = 50_000
WARNING = (
    "WARNING: the target's rank among sampled items alone. Such metrics do not order models: what is better by them\n"
    "can be worse over the catalogue (Krichene and Rendle, KDD 2020). They are here to be set beside a paper that has\n"
    "no others; compare models by the full-catalogue metrics."
)


def check_sampled(dataset: Dataset, negatives: int, cutoffs: tuple[int, ...] = CUTOFFS) -> None:
    """Raises UserError for fewer negatives than the largest cut-off, and for a catalogue that is too large."""
    if negatives < max(cutoffs):
        raise UserError(f"--sampled_negatives {negatives}: at least {max(cutoffs)}, or every target would be a hit")
    if dataset.catalogue_size > LARGEST_CATALOGUE:
        raise UserError(
            f"--sampled_negatives ranks the whole catalogue for every example, and {dataset.path} has "
            f"{dataset.catalogue_size:,} items (at most {LARGEST_CATALOGUE:,}); leave the flag out"
        )


def sampled_metrics(
    recommender: Recommender,
    model: nnx.Module,
    dataset: Dataset,
    split: Held,
    *,
    negatives: int,
    seen: Seen = "mask",
    batch_size: int = 256,
    cutoffs: tuple[int, ...] = CUTOFFS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """HR@K and NDCG@K of the target among itself and `negatives` unseen items, drawn uniformly without replacement.

    No item is drawn: of n unseen items, b score at least as much as the target, so the number of those in a sample of m
    is hypergeometric(n, b, m), and what is returned is the exact mean over all samples.

    Raises:
        UserError: as `check_sampled`; or a score is NaN.
    """
    from scipy.stats import hypergeom  # takes most of a second, which every other command would spend

    check_sampled(dataset, negatives, cutoffs)
    sums = {f"{metric}@{cutoff}": 0.0 for cutoff in cutoffs for metric in ("hr", "ndcg")}
    examples = 0
    for batch, ranked in ranked_batches(
        recommender, model, dataset, split,
        k=dataset.catalogue_size, seen=seen, batch_size=batch_size, progress=progress,
    ):  # fmt: skip
        try:
            listed_B, above_B, unseen_B = _above(batch, ranked, dataset.catalogue_size)
        except ValueError as error:
            raise UserError(f"evaluation on {dataset.path}, split {split}: {error}") from error
        drawn_B = np.minimum(negatives, unseen_B)
        place_K = np.arange(max(cutoffs))
        chance_BK = hypergeom.pmf(place_K, unseen_B[:, None], above_B[:, None], drawn_B[:, None])
        chance_BK = np.where(listed_B[:, None], chance_BK, 0.0)
        for cutoff in cutoffs:
            sums[f"hr@{cutoff}"] += float(chance_BK[:, :cutoff].sum())
            sums[f"ndcg@{cutoff}"] += float((chance_BK / np.log2(place_K + 2))[:, :cutoff].sum())
        examples += int((batch.targets > 0).sum())
    return {
        "negatives": negatives,
        "metrics": {name: value / examples for name, value in sums.items()},
        "sampling": "uniform among unseen items, without replacement; the exact mean over samples",
        "warning": " ".join(WARNING.split()),
    }


def _above(batch: EvaluationBatch, ranked: Ranked, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each example: is the target listed; the unseen other items that score at least as much; all unseen others."""
    scores_BN = checked_scores(ranked)
    rows_B1 = np.arange(len(batch.targets))[:, None]
    unseen_BN = np.ones((len(batch.targets), num_items + 1), bool)
    unseen_BN[rows_B1, batch.seen] = False
    unseen_BN[rows_B1, batch.targets[:, None]] = False
    unseen_BN[:, 0] = False
    hit_BN = (ranked.item_ids == batch.targets[:, None]) & (batch.targets[:, None] > 0)
    target_B = np.max(np.where(hit_BN, scores_BN, -np.inf), axis=1)
    # Unseen items that a model leaves out of its list would be below every target that is in it.
    others_BN = (ranked.item_ids > 0) & unseen_BN[rows_B1, ranked.item_ids]
    above_B = (others_BN & (scores_BN >= target_B[:, None])).sum(axis=1)
    return hit_BN.any(axis=1), above_B, unseen_BN.sum(axis=1)
