"""Batches of histories: NumPy arrays of few fixed shapes, right-padded, deterministic by (seed, step).

Legend: B rows of a batch, T its width, S width of the whole history (a power of two, the same for the whole data set).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from efficientids.data.dataset import Dataset, Examples
from efficientids.errors import UserError

Row = Mapping[str, Any]  # NumPy arrays

# One item alone has nothing before it to be predicted from, and nothing after it to predict.
_SHORTEST_ROW = 2
_ENDLESS = 2**31  # steps


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Examples to rank for. Rows past the last one are padding: `users` -1, everything else 0.

    `item_ids` int32 [B, T] the newest T items of the history, `lengths` int32 [B], `timestamps` int64 [B, T], `users`
    int32 [B], `targets` int32 [B] (0 for none), `seen` int32 [B, S] the whole history, right-padded with 0,
    `history_lengths` int32 [B] its length.
    """

    item_ids: np.ndarray
    lengths: np.ndarray
    timestamps: np.ndarray
    users: np.ndarray
    targets: np.ndarray
    seen: np.ndarray
    history_lengths: np.ndarray

    @property
    def padding(self) -> int:
        """How many rows are padding: the last ones."""
        return int((self.users < 0).sum())


class Bucket(NamedTuple):
    """Rows of at most `width` items go `rows` at a time: every bucket has about the same number of positions."""

    width: int
    rows: int


def length_buckets(batch_size: int, max_items: int, count: int) -> tuple[Bucket, ...]:
    """At most `count` buckets, the widest first: half the width, twice the rows. None is narrower than 2 items."""
    halvings = [2**i for i in range(count) if i == 0 or -(-max_items // 2**i) >= _SHORTEST_ROW]
    return tuple(Bucket(-(-max_items // h), batch_size * h) for h in halvings)


def training_users(dataset: Dataset) -> np.ndarray:
    """Users whose train history has at least 2 items, int32; the others have no next item to learn from."""
    return np.flatnonzero(dataset.train_lengths >= _SHORTEST_ROW).astype(np.int32)


def steps_per_epoch(train_lengths: np.ndarray, buckets: Sequence[Bucket]) -> int:
    """Steps after which every user with 2 training items or more has been in a batch: the same in every epoch."""
    lengths = train_lengths[train_lengths >= _SHORTEST_ROW]
    counts = np.bincount(_bucket_of(lengths, buckets), minlength=len(buckets))
    return sum(batches for _, batches, _ in _shares(counts, buckets))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which rows of every batch this process makes: the `index`-th of `count` equal parts."""

    index: int = 0
    count: int = 1


def training_batches(
    dataset: Dataset,
    buckets: Sequence[Bucket],
    *,
    seed: int,
    start_step: int = 0,
    window_items: int | None = None,
    prefetch: int = 2,
    shard: Shard = Shard(),
    transform: Callable[[Row], Row] | None = None,
) -> Iterator[Row]:
    """Endless batches of train histories, one row a user; step s is the same wherever the iteration started.

    Every epoch takes each of `training_users` once, in a new order: a user goes to the narrowest bucket that holds the
    history, and what does not fill a batch goes to the next wider one, so that only an epoch's very last batch may have
    empty rows (length 0). A history longer than the widest bucket is cut to a window that ends anywhere, so that over
    the epochs every item has about the same chance to be in it, the newest and the oldest too. `window_items` (default
    the widest bucket) is how many items of a row the model will look at: fewer where each brings text of its own.

    A batch of bucket b: `item_ids` int32 [B, T], `lengths` int32 [B], `timestamps` int64 [B, T], `user` int32 [B] (−1
    in an empty row), B = b.rows / shard.count, T = b.width. `prefetch` batches are made ahead in a thread; 0 makes each
    when it is asked for. `transform` maps each batch to another, in that thread.

    Raises UserError for sizes out of range and when no user can train.
    """
    _check_training(dataset, buckets, start_step, window_items, shard)
    plan = _EpochPlan(dataset, buckets, seed)

    def batch(step: int) -> Row:
        bucket, users = plan.batch(step)
        rng = np.random.default_rng([seed, step, 1])
        starts, lengths = _windows(dataset, users, rng, bucket.width, min(window_items or bucket.width, bucket.width))
        part = bucket.rows // shard.count
        mine = slice(shard.index * part, (shard.index + 1) * part)
        return {
            "item_ids": _take(dataset.item_ids, starts[mine], lengths[mine], bucket.width),
            "lengths": lengths[mine].astype(np.int32),
            "timestamps": _take(dataset.timestamps, starts[mine], lengths[mine], bucket.width),
            "user": users[mine],
        }

    batches = grain.MapDataset.range(start_step, _ENDLESS).map(batch)
    if transform is not None:
        batches = batches.map(transform)
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


class _EpochPlan:
    """Which users make up the batch of a step: random access, one epoch's order in memory at a time."""

    def __init__(self, dataset: Dataset, buckets: Sequence[Bucket], seed: int) -> None:
        self._buckets, self._seed = buckets, seed
        self._users = training_users(dataset)
        self._bucket = _bucket_of(dataset.train_lengths[self._users], buckets)
        self._counts = np.bincount(self._bucket, minlength=len(buckets))
        self._steps = sum(batches for _, batches, _ in _shares(self._counts, buckets))
        self._epoch, self._batches = -1, list[tuple[Bucket, np.ndarray]]()

    def batch(self, step: int) -> tuple[Bucket, np.ndarray]:
        """The bucket of a step and its users, int32 [rows], −1 in empty rows."""
        epoch, place = divmod(step, self._steps)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._make(epoch)
        return self._batches[place]

    def _make(self, epoch: int) -> list[tuple[Bucket, np.ndarray]]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._users))
        pools = [self._users[order[self._bucket[order] == b]] for b in range(len(self._buckets))]
        batches, carried = [], np.zeros(0, np.int32)
        for index, number, left in _shares(self._counts, self._buckets):
            pool, bucket = np.concatenate([carried, pools[index]]), self._buckets[index]
            empty = np.full(max(0, number * bucket.rows - len(pool)), -1, np.int32)
            full, carried = np.split(np.concatenate([pool, empty]), [number * bucket.rows])
            assert len(carried) == left
            batches += [(bucket, users) for users in full.reshape(number, bucket.rows)]
        return [batches[i] for i in rng.permutation(len(batches))]


def _bucket_of(lengths: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The narrowest bucket that holds each history; the widest for longer ones."""
    widths = np.array([bucket.width for bucket in buckets])
    return np.searchsorted(-widths, -np.minimum(lengths, widths[0]), side="right") - 1


def _shares(counts: np.ndarray, buckets: Sequence[Bucket]) -> Iterator[tuple[int, int, int]]:
    """(bucket, its batches in an epoch, users left over for the next wider one), the narrowest bucket first."""
    left = 0
    for index in reversed(range(len(buckets))):
        users = left + int(counts[index])
        batches, left = divmod(users, buckets[index].rows)
        if index == 0 and left:
            batches, left = batches + 1, 0
        yield index, batches, left


def _windows(
    dataset: Dataset, users: np.ndarray, rng: np.random.Generator, width: int, seen: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each user's row starts in the flat arrays, and its length (0 for user −1)."""
    real = users >= 0
    length = np.where(real, dataset.train_lengths[users], 0)
    # Drawn past the end and clipped, so that the newest items are not the rarest; and from the start likewise.
    drawn = rng.integers(_SHORTEST_ROW, np.maximum(length + seen - 1, _SHORTEST_ROW + 1))
    end = np.clip(drawn, np.minimum(seen, length), length)
    kept = np.minimum(end, width)
    return np.where(real, dataset.offsets[users] + end - kept, 0), kept


def _check_training(
    dataset: Dataset, buckets: Sequence[Bucket], start_step: int, window_items: int | None, shard: Shard
) -> None:
    widest, least_rows = buckets[0].width, min(bucket.rows for bucket in buckets)
    for flag, value, least in (
        ("batch_size", least_rows, 1),
        ("max_items", widest, 2),
        ("window_items", widest if window_items is None else window_items, 2),
        ("start_step", start_step, 0),
    ):
        if value < least:
            raise UserError(f"{flag}: {value} is too small, give at least {least}")
    if any(bucket.rows % shard.count for bucket in buckets):
        raise UserError(f"batch_size: {least_rows} users do not divide among {shard.count} processes")
    if not (dataset.train_lengths >= _SHORTEST_ROW).any():
        raise UserError(f"{dataset.path}: no user has {_SHORTEST_ROW} items to train on; prepare a data set with more")


def seen_width(dataset: Dataset) -> int:
    """S: the longest history of the data set, rounded up to a power of two."""
    return 1 << (int(dataset.lengths.max()) - 1).bit_length()


def evaluation_batches(
    dataset: Dataset,
    split: Literal["validation", "test", "all"],
    batch_size: int,
    max_items: int,
    users: np.ndarray | None = None,
) -> Iterator[EvaluationBatch]:
    """Batches over the examples of `split` (`Dataset.examples`), or over those of `users` alone, in the users' order.

    Each example once, all batches of one shape: the last one is filled with padding rows. Raises UserError for sizes
    out of range, a user who has no target in the split or does not exist, and a split without any example.
    """
    if batch_size < 1 or max_items < 1:
        raise UserError(f"batch_size, max_items: {batch_size}, {max_items} are too small, give at least 1")
    examples = dataset.examples(split)
    if users is not None:
        examples = _of_users(dataset, split, examples, np.asarray(users))
    if len(examples.users) == 0:
        raise UserError(f"{dataset.path}: no user to evaluate in split {split!r}; users need at least 3 interactions")
    return _evaluation_batches(dataset, batch_size, max_items, examples)


def _of_users(dataset: Dataset, split: str, examples: Examples, users: np.ndarray) -> Examples:
    """The examples of `users`, in their order."""
    if not np.isin(users, examples.users).all():
        user = users[~np.isin(users, examples.users)][0]
        raise UserError(
            f"users: {user} has no target in split {split!r} of {dataset.path} (0..{dataset.num_users - 1})"
        )
    first = np.searchsorted(examples.users, users, side="left")
    number = np.searchsorted(examples.users, users, side="right") - first
    within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    rows = np.repeat(first, number) + within
    return Examples(*(column[rows] for column in examples))


def _evaluation_batches(
    dataset: Dataset, batch_size: int, max_items: int, examples: Examples
) -> Iterator[EvaluationBatch]:
    width = seen_width(dataset)
    for first in range(0, len(examples.users), batch_size):
        users, length, targets = (column[first : first + batch_size] for column in examples)
        padding = (0, batch_size - len(users))
        start = np.pad(dataset.offsets[users], padding)
        length = np.pad(length, padding)
        kept = np.minimum(length, max_items)
        newest = start + length - kept
        yield EvaluationBatch(
            item_ids=_take(dataset.item_ids, newest, kept, max_items),
            lengths=kept.astype(np.int32),
            timestamps=_take(dataset.timestamps, newest, kept, max_items),
            users=np.pad(users.astype(np.int32), padding, constant_values=-1),
            targets=np.pad(targets, padding),
            seen=_take(dataset.item_ids, start, length, width),
            history_lengths=length.astype(np.int32),
        )


def _take(flat: np.ndarray, start_B: np.ndarray, length_B: np.ndarray, width: int) -> np.ndarray:
    """Rows flat[start : start + length], right-padded with 0 to [B, width]."""
    columns = np.arange(width)
    inside = columns < length_B[:, None]
    return np.where(inside, flat[np.where(inside, start_B[:, None] + columns, 0)], 0).astype(flat.dtype)
