"""Batches of histories: NumPy arrays of fixed shapes, right-padded, deterministic by (seed, step).

Legend: B batch size, T max_items, S width of the whole history (a power of two, the same for the whole data set).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from efficientids.data.dataset import Dataset, Split
from efficientids.errors import UserError

Row = dict[str, Any]  # NumPy arrays and scalars

# One item alone has nothing before it to be predicted from, and nothing after it to predict.
_SHORTEST_ROW = 2


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Users to rank for. Rows past the last user are padding: `users` -1, everything else 0.

    `item_ids` int32 [B, T] the newest T items of the history, `lengths` int32 [B], `timestamps` int64 [B, T], `users`
    int32 [B], `targets` int32 [B] (0 for none), `seen` int32 [B, S] the whole history, right-padded with 0.
    """

    item_ids: np.ndarray
    lengths: np.ndarray
    timestamps: np.ndarray
    users: np.ndarray
    targets: np.ndarray
    seen: np.ndarray


def training_users(dataset: Dataset) -> np.ndarray:
    """Users whose train history has at least 2 items, int32; the others have no next item to learn from."""
    return np.flatnonzero(dataset.split_lengths("train") >= _SHORTEST_ROW).astype(np.int32)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Steps after which every user of `training_users` has been in a batch: ceil(users / batch_size)."""
    return -(-len(training_users(dataset)) // batch_size)


def training_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    max_items: int,
    seed: int,
    start_step: int = 0,
    transform: Callable[[Row], Row] | None = None,
    window_items: int | None = None,
    prefetch: int = 2,
) -> Iterator[Row]:
    """Endless batches of train histories, one row a user; step s is the same wherever the iteration started.

    Every epoch is a new permutation of `training_users`; a batch may hold the end of one epoch and the beginning of the
    next, so that no user is left out. A longer history is cut to a window that ends anywhere, so that over the epochs
    every item has about the same chance to be in it, the newest and the oldest too. `window_items` (default
    `max_items`) is how many items of a row the model will look at: fewer where each brings text of varying length.

    A batch: `item_ids` int32 [B, T], `lengths` int32 [B], `timestamps` int64 [B, T], `user` int32 [B].
    `transform` maps one row (the same without B) to another of fixed shapes. `prefetch` batches are made ahead in a
    thread; 0 makes each when it is asked for. Raises UserError for sizes out of range and when no user can train.
    """
    for flag, value, least in (
        ("batch_size", batch_size, 1),
        ("max_items", max_items, 2),
        ("window_items", max_items if window_items is None else window_items, 2),
        ("start_step", start_step, 0),
    ):
        if value < least:
            raise UserError(f"{flag}: {value} is too small, give at least {least}")
    users = training_users(dataset)
    if len(users) == 0:
        raise UserError(f"{dataset.path}: no user has {_SHORTEST_ROW} items to train on; prepare a data set with more")
    lengths = dataset.split_lengths("train")
    seen = min(window_items or max_items, max_items)

    def row(user: np.int32, rng: np.random.Generator) -> Row:
        start, length = int(dataset.offsets[user]), int(lengths[user])
        # Drawn past the end and clipped, so that the newest items are not the rarest; and from the start likewise.
        end = int(np.clip(rng.integers(_SHORTEST_ROW, length + seen - 1), min(seen, length), length))
        kept = min(end, max_items)
        start += end - kept
        item_ids, timestamps = np.zeros(max_items, np.int32), np.zeros(max_items, np.int64)
        item_ids[:kept] = dataset.item_ids[start : start + kept]
        timestamps[:kept] = dataset.timestamps[start : start + kept]
        return {"item_ids": item_ids, "lengths": np.int32(kept), "timestamps": timestamps, "user": user}

    # Hashed apart: Grain shuffles epoch e by seed + e, so that epoch 1 of seed 0 would be epoch 0 of seed 1.
    shuffle_seed, window_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    rows = grain.MapDataset.source(users).shuffle(seed=shuffle_seed).repeat().random_map(row, seed=window_seed)
    if transform is not None:
        rows = rows.map(transform)
    batches = rows.batch(batch_size, drop_remainder=True).slice(slice(start_step, None))
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


def seen_width(dataset: Dataset) -> int:
    """S: the longest history of the data set, rounded up to a power of two."""
    return 1 << (int(dataset.lengths.max()) - 1).bit_length()


def evaluation_batches(
    dataset: Dataset, split: Split, batch_size: int, max_items: int, users: np.ndarray | None = None
) -> Iterator[EvaluationBatch]:
    """Batches over the users that have a target in `split`, or over all users for "all"; `users` picks its own.

    In order, each user once, all batches of one shape: the last one is filled with padding rows. Raises UserError for
    sizes out of range, a user who has no target in the split or does not exist, and a split without any user.
    """
    if batch_size < 1 or max_items < 1:
        raise UserError(f"batch_size, max_items: {batch_size}, {max_items} are too small, give at least 1")
    targets = dataset.targets(split)
    able = np.arange(dataset.num_users) if split == "all" else np.flatnonzero(targets)
    chosen = able if users is None else np.asarray(users)
    if not np.isin(chosen, able).all():
        user = chosen[~np.isin(chosen, able)][0]
        raise UserError(
            f"users: {user} has no target in split {split!r} of {dataset.path} (0..{dataset.num_users - 1})"
        )
    if len(chosen) == 0:
        raise UserError(f"{dataset.path}: no user to evaluate in split {split!r}; users need at least 3 interactions")
    return _evaluation_batches(dataset, split, batch_size, max_items, chosen, targets)


def _evaluation_batches(
    dataset: Dataset, split: Split, batch_size: int, max_items: int, chosen: np.ndarray, targets: np.ndarray
) -> Iterator[EvaluationBatch]:
    lengths, width = dataset.split_lengths(split), seen_width(dataset)
    for first in range(0, len(chosen), batch_size):
        users = chosen[first : first + batch_size]
        padding = (0, batch_size - len(users))
        length = np.pad(lengths[users], padding)
        start = np.pad(dataset.offsets[users], padding)
        kept = np.minimum(length, max_items)
        newest = start + length - kept
        yield EvaluationBatch(
            item_ids=_take(dataset.item_ids, newest, kept, max_items),
            lengths=kept.astype(np.int32),
            timestamps=_take(dataset.timestamps, newest, kept, max_items),
            users=np.pad(users.astype(np.int32), padding, constant_values=-1),
            targets=np.pad(targets[users], padding),
            seen=_take(dataset.item_ids, start, length, width),
        )


def _take(flat: np.ndarray, start_B: np.ndarray, length_B: np.ndarray, width: int) -> np.ndarray:
    """Rows flat[start : start + length], right-padded with 0 to [B, width]."""
    columns = np.arange(width)
    inside = columns < length_B[:, None]
    return np.where(inside, flat[np.where(inside, start_B[:, None] + columns, 0)], 0).astype(flat.dtype)
