"""Ranking metrics with one target an example, from the target's rank. All are fractions in [0, 1].

Legend: B, M examples, k recommendations, K cut-off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from efficientids.recommenders.base import Ranked

MISSED = np.iinfo(np.int64).max
"""The rank of a target that was not among the recommendations."""


def target_ranks(ranked: Ranked, targets_B: np.ndarray) -> np.ndarray:
    """The rank of each example's target, 1 = best: the number of items that score at least as much as the target.

    Ties count against the model. `ranked` must hold one item more than the largest cut-off: a target that ties with
    the last item may tie with others that are not listed, so it is a miss.

    Returns:
        int64 [B]; `MISSED` where the target is not listed, or ties with the last item of a full list.

    Raises:
        ValueError: a NaN score, or scores that do not descend.
    """
    scores_Bk = checked_scores(ranked)
    hit_Bk = (ranked.item_ids == targets_B[:, None]) & (targets_B[:, None] > 0)
    target_score_B = np.max(np.where(hit_Bk, scores_Bk, -np.inf), axis=1)
    ranks_B = (scores_Bk >= target_score_B[:, None]).sum(axis=1)
    # Fewer than k items left (id 0 at the end): the list is complete, so its last item hides no tie.
    full_B = ranked.item_ids[:, -1] > 0
    unsure_B = full_B & (target_score_B <= scores_Bk[:, -1])
    return np.where(hit_Bk.any(axis=1) & ~unsure_B, ranks_B, MISSED)


def checked_scores(ranked: Ranked) -> np.ndarray:
    """The scores of a ranking, float64 [B, k].

    Raises:
        ValueError: a NaN score, or scores that do not descend.
    """
    scores_Bk = np.asarray(ranked.scores, np.float64)
    if np.isnan(scores_Bk).any():
        raise ValueError("a recommended item scores NaN: the model is broken, nothing can be ranked")
    if (scores_Bk[:, 1:] > scores_Bk[:, :-1]).any():
        raise ValueError("recommendations are not in descending order of score")
    return scores_Bk


def gains(ranks_M: np.ndarray, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """What each example adds to a metric, float64 [M] by name; 0 where rank > K.

    hr@K: 1 (HR@K is Recall@K with one target); ndcg@K: 1 / log2(rank + 1); mrr@K: 1 / rank.
    """
    ranks = ranks_M.astype(np.float64)
    values: dict[str, np.ndarray] = {}
    for cutoff in cutoffs:
        hit = ranks <= cutoff
        values[f"hr@{cutoff}"] = hit.astype(np.float64)
        values[f"ndcg@{cutoff}"] = np.where(hit, 1 / np.log2(ranks + 1), 0)
        values[f"mrr@{cutoff}"] = np.where(hit, 1 / ranks, 0)
    return values


def ranking_metrics(ranks_M: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """The means of `gains` over the examples.

    Raises:
        ValueError: no examples.
    """
    if len(ranks_M) == 0:
        raise ValueError("no users to evaluate")
    return {name: float(values.mean()) for name, values in gains(ranks_M, cutoffs).items()}
