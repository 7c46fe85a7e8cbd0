"""Ranking by the trained probabilities against the seed's h·e_i, on one two-level run.

`python benchmarks/ranking_ablation.py RUN`: the same parameters and users, ranked three ways. The loss does not
determine h·e_i (one vector added to every item of a cluster leaves it unchanged), so what that ranking reads is luck.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from machine import header  # isort: skip  # sets jax up

import jax
import jax.numpy as jnp
import numpy as np

from core.hierarchical_softmax import raw_dot_scores
from core.softmax import top_k_of
from efficientids.data.batches import evaluation_batches
from efficientids.evaluation.evaluate import evaluate
from efficientids.loading import LoadedRun, open_run
from efficientids.recommenders.base import Histories
from efficientids.recommenders.efficientids import EfficientIDS, TitledModel


class RawDot(EfficientIDS):
    """Ranks by h·e_i (+ b_i) alone, as the seed's port did."""

    with_bias = True

    def rank(self, model: TitledModel, hidden_BD: jax.Array, exclude_BX: jax.Array, k: int) -> tuple[Any, Any]:
        params = model._two_level(model._item_vectors())
        if not self.with_bias:
            params = type(params)(
                params.centroids_CD, params.centroid_bias_C, params.items_N1D, jnp.zeros_like(params.item_bias_N1)
            )
        h_BS = model._head_hidden(hidden_BD.astype(jnp.float32))  # as the exact ranking does
        return top_k_of(lambda h: raw_dot_scores(h, params), h_BS, k, exclude_BX, chunk_size=256)


class RawDotWithoutBias(RawDot):
    """Ranks by h·e_i alone, to the letter of the seed."""

    with_bias = False


def overlap(run: LoadedRun, other: EfficientIDS, k: int = 10) -> float:
    """The mean share of the exact top k that another ranking's top k holds, over the test users."""
    dataset, shares = run.dataset(), []
    for batch in evaluation_batches(dataset, "test", 256, run.recommender.max_items):
        histories = Histories(batch.item_ids, batch.lengths, batch.padding)
        exact, found = (system.recommend(run.model, histories, k, batch.seen) for system in (run.recommender, other))
        both = (exact.item_ids[:, :, None] == found.item_ids[:, None, :]).any(axis=2).mean(axis=1)
        shares += both[batch.targets > 0].tolist()
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    options = parser.parse_args()
    run = open_run(options.run)
    if run.recommender.spec.model.head != "two_level":
        parser.error(f"{options.run} has the full head; train it with --head two_level")
    print(header())
    print(f"run: step {run.step}, data {run.dataset().manifest['name']}, {run.recommender.spec.num_clusters} clusters")
    ways = {"exact": EfficientIDS, "h·e + b (seed, with bias)": RawDot, "h·e (seed)": RawDotWithoutBias}
    for name, kind in ways.items():
        system = kind(run.recommender.spec)
        result = evaluate(system, run.model, run.dataset(), "test")
        metrics = {key: round(result.metrics[key], 4) for key in ("hr@10", "ndcg@10", "coverage@10")}
        print(json.dumps({"ranking": name, **metrics, "overlap@10 with exact": round(overlap(run, system), 4)}))


if __name__ == "__main__":
    main()
