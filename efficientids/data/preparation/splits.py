"""Which interactions are held out: cut at a time, or as the source came split. (Leave-one-out needs no arrays.)"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from efficientids.data.layout import GIVEN, MIN_HELD_OUT, TIME, HeldOut, user_blocks
from efficientids.data.sources.base import TEST, TRAIN, VALIDATION
from efficientids.errors import UserError

_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class TimeSplit:
    """Where a split by time cuts: at given seconds since 1970, or so that these shares of all rows come after."""

    validation_start: int | None = None
    test_start: int | None = None
    validation_share: float = 0.1
    test_share: float = 0.1


def parse_time(flag: str, text: str) -> int:
    """Seconds since 1970 of whole seconds or an ISO date or datetime (UTC where it names no zone)."""
    if re.fullmatch(r"-?\d+", text) and not re.fullmatch(r"\d{8}", text):
        return int(text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(
            f"--{flag}: {text!r} is no time; give a date such as 2001-03-31, or seconds since 1970"
        ) from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp())


def by_time(timestamps: np.ndarray, offsets: np.ndarray, split: TimeSplit) -> tuple[HeldOut, dict[str, Any]]:
    """Every row from `test_start` on is a test target, every earlier one from `validation_start` on validates.

    `timestamps` rise within each user. A share is met by the latest time that leaves at least so many rows after it, so
    rows of one time stay together. A row with nothing before it is no target (`without_history` counts them). Returns
    the arrays and the manifest's facts. Raises UserError when a part would be empty.
    """
    n = len(timestamps)
    if split.validation_start is not None and split.test_start is not None:
        start, test = split.validation_start, split.test_start
    else:
        test = _latest_with(timestamps, round(split.test_share * n))
        start = _latest_with(timestamps, round((split.validation_share + split.test_share) * n))
    if start >= test:
        raise UserError(
            f"--split time: validation would start at {_iso(start)}, test at {_iso(test)}, so validation is empty; "
            "give an earlier --validation_start or a larger --validation_share"
        )
    train_lengths = np.zeros(len(offsets) - 1, np.int64)
    targets: dict[int, list[np.ndarray]] = {VALIDATION: [], TEST: []}
    without = {VALIDATION: 0, TEST: 0}
    for first, end, rows in _blocks(offsets):
        times = timestamps[rows]
        codes = np.where(times >= test, TEST, np.where(times >= start, VALIDATION, TRAIN))
        _take(codes, first, end, offsets, train_lengths, targets, without)
    facts = {"rule": TIME, "validation_start": start, "test_start": test}
    return _held_out(train_lengths, targets, without, facts)


def as_given(codes: np.ndarray, offsets: np.ndarray) -> tuple[HeldOut, dict[str, Any]]:
    """The split of the source: `codes` uint8 [n] (TRAIN, VALIDATION, TEST), rising within each user."""
    train_lengths = np.zeros(len(offsets) - 1, np.int64)
    targets: dict[int, list[np.ndarray]] = {VALIDATION: [], TEST: []}
    without = {VALIDATION: 0, TEST: 0}
    for first, end, rows in _blocks(offsets):
        _take(codes[rows], first, end, offsets, train_lengths, targets, without)
    return _held_out(train_lengths, targets, without, {"rule": GIVEN})


def describe(facts: Mapping[str, Any], offsets: np.ndarray, held_out: HeldOut | None) -> dict[str, Any]:
    """`facts` with the counts of rows that train, and of targets, and of users who have any."""
    lengths = np.diff(offsets)
    if held_out is None:
        users = int((lengths >= MIN_HELD_OUT).sum())
        return {
            **facts,
            "train": int(lengths.sum()) - 2 * users,
            "validation": users,
            "test": users,
            "validation_users": users,
            "test_users": users,
        }
    return {
        **facts,
        "train": int(held_out.train_lengths.sum()),
        "validation": len(held_out.validation_rows),
        "test": len(held_out.test_rows),
        "validation_users": _users_of(held_out.validation_rows, offsets),
        "test_users": _users_of(held_out.test_rows, offsets),
    }


def _users_of(rows: np.ndarray, offsets: np.ndarray) -> int:
    return len(np.unique(np.searchsorted(offsets, rows, "right")))


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int, slice]]:
    for first, end in user_blocks(offsets):
        yield first, end, slice(int(offsets[first]), int(offsets[end]))


def _take(
    codes: np.ndarray,
    first: int,
    end: int,
    offsets: np.ndarray,
    train_lengths: np.ndarray,
    targets: dict[int, list[np.ndarray]],
    without: dict[int, int],
) -> None:
    """Adds what the codes of users first..end-1 hold out."""
    start = int(offsets[first])
    user_of_row = np.repeat(np.arange(end - first), np.diff(offsets[first : end + 1]))
    train_lengths[first:end] = np.bincount(user_of_row[codes == TRAIN], minlength=end - first)
    has_history = np.ones(len(codes), bool)
    has_history[offsets[first:end] - start] = False
    for part, rows in targets.items():
        rows.append(start + np.flatnonzero((codes == part) & has_history))
        without[part] += int(((codes == part) & ~has_history).sum())


def _held_out(
    train_lengths: np.ndarray, targets: dict[int, list[np.ndarray]], without: dict[int, int], facts: dict[str, Any]
) -> tuple[HeldOut, dict[str, Any]]:
    validation, test = (np.concatenate(targets[part]).astype(np.int64) for part in (VALIDATION, TEST))
    if not train_lengths.any():
        raise UserError("the split leaves no interaction to train on; let validation start later")
    for name, rows in (("validation", validation), ("test", test)):
        if facts["rule"] == TIME and len(rows) == 0:
            raise UserError(f"--split time: no interaction with a history is left for {name}; let it start earlier")
    facts["without_history"] = {"validation": without[VALIDATION], "test": without[TEST]}
    return HeldOut(train_lengths, validation, test), facts


def _latest_with(timestamps: np.ndarray, count: int) -> int:
    """The latest time that at least `count` rows (and one) reach; found by bisection, chunk by chunk."""
    low = min(int(np.min(chunk)) for chunk in _chunks(timestamps))
    high = max(int(np.max(chunk)) for chunk in _chunks(timestamps))
    while low < high:  # the answer is within low..high
        middle = (low + high + 1) // 2
        reached = sum(int((chunk >= middle).sum()) for chunk in _chunks(timestamps))
        low, high = (middle, high) if reached >= max(count, 1) else (low, middle - 1)
    return low


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _CHUNK):
        yield array[start : start + _CHUNK]


def _iso(seconds: int) -> str:
    return str(np.datetime64(seconds, "s"))
