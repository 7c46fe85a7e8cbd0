"""Full-catalogue evaluation of any recommender, through `recommend` alone.

Legend: M examples, B examples of a batch, k recommendations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

from efficientids.data import layout
from efficientids.data.batches import EvaluationBatch, evaluation_batches
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.bootstrap import intervals, resampled_means, wilson
from efficientids.evaluation.metrics import gains, ranking_metrics, target_ranks
from efficientids.recommenders.base import Histories, Ranked, Recommender

Seen = Literal["mask", "keep"]
Held = Literal["validation", "test"]
Progress = Callable[[int, int], None]
CUTOFFS = (1, 5, 10, 20)


class Rows(NamedTuple):
    """The examples and what came of them, in the order of users, then time.

    users int32 [M], targets int32 [M], history_lengths int32 [M] (untruncated), ranks int64 [M]: of the target, 1 =
    best, `metrics.MISSED` where it was not among the recommendations.
    """

    users: np.ndarray
    targets: np.ndarray
    history_lengths: np.ndarray
    ranks: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What a recommender is worth on one split of one data set.

    Attributes:
        rows: one row an example.
        coverage: coverage@K: the share of the catalogue that anyone is recommended, by name.
        protocol: how the numbers came about, plain values.
        fingerprint: of the data set.
        cutoffs: the K of the metrics.
    """

    rows: Rows
    coverage: dict[str, float]
    protocol: dict[str, Any]
    fingerprint: str
    cutoffs: tuple[int, ...]

    @property
    def examples(self) -> int:
        """M."""
        return len(self.rows.users)

    @functools.cached_property
    def users(self) -> int:
        """How many users the examples are of."""
        return len(np.unique(self.rows.users))

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """HR, NDCG and MRR (means over examples) and coverage at each cut-off; fractions."""
        return ranking_metrics(self.rows.ranks, self.cutoffs) | self.coverage

    @functools.cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% intervals of the means (`mean_intervals`); coverage is no mean and has none."""
        return mean_intervals(self.rows, self.cutoffs)

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, as plain values."""
        return {
            "metrics": self.metrics,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "protocol": self.protocol,
            "users": self.users,
            "examples": self.examples,
            "cutoffs": list(self.cutoffs),
            "fingerprint": self.fingerprint,
        }


def mean_intervals(rows: Rows, cutoffs: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """95% intervals of HR, NDCG and MRR over `rows`, by name: the bootstrap over users.

    A mean of exactly 0 or 1 gets Wilson's interval of a share of the users. It is HR's own; for NDCG@K and MRR@K it is
    on the safe side: with no hit they are at most HR@K, with every target first at least HR@1.

    Raises:
        ValueError: no rows.
    """
    values = gains(rows.ranks, cutoffs)
    ends = intervals(resampled_means(np.stack(list(values.values()), axis=1), rows.users))
    users = len(np.unique(rows.users))
    found: dict[str, tuple[float, float]] = {}
    for (name, value_M), (low, high) in zip(values.items(), ends, strict=True):
        mean = float(value_M.mean())
        found[name] = wilson(mean, users) if mean in (0, 1) else (float(low), float(high))
    return found


def evaluate(
    recommender: Recommender,
    model: nnx.Module,
    dataset: Dataset,
    split: Held,
    *,
    seen: Seen = "mask",
    batch_size: int = 256,
    cutoffs: tuple[int, ...] = CUTOFFS,
    progress: Progress | None = None,
    users: np.ndarray | None = None,
) -> Evaluation:
    """Ranks the whole catalogue for every example of `split`.

    Args:
        seen: `mask` never recommends an item of the user's history (the whole history, not its truncated end), and
            a target that is itself in the history counts as a miss; `keep` recommends anything.
        batch_size: examples at a time.
        cutoffs: the K of HR@K, NDCG@K, MRR@K and coverage@K.
        progress: called with (examples done, examples in all).
        users: these alone, ascending; None: all.

    Raises:
        UserError: no user has a target in this split, or a score is NaN.
    """
    shown = {cutoff: np.zeros(dataset.catalogue_size + 1, bool) for cutoff in cutoffs}
    parts: list[Rows] = []
    masked_targets = 0
    for batch, ranked in ranked_batches(
        recommender,
        model,
        dataset,
        split,
        k=max(cutoffs) + 1,
        seen=seen,
        batch_size=batch_size,
        progress=progress,
        users=users,
    ):
        real = batch.targets > 0
        try:
            ranks = target_ranks(ranked, batch.targets)
        except ValueError as error:
            raise UserError(f"evaluation on {dataset.path}, split {split}: {error}") from error
        columns = (batch.users, batch.targets, batch.history_lengths, ranks)
        parts.append(Rows(*(column[real] for column in columns)))
        masked_targets += int((batch.seen == batch.targets[:, None])[real].any(axis=1).sum())
        for cutoff, items in shown.items():
            items[ranked.item_ids[real, :cutoff].ravel()] = True
    rows = Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    protocol = _protocol(dataset, split, seen, recommender.history)
    if users is not None:
        protocol["split"] += f", {len(users)} users drawn"
    protocol["unhittable_share"] = masked_targets / len(rows.users) if seen == "mask" else 0.0
    coverage = {f"coverage@{c}": float(items[1:].sum() / dataset.catalogue_size) for c, items in shown.items()}
    return Evaluation(rows, coverage, protocol, dataset.fingerprint, cutoffs)


def ranked_batches(
    recommender: Recommender,
    model: nnx.Module,
    dataset: Dataset,
    split: Held,
    *,
    k: int,
    seen: Seen,
    batch_size: int,
    progress: Progress | None,
    users: np.ndarray | None = None,
) -> Iterator[tuple[EvaluationBatch, Ranked]]:
    """Each batch of examples of `split` with its k recommendations. Raises UserError for a split without any."""
    of = dataset.examples(split).users
    total, done = len(of) if users is None else int(np.isin(of, users).sum()), 0
    for batch in evaluation_batches(dataset, split, batch_size, recommender.max_items, users=users):
        exclude = batch.seen if seen == "mask" else None
        yield batch, recommender.recommend(model, Histories(batch.item_ids, batch.lengths, batch.padding), k, exclude)
        done += int((batch.targets > 0).sum())
        if progress is not None:
            progress(done, total)


def _protocol(dataset: Dataset, split: str, seen: Seen, history: str) -> dict[str, Any]:
    rules = {layout.LEAVE_ONE_OUT: "leave-one-out", layout.TIME: "split by time", layout.GIVEN: "split as given"}
    return {
        "split": f"{rules[dataset.manifest['split']['rule']]}, {split}",
        "candidates": f"full catalogue, {dataset.catalogue_size} items",
        "seen": seen,
        "ties": "against the model",
        "order": dataset.manifest["order"],
        "unit": "fractions",
        "history": history,
    }
