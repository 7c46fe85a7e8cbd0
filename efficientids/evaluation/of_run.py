"""Evaluates a run and keeps the result in its folder."""

from __future__ import annotations

from typing import Any

from efficientids import processes
from efficientids.data.dataset import Dataset
from efficientids.data.process import Oracle, has_oracle
from efficientids.evaluation.evaluate import Evaluation, Held, Progress, Seen, evaluate
from efficientids.evaluation.groups import check_column, group_tables
from efficientids.evaluation.records import save_evaluation
from efficientids.evaluation.sampled import check_sampled, sampled_metrics
from efficientids.loading import LoadedRun


def evaluate_run(
    loaded: LoadedRun,
    dataset: Dataset,
    split: Held,
    *,
    seen: Seen = "mask",
    batch_size: int = 256,
    group_by: str | None = None,
    sampled_negatives: int | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluates a run's checkpoint and writes `R/evaluation/SPLIT-SEEN-stepN` (see `records`).

    Args:
        group_by: a column of users.parquet to group by, beside history length and popularity of the target.
        sampled_negatives: further metrics among so many sampled items; None: not.

    Returns:
        The evaluation, and what stands in its JSON beside it: `run`, `dataset`, `groups`, and where asked for or known
        `sampled` and `best_possible`.

    Raises:
        UserError: as `evaluate`, `group_tables`, `sampled_metrics` and `save_evaluation`.
    """
    # What is wrong with the request is said before the long part.
    if group_by is not None:
        check_column(dataset, group_by)
    if sampled_negatives is not None:
        check_sampled(dataset, sampled_negatives)
    recommender, model = loaded.recommender, loaded.model
    evaluation = evaluate(recommender, model, dataset, split, seen=seen, batch_size=batch_size, progress=progress)
    more: dict[str, Any] = {
        "run": str(loaded.run.path),
        "dataset": dataset.manifest["name"],
        "groups": group_tables(evaluation, dataset, group_by),
    }
    if sampled_negatives is not None:
        more["sampled"] = sampled_metrics(
            recommender, model, dataset, split,
            negatives=sampled_negatives, seen=seen, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    if has_oracle(dataset):
        best = Oracle.open(dataset).best_hit_rate(split, 10)
        more["best_possible"] = {"hr@10": best.realised, "hr@10 expected": best.expected}
    if processes.is_first():
        save_evaluation(loaded.run.path, loaded.step, split, evaluation, more)
    return evaluation, more
