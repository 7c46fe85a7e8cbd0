"""A few users' histories and recommendations by title, for people to look at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flax import nnx

from efficientids.data.batches import evaluation_batches
from efficientids.data.dataset import Dataset
from efficientids.recommenders.base import Histories, Recommender


def sample_recommendations(
    recommender: Recommender, model: nnx.Module, dataset: Dataset, *, users: int, k: int = 5
) -> str:
    """The newest items of the test histories of `users` users, spread over the data set, and the k best next items.

    Of a user with several test examples, the first.
    """
    able = np.unique(dataset.examples("test").users)
    chosen = able[np.unique(np.linspace(0, len(able) - 1, min(users, len(able))).astype(int))]
    name = item_name(dataset)
    lines: list[str] = []
    shown: set[int] = set()
    for batch in evaluation_batches(dataset, "test", len(chosen), recommender.max_items, users=chosen):
        ranked = recommender.recommend(model, Histories(batch.item_ids, batch.lengths, batch.padding), k, batch.seen)
        for row, user in enumerate(batch.users.tolist()):
            if user < 0 or user in shown:
                continue
            shown.add(user)
            newest = batch.seen[row, : batch.history_lengths[row]][-4:]
            lines.append(f"user {dataset.users['user_id'][user]} chose … " + " · ".join(map(name, newest)))
            left = ranked.item_ids[row][ranked.item_ids[row] > 0]
            for place, item in enumerate(left, start=1):
                chose = "  ← chosen next" if item == batch.targets[row] else ""
                lines.append(f"    {place}. {name(int(item))}{chose}")
    return "\n".join(lines)


def item_name(dataset: Dataset) -> Callable[[int], str]:
    """Item index (1..N) → its title, or where there is none its external id."""
    titles = dataset.items["title"].to_list() if "title" in dataset.items.columns else None
    names = dataset.items["item_id"].to_list()

    def name(item: int) -> str:
        title = titles[item - 1] if titles else None
        return title or f"item {names[item - 1]}"

    return name
