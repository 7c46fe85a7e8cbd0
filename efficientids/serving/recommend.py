"""Recommendations for many users at once, under their external names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from flax import nnx

from efficientids.data.batches import evaluation_batches
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.recommenders.base import Histories, Recommender


def chosen_users(dataset: Dataset, users: str) -> np.ndarray:
    """User indices for `all`, or for a file of external ids, one a line, in the file's order.

    Raises:
        UserError: no such file, an empty one, an id that the data set does not know (the first ones are shown), or one
            that is named twice.
    """
    if users == "all":
        return np.arange(dataset.num_users)
    file = Path(users)
    try:
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--users {users}: expected `all` or a file with one user id a line ({error})") from error
    if not names:
        raise UserError(f"--users {users}: the file names no user")
    index = {name: row for row, name in enumerate(dataset.users["user_id"].to_list())}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise UserError(
            f"--users {users}: {len(unknown)} ids are not in {dataset.path}, first {', '.join(unknown[:3])}; "
            "ids are those of the source that was prepared"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--users {users}: {twice} stands there more than once")
    return np.array([index[name] for name in names])


def recommend_users(
    recommender: Recommender,
    model: nnx.Module,
    dataset: Dataset,
    users: np.ndarray,
    *,
    k: int,
    keep_seen: bool,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """The k best next items of each user after the whole history.

    Returns:
        Columns user_id (str), rank (int32, from 1), item_id (str), title (str, where there are titles), score
        (float32: higher is better; a log-probability for models that are trained, counted scores for item_knn and
        popularity); users in the order given. A user who has seen nearly everything gets fewer rows.
    """
    names = dataset.users["user_id"].to_numpy()
    frames: list[pl.DataFrame] = []
    done = 0
    for batch in evaluation_batches(dataset, "all", batch_size, recommender.max_items, users=users):
        exclude = None if keep_seen else batch.seen
        ranked = recommender.recommend(model, Histories(batch.item_ids, batch.lengths, batch.padding), k, exclude)
        real = (batch.users >= 0)[:, None] & (ranked.item_ids > 0)
        row, column = np.nonzero(real)
        frames.append(
            pl.DataFrame(
                {
                    "user_id": names[batch.users[row]],
                    "rank": (column + 1).astype(np.int32),
                    "item": ranked.item_ids[real].astype(np.int32),
                    "score": ranked.scores[real].astype(np.float32),
                },
                schema_overrides={"user_id": pl.String},
            )
        )
        done += int((batch.users >= 0).sum())
        if progress is not None:
            progress(done, len(users))
    items = dataset.items.select([c for c in ("item", "item_id", "title") if c in dataset.items.columns])
    joined = pl.concat(frames).join(items, on="item", how="left", maintain_order="left")
    return joined.select([c for c in ("user_id", "rank", "item_id", "title", "score") if c in joined.columns])
