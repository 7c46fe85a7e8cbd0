"""An interaction log → the contents of a data set: filters, order, id maps.

The order is part of the evaluation protocol (half of MovieLens 1M's rows share their timestamp with another row of the
same user), so the tie-break is fixed, kept in the manifest and printed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from efficientids.data.layout import Contents
from efficientids.data.log import InteractionLog, describe_bad_rows
from efficientids.data.report import DataReport
from efficientids.errors import UserError

Order = Literal["time", "file"]

_INTEGER = r"^-?\d{1,18}$"  # fits int64


def prepare_log(
    log: InteractionLog, *, core: int, min_rating: float | None, order: Order
) -> tuple[Contents, DataReport]:
    """Filters by rating, then to the k-core, orders each user's rows and numbers users (0..) and items (1..).

    `core`: every user and item keeps at least so many rows; 0 for no filter. `min_rating`: rows below are dropped.
    `order`: "time" sorts by (timestamp, external item id), "file" keeps the rows as they stood. Users and items are
    numbered by external id: numerically where all are integers, else by their UTF-8 bytes. The catalogue is the items
    that are left. Raises UserError for values out of range and when no row is left.
    """
    if core < 0:
        raise UserError(
            f"core: {core} is negative; give 0 for no filter, or the least number of rows a user and item has"
        )
    rows, dropped = log.interactions, {}
    if min_rating is not None:
        kept = rows.filter(pl.col("rating") >= min_rating)
        dropped["min_rating"] = len(rows) - len(kept)
        rows = kept
    if core > 1:
        kept = k_core(rows, core)
        dropped["core"] = len(rows) - len(kept)
        rows = kept
    if rows.is_empty():
        taken = ", ".join(f"{name} {count:,}" for name, count in dropped.items()) or "none"
        raise UserError(
            f"{log.name}: no interaction is left of {len(log.interactions):,} (dropped: {taken}); "
            "lower core or min_rating"
        )
    users, _ = ordered_ids(rows["user_id"])
    items, item_order = ordered_ids(rows["item_id"])
    user_map = pl.DataFrame({"user": np.arange(len(users), dtype=np.int32), "user_id": users})
    item_map = pl.DataFrame({"item": np.arange(1, len(items) + 1, dtype=np.int32), "item_id": items})
    rows = rows.join(user_map, on="user_id", how="left", maintain_order="left")
    rows = rows.join(item_map, on="item_id", how="left", maintain_order="left")
    # Items are numbered by external id, so sorting by number breaks ties by external id.
    rows = rows.sort(["user", "timestamp", "item"] if order == "time" else ["user"], maintain_order=True)
    lengths = np.bincount(rows["user"].to_numpy(), minlength=len(users))
    contents = Contents(
        name=log.name,
        source=log.source,
        items=item_map.join(log.items, on="item_id", how="left", maintain_order="left"),
        users=user_map if log.users is None else user_map.join(log.users, "user_id", "left", maintain_order="left"),
        item_ids=rows["item"].to_numpy(),
        timestamps=rows["timestamp"].to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        order=_describe_order(order, item_order),
        filters={"min_rating": min_rating, "core": core if core > 1 else None},
    )
    return contents, DataReport.of(contents, dropped, describe_bad_rows(log.bad_rows))


def k_core(rows: pl.DataFrame, core: int) -> pl.DataFrame:
    """The rows left when users and items with fewer than `core` rows are taken out until none is. Order is kept."""
    while True:
        kept = rows.filter((pl.len().over("user_id") >= core) & (pl.len().over("item_id") >= core))
        if len(kept) == len(rows):
            return rows
        rows = kept


def ordered_ids(ids: pl.Series) -> tuple[pl.Series, str]:
    """The distinct ids of a string column in their order, and that order's name: "numeric" or "lexicographic"."""
    distinct = pl.DataFrame({"id": ids.unique()})
    if distinct["id"].str.contains(_INTEGER).all():
        # The text decides between "7" and "07".
        return distinct.sort(pl.col("id").cast(pl.Int64), "id")["id"], "numeric"
    return distinct.sort("id")["id"], "lexicographic"


def _describe_order(order: Order, item_order: str) -> dict[str, str]:
    if order == "file":
        return {"rule": "file", "tie_break": "none: rows as they stood in the file"}
    return {"rule": "time", "tie_break": f"external item id, {item_order}"}
