"""Metrics by kind of example: how long the history is, how popular the target, who the user.

Legend: M examples, N items, G groups.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import polars as pl

from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import Evaluation, Rows, mean_intervals
from efficientids.evaluation.metrics import ranking_metrics

LENGTH_BINS = (1, 5, 10, 20, 50)
"""Where each group of history lengths begins."""
POPULARITY_SHARES = (("head", 0.5), ("middle", 0.8), ("tail", 1.0))
"""Group → the share of training interactions at which it ends, the most popular items first."""
UNSEEN = "never in training"
MOST_GROUPS = 12
"""A table with more rows than this is not read: the rarest values are put together."""
FEWEST_USERS = 30
"""A group of fewer users gets no interval: resamples of a handful show a certainty that is not there."""
_FEWEST_OF_COMMONEST = 10
"""A text column whose commonest value has fewer users, such as an id, makes no groups."""
_QUANTILES = 5

Tables = dict[str, list[dict[str, Any]]]


def group_tables(evaluation: Evaluation, dataset: Dataset, column: str | None = None) -> Tables:
    """Tables by `history_length`, by `target_popularity` and, where given, by a column of users.parquet.

    Returns:
        By table: a row a group that has examples, in order: `group`, `examples`, `users`, `metrics` and `intervals`
        (as in `Evaluation`, without coverage; `intervals` is None for fewer than `FEWEST_USERS` users).

    Raises:
        UserError: as `check_column`.
    """
    rows = evaluation.rows
    tables = {
        "history_length": _length_groups(rows.history_lengths),
        "target_popularity": _popularity_groups(dataset, rows.targets),
    }
    if column is not None:
        tables[column] = _user_groups(dataset, column, rows.users)
    return {table: _rows(evaluation, *groups) for table, groups in tables.items()}


def _rows(evaluation: Evaluation, names: list[str], group_M: np.ndarray) -> list[dict[str, Any]]:
    masks = ((name, group_M == index) for index, name in enumerate(names))
    return [_row(evaluation, name, inside_M) for name, inside_M in masks if inside_M.any()]


def _row(evaluation: Evaluation, name: str, inside_M: np.ndarray) -> dict[str, Any]:
    rows = Rows(*(column[inside_M] for column in evaluation.rows))
    users = len(np.unique(rows.users))
    ends = mean_intervals(rows, evaluation.cutoffs) if users >= FEWEST_USERS else None
    return {
        "group": name,
        "examples": len(rows.users),
        "users": users,
        "metrics": ranking_metrics(rows.ranks, evaluation.cutoffs),
        "intervals": None if ends is None else {metric: list(pair) for metric, pair in ends.items()},
    }


def _length_groups(lengths_M: np.ndarray) -> tuple[list[str], np.ndarray]:
    names = [f"{low}–{high - 1}" for low, high in itertools.pairwise(LENGTH_BINS)]
    return [*names, f"{LENGTH_BINS[-1]}+"], np.searchsorted(LENGTH_BINS, lengths_M, side="right") - 1


def popularity_classes(dataset: Dataset) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the class of every item, int [N + 1]; item 0 is in none that matters.

    The head are the most popular items that make the first half of the training interactions, the middle those up to
    80%, the tail the rest; an item on the border belongs to the more popular class.
    """
    items, _ = dataset.training_histories()
    counts_N1 = np.bincount(items, minlength=dataset.catalogue_size + 1)
    order = np.argsort(-counts_N1, kind="stable")
    before = np.cumsum(counts_N1[order]) - counts_N1[order]
    class_N1 = np.empty(len(counts_N1), np.int64)
    ends = [share for _, share in POPULARITY_SHARES]
    class_N1[order] = np.searchsorted(ends, before / max(len(items), 1), side="right")
    class_N1[counts_N1 == 0] = len(ends)
    return [*(name for name, _ in POPULARITY_SHARES), UNSEEN], class_N1


def _popularity_groups(dataset: Dataset, targets_M: np.ndarray) -> tuple[list[str], np.ndarray]:
    names, class_N1 = popularity_classes(dataset)
    number = np.bincount(class_N1[1:], minlength=len(names))
    return [f"{name} ({n:,} items)" for name, n in zip(names, number, strict=True)], class_N1[targets_M]


def check_column(dataset: Dataset, column: str) -> pl.Series:
    """The column of users.parquet to group by.

    Raises:
        UserError: there is no such column, it holds lists, or nearly every user has another value in it (a text whose
            commonest value has fewer than 10 users).
    """
    table = dataset.users
    if column not in table.columns:
        raise UserError(f"--group_by {column}: users.parquet of {dataset.path} has {', '.join(table.columns)}")
    if table[column].dtype.is_nested():
        raise UserError(f"--group_by {column}: its values are {table[column].dtype}; give a column of texts or numbers")
    if not table[column].dtype.is_numeric():
        known = table[column].drop_nulls()
        commonest = int(np.max(known.unique_counts().to_numpy(), initial=0))
        if commonest < _FEWEST_OF_COMMONEST:
            raise UserError(
                f"--group_by {column}: {known.n_unique():,} distinct values, and the commonest has {commonest} users "
                f"(at least {_FEWEST_OF_COMMONEST}), so it makes no groups; users.parquet of {dataset.path} has "
                f"{', '.join(table.columns)}"
            )
    return table[column]


def _user_groups(dataset: Dataset, column: str, users_M: np.ndarray) -> tuple[list[str], np.ndarray]:
    values = check_column(dataset, column)
    if values.dtype.is_numeric() and values.n_unique() > MOST_GROUPS:
        names, group_U = _fifths(values.to_numpy().astype(np.float64))
    else:
        names, group_U = _commonest(values)
    # −1, no value, is the last name.
    return [*names, "no value"], group_U[users_M] % (len(names) + 1)


def _commonest(values: pl.Series) -> tuple[list[str], np.ndarray]:
    """The groups of a column with few values, or its commonest and all others together; −1 where there is none."""
    counted = values.drop_nulls().value_counts(sort=True, name="number")
    counted = counted.sort(["number", values.name], descending=[True, False])
    kept = counted[values.name][: MOST_GROUPS if len(counted) <= MOST_GROUPS else MOST_GROUPS - 1].sort()
    place = {value: index for index, value in enumerate(kept.to_list())}
    group = [-1 if value is None else place.get(value, len(place)) for value in values.to_list()]
    return [*map(str, place), "other values"], np.array(group)


def _fifths(numbers_U: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Five groups of about as many users each, by their quantiles; −1 where there is no number."""
    none_U = np.isnan(numbers_U)
    edges = np.unique(np.quantile(numbers_U[~none_U], np.linspace(0, 1, _QUANTILES + 1)))
    names = [f"{low:g} to under {high:g}" for low, high in itertools.pairwise(edges)]
    names[-1] = names[-1].replace("under ", "")
    group_U = np.minimum(np.searchsorted(edges, numbers_U, side="right") - 1, len(names) - 1)
    return names, np.where(none_U, -1, group_U)
