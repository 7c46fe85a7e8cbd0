"""A few users' histories and recommendations by title, for people to look at."""

from __future__ import annotations

import numpy as np
from flax import nnx

from efficientids.data.batches import evaluation_batches
from efficientids.data.dataset import Dataset
from efficientids.recommenders.base import Histories, Recommender


def sample_recommendations(
    recommender: Recommender, model: nnx.Module, dataset: Dataset, *, users: int, max_items: int, k: int = 5
) -> str:
    """The last items of the test histories of `users` users, spread over the data set, and the k best next items."""
    able = np.flatnonzero(dataset.targets("test"))
    chosen = able[np.linspace(0, len(able) - 1, min(users, len(able))).astype(int)]
    titles = ["", *dataset.items["title"].to_list()] if "title" in dataset.items.columns else None
    names = dataset.items["item_id"].to_list()

    def name(item: int) -> str:
        title = titles[item] if titles else None
        return title or f"item {names[item - 1]}"

    lines: list[str] = []
    for batch in evaluation_batches(dataset, "test", len(chosen), max_items, users=chosen):
        ranked = recommender.recommend(model, Histories(batch.item_ids, batch.lengths), k, batch.seen)
        for row, user in enumerate(batch.users):
            history = batch.item_ids[row, : batch.lengths[row]][-4:]
            lines.append(f"user {dataset.users['user_id'][int(user)]} watched … " + " · ".join(map(name, history)))
            left = ranked.item_ids[row][ranked.item_ids[row] > 0]
            for place, item in enumerate(left, start=1):
                chose = "  ← chosen next" if item == batch.targets[row] else ""
                lines.append(f"    {place}. {name(int(item))}{chose}")
    return "\n".join(lines)
