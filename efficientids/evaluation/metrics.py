"""Ranking metrics with one target a user, from the target's rank. All are fractions in [0, 1].

Legend: B users, k recommendations, K cut-off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from efficientids.recommenders.base import Ranked

MISSED = np.iinfo(np.int64).max
"""The rank of a target that was not among the recommendations."""


def target_ranks(ranked: Ranked, targets_B: np.ndarray) -> np.ndarray:
    """The rank of each user's target, 1 = best: the number of items that score at least as much as the target.

    Ties count against the model. `ranked` must hold one item more than the largest cut-off: a target that ties with
    the last item may tie with others that are not listed, so it is a miss.

    Returns:
        int64 [B]; `MISSED` where the target is not listed, or ties with the last item of a full list.

    Raises:
        ValueError: a NaN score, or scores that do not descend.
    """
    scores_Bk = np.asarray(ranked.scores, np.float64)
    if np.isnan(scores_Bk).any():
        raise ValueError("a recommended item scores NaN: the model is broken, nothing can be ranked")
    if (scores_Bk[:, 1:] > scores_Bk[:, :-1]).any():
        raise ValueError("recommendations are not in descending order of score")
    hit_Bk = (ranked.item_ids == targets_B[:, None]) & (targets_B[:, None] > 0)
    target_score_B = np.max(np.where(hit_Bk, scores_Bk, -np.inf), axis=1)
    ranks_B = (scores_Bk >= target_score_B[:, None]).sum(axis=1)
    # Fewer than k items left (id 0 at the end): the list is complete, so its last item hides no tie.
    full_B = ranked.item_ids[:, -1] > 0
    unsure_B = full_B & (target_score_B <= scores_Bk[:, -1])
    return np.where(hit_Bk.any(axis=1) & ~unsure_B, ranks_B, MISSED)


def ranking_metrics(ranks_B: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """HR@K (= Recall@K with one target), NDCG@K = mean 1/log2(rank + 1), MRR@K = mean 1/rank, over rank ≤ K.

    Raises:
        ValueError: no users.
    """
    if len(ranks_B) == 0:
        raise ValueError("no users to evaluate")
    ranks = ranks_B.astype(np.float64)
    values: dict[str, float] = {}
    for cutoff in cutoffs:
        hit = ranks <= cutoff
        values[f"hr@{cutoff}"] = float(hit.mean())
        values[f"ndcg@{cutoff}"] = float(np.where(hit, 1 / np.log2(ranks + 1), 0).mean())
        values[f"mrr@{cutoff}"] = float(np.where(hit, 1 / ranks, 0).mean())
    return values
