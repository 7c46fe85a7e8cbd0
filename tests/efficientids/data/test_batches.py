"""Batches: the same by (seed, step) wherever one starts, every user once an epoch, windows and padding exact."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientids.data.batches import (
    Shard,
    evaluation_batches,
    length_buckets,
    seen_width,
    steps_per_epoch,
    training_batches,
)  # fmt: skip
from efficientids.data.dataset import Dataset
from efficientids.data.writing import write_dataset
from efficientids.errors import UserError


@pytest.fixture
def eleven(tmp_path: Path, make_contents: Callable) -> Dataset:
    """Eleven users that train: user u has u + 4 items, of which u + 2 train; and one of 3, with nothing to learn."""
    histories = [[1 + (user + t) % 30 for t in range(user + 4)] for user in range(11)] + [[1, 2, 3]]
    return write_dataset(tmp_path / "eleven", make_contents(histories, 30))


def _take(
    dataset: Dataset, count: int, batch_size: int = 4, max_items: int = 5, buckets: int = 1, **options: Any
) -> list[dict[str, np.ndarray]]:
    shapes = length_buckets(batch_size, max_items, buckets)
    return list(itertools.islice(training_batches(dataset, shapes, **{"seed": 7, **options}), count))


def _train(dataset: Dataset, user: int) -> np.ndarray:
    return dataset.item_ids[dataset.offsets[user] :][: dataset.train_lengths[user]]


def _assert_equal(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_shapes_and_dtypes(eleven: Dataset) -> None:
    (batch,) = _take(eleven, 1)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "item_ids": ((4, 5), "int32"),
        "lengths": ((4,), "int32"),
        "timestamps": ((4, 5), "int64"),
        "user": ((4,), "int32"),
    }


@pytest.mark.parametrize("buckets", [1, 2])
@pytest.mark.parametrize("start", [1, 5, 12])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_step_is_the_same_wherever_one_starts(eleven: Dataset, start: int, prefetch: int, buckets: int) -> None:
    whole = _take(eleven, start + 3, buckets=buckets)
    _assert_equal(whole[start:], _take(eleven, 3, buckets=buckets, start_step=start, prefetch=prefetch))


@pytest.mark.parametrize("buckets", [1, 2, 3])
def test_every_user_once_an_epoch_and_epochs_differ(eleven: Dataset, buckets: int) -> None:
    steps = steps_per_epoch(eleven.train_lengths, length_buckets(2, 12, buckets))
    batches = _take(eleven, 4 * steps, 2, 12, buckets)
    epochs = [np.concatenate([b["user"] for b in batches[e * steps : (e + 1) * steps]]) for e in range(4)]
    for epoch in epochs:
        # User 11, with one training item, is left out; −1 is an empty row of the last batch.
        assert sorted(epoch[epoch >= 0].tolist()) == list(range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_give_other_orders_and_neighbours_share_no_epoch(eleven: Dataset) -> None:
    orders = [np.concatenate([b["user"] for b in _take(eleven, 12, seed=seed)]).reshape(4, 12) for seed in (0, 1, 2)]
    assert len({tuple(epoch) for order in orders for epoch in order.tolist()}) == 12


def test_buckets_hold_about_the_same_number_of_positions() -> None:
    assert length_buckets(3, 50, 4) == ((50, 3), (25, 6), (13, 12), (7, 24))
    assert length_buckets(3, 5, 9) == ((5, 3), (3, 6), (2, 12))  # none narrower than 2 items


def test_rows_are_in_the_narrowest_bucket_but_for_what_does_not_fill_a_batch(eleven: Dataset) -> None:
    """Training lengths 2 … 12. Widths 12, 6, 3 with 1, 2, 4 rows: 2 and 3 do not fill the narrowest and move up."""
    for batch in _take(eleven, 9, 1, 12, 3):
        rows, width = batch["item_ids"].shape
        assert (width, rows) in {(12, 1), (6, 2)}
        np.testing.assert_array_equal(batch["lengths"], batch["user"] + 2)
        assert width == 12 or batch["lengths"].max() <= 6
    assert steps_per_epoch(eleven.train_lengths, length_buckets(1, 12, 3)) == 9


def test_an_epochs_last_batch_alone_has_empty_rows(eleven: Dataset) -> None:
    batches = _take(eleven, 3, 4)
    empty = [int((batch["user"] < 0).sum()) for batch in batches]
    assert sorted(empty) == [0, 0, 1]
    last = batches[int(np.argmax(empty))]
    assert not last["lengths"][last["user"] < 0].any() and not last["item_ids"][last["user"] < 0].any()


def test_processes_share_each_batch(eleven: Dataset) -> None:
    """Row for row the parts of all processes make the batch of one process, whatever their number."""
    whole = _take(eleven, 7, 4, 12, 2)
    for count in (2, 4):
        parts = [_take(eleven, 7, 4, 12, 2, shard=Shard(index, count)) for index in range(count)]
        for step, batch in enumerate(whole):
            for name, array in batch.items():
                np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), array)
    with pytest.raises(UserError, match="4 users do not divide among 3 processes"):
        _take(eleven, 1, shard=Shard(0, 3))


def test_rows_are_windows_of_the_train_history(eleven: Dataset) -> None:
    starts: dict[int, Counter[int]] = {user: Counter() for user in range(11)}
    for batch in _take(eleven, 165):  # 60 epochs
        for item_ids, length, times, user in zip(*(batch[k] for k in batch), strict=True):
            if user < 0:
                continue
            history = _train(eleven, int(user))
            assert length == min(len(history), 5)
            start = int(times[0]) // 10 - 1  # the times of a user are 10, 20, 30, …
            starts[int(user)][start] += 1
            np.testing.assert_array_equal(item_ids[:length], history[start : start + length])
            np.testing.assert_array_equal(times[:length], 10 * (np.arange(length) + start + 1))
            assert not item_ids[length:].any() and not times[length:].any()
    assert set(starts[2]) == {0}
    longest = starts[10]  # 12 items, windows of 5: 15 draws of the end, clipped to the 8 places
    assert set(longest) == set(range(8))
    assert longest[0] >= 8 and longest[7] >= 8, "the oldest and the newest window come up as often as their items need"


def test_every_item_has_about_the_same_chance(eleven: Dataset) -> None:
    """Of a long history, the newest and the oldest item are in a window as often as the middle ones, or nearly."""
    seen = np.zeros(12)
    for batch in _take(eleven, 600, batch_size=11):
        for item_ids, length, user in zip(batch["item_ids"], batch["lengths"], batch["user"], strict=True):
            if user == 10:
                start = item_ids[0] - _train(eleven, 10)[0]  # its items rise by one
                seen[start : start + length] += 1
    chances = seen / 600
    assert chances.min() > 0.2
    assert chances[-1] == pytest.approx(chances[0], abs=0.1)


def test_fewer_window_items_reach_every_end_of_a_short_history(eleven: Dataset) -> None:
    """Where only 2 of 5 items are looked at (text takes the room), a row ends anywhere from its second item on."""
    ends = set()
    for batch in _take(eleven, 200, window_items=2):
        for item_ids, length, user in zip(batch["item_ids"], batch["lengths"], batch["user"], strict=True):
            if user == 2:
                np.testing.assert_array_equal(item_ids[:length], _train(eleven, 2)[:length])
                ends.add(int(length))
    assert ends == set(range(2, len(_train(eleven, 2)) + 1))


@pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("max_items", 1), ("start_step", -1)])
def test_sizes_out_of_range_are_refused_at_once(eleven: Dataset, option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{option}: {value} is too small"):
        _take(eleven, 1, **{option: value})


def test_nobody_to_train_is_refused(tmp_path: Path, make_contents: Callable) -> None:
    dataset = write_dataset(tmp_path / "short", make_contents([[1, 2, 3], [4]]))
    with pytest.raises(UserError, match="no user has 2 items to train on"):
        _take(dataset, 1)


@pytest.mark.parametrize(("split", "held_back"), [("validation", 2), ("test", 1), ("all", 0)])
def test_evaluation_batches_hold_every_example_in_order(eleven: Dataset, split: Any, held_back: int) -> None:
    batches = list(evaluation_batches(eleven, split, 5, 6))
    users = np.concatenate([batch.users for batch in batches])
    assert users.tolist() == [*range(12), -1, -1, -1]  # 12 users, the one of 3 items too; 3 rows of padding
    for batch in batches:
        assert batch.item_ids.shape == batch.timestamps.shape == (5, 6)
        assert batch.seen.shape == (5, seen_width(eleven)) == (5, 16)
        assert batch.seen.dtype == batch.item_ids.dtype == batch.targets.dtype == batch.users.dtype == np.int32
        assert batch.lengths.dtype == batch.history_lengths.dtype == np.int32 and batch.timestamps.dtype == np.int64
        for row, user in enumerate(batch.users.tolist()):
            whole = eleven.item_ids[eleven.offsets[user] : eleven.offsets[user + 1]] if user >= 0 else []
            history = np.array(whole[: max(len(whole) - held_back, 0)], np.int32)
            times, newest = 10 * (np.arange(len(history)) + 1), history[-6:]
            assert batch.lengths[row] == len(newest) and batch.history_lengths[row] == len(history)
            np.testing.assert_array_equal(batch.item_ids[row], np.pad(newest, (0, 6 - len(newest))))
            np.testing.assert_array_equal(batch.timestamps[row], np.pad(times[-6:], (0, 6 - len(newest))))
            np.testing.assert_array_equal(batch.seen[row], np.pad(history, (0, 16 - len(history))))
            assert batch.targets[row] == (whole[-held_back] if held_back and user >= 0 else 0)


def test_evaluation_passes_over_users_without_a_target(dataset: Dataset) -> None:
    (batch,) = evaluation_batches(dataset, "test", 4, 3)
    assert batch.users.tolist() == [0, 1, 3, -1]
    assert batch.targets.tolist() == [5, 8, 1, 0]
    (everyone,) = evaluation_batches(dataset, "all", 5, 3)
    assert everyone.users.tolist() == [0, 1, 2, 3, 4]


def test_chosen_users(dataset: Dataset) -> None:
    (batch,) = evaluation_batches(dataset, "test", 2, 3, users=np.array([3, 0]))
    assert batch.users.tolist() == [3, 0] and batch.targets.tolist() == [1, 5]
    for split, user in (("test", 2), ("all", 5), ("all", -1)):
        with pytest.raises(UserError, match=f"users: {user} has no target"):
            evaluation_batches(dataset, split, 2, 3, users=np.array([user]))  # type: ignore[arg-type]


def test_evaluating_nothing_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="too small"):
        evaluation_batches(dataset, "test", 0, 3)


@pytest.mark.parametrize(("longest", "width"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_seen_width_is_the_next_power_of_two(tmp_path: Path, make_contents: Callable, longest: int, width: int) -> None:
    assert seen_width(write_dataset(tmp_path / "d", make_contents([[1] * longest, [2]]))) == width
