"""Third stage of `prepare`: the k-core, over rows that already stand user by user."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from efficientids.data.layout import user_blocks
from efficientids.data.preparation.encode import COLUMNS, ITEM, read_rows
from efficientids.data.preparation.progress import Progress


def k_core(
    items: Path, user_rows: np.ndarray, num_items: int, core: int, keep: Path, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Takes out users and items with fewer than `core` rows, again and again until none is left; 0 and 1 keep all.

    Args:
        items: raw file of item ranks, users one after another.
        user_rows: int64 [U], rows of each user in that file.
        num_items: ranks are below this.
        keep: the raw file to write, one byte a row: 1 stays, 0 goes.

    Returns:
        (user_rows int64 [U], item_rows int64 [num_items]): what is left of each.

    What is left does not depend on the order of removal. Only counts are held; the rows are passed over once a round.
    """
    offsets = np.concatenate([[0], np.cumsum(user_rows)])
    blocks = list(user_blocks(offsets))
    users_left, items_left = user_rows.copy(), np.zeros(num_items, np.int64)
    with keep.open("wb") as file:
        for first, end in blocks:
            block = read_rows(items, COLUMNS[ITEM], int(offsets[first]), int(offsets[end] - offsets[first]))
            items_left += np.bincount(block, minlength=num_items)
            np.ones(len(block), np.uint8).tofile(file)
    for round_ in range(1, int(offsets[-1]) + 2):
        weak_users, weak_items = (users_left > 0) & (users_left < core), (items_left > 0) & (items_left < core)
        if not weak_users.any() and not weak_items.any():
            break
        with keep.open("r+b") as file:
            for first, end in blocks:
                start, count = int(offsets[first]), int(offsets[end] - offsets[first])
                block = read_rows(items, COLUMNS[ITEM], start, count)
                user_of_row = np.repeat(np.arange(first, end), user_rows[first:end])
                stays = read_rows(keep, np.dtype(np.uint8), start, count)
                falls = (stays == 1) & (weak_users[user_of_row] | weak_items[block])
                if not falls.any():
                    continue
                users_left[first:end] -= np.bincount(user_of_row[falls] - first, minlength=end - first)
                items_left -= np.bincount(block[falls], minlength=num_items)
                stays[falls] = 0
                file.seek(start)
                stays.tofile(file)
                file.flush()  # read again through another handle in the next round
        progress.say(f"{core}-core: round {round_}, {int(users_left.sum()):,} rows left")
    return users_left, items_left
