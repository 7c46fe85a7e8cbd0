"""What is in a data set, in numbers: printed by `prepare`, as text or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from efficientids.data.layout import MIN_HELD_OUT, Contents


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of users, items and interactions; lengths are interactions a user; density and shares are fractions.

    `tied_share`: rows whose timestamp equals that of another row of the same user (their order is the tie-break's).
    `repeats`: rows whose user had the item before. `dropped`: rows taken out, by filter. `bad_rows`: unreadable rows.
    """

    name: str
    users: int
    items: int
    catalogue: int
    interactions: int
    length_min: int
    length_median: float
    length_mean: float
    length_max: int
    density: float
    tied_share: float
    repeats: int
    train_only_users: int
    untitled_items: int
    order: Mapping[str, str]
    filters: Mapping[str, Any]
    dropped: Mapping[str, int]
    bad_rows: Mapping[str, Any]

    @classmethod
    def of(
        cls, contents: Contents, dropped: Mapping[str, int] | None = None, bad_rows: Mapping[str, Any] | None = None
    ) -> DataReport:
        """Measures `contents`; what the reader and the filters took out before is told by the other two."""
        lengths = np.diff(contents.offsets)
        n = len(contents.item_ids)
        rows = pl.DataFrame(
            {
                "user": np.repeat(np.arange(len(lengths)), lengths),
                "item": contents.item_ids,
                "timestamp": contents.timestamps,
            }
        )
        num_items = rows["item"].n_unique()
        untitled = contents.items["title"].null_count() if "title" in contents.items.columns else len(contents.items)
        return cls(
            name=contents.name,
            users=len(lengths),
            items=num_items,
            catalogue=len(contents.items),
            interactions=n,
            length_min=int(lengths.min()),
            length_median=float(np.median(lengths)),
            length_mean=float(lengths.mean()),
            length_max=int(lengths.max()),
            density=n / (len(lengths) * len(contents.items)),
            tied_share=float(rows.select(pl.struct("user", "timestamp").is_duplicated().mean()).item()),
            repeats=n - rows.select(pl.struct("user", "item").n_unique()).item(),
            train_only_users=int((lengths < MIN_HELD_OUT).sum()),
            untitled_items=int(untitled),
            order=dict(contents.order),
            filters=dict(contents.filters),
            dropped=dict(dropped or {}),
            bad_rows=dict(bad_rows or {"count": 0, "first": []}),
        )

    def to_json(self) -> str:
        """All fields, as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """The same for people: one line a fact."""
        order, filters = (
            ", ".join(f"{key.replace('_', '-')} {value}" for key, value in facts.items() if value is not None) or "none"
            for facts in (self.order, self.filters)
        )
        lines = [
            f"Data set {self.name}",
            f"  users          {self.users:,}",
            f"  items          {self.items:,} with an interaction, {self.catalogue:,} in the catalogue",
            f"  interactions   {self.interactions:,} (density {self.density:.4%})",
            f"  a user's       min {self.length_min}, median {self.length_median:g}, mean {self.length_mean:.1f}, "
            f"max {self.length_max}",
            f"  order          {order}",
            f"  same time      {self.tied_share:.1%} of rows share their timestamp with another row of the user",
            f"  repeats        {self.repeats:,} rows name an item that the user had before",
            f"  filters        {filters}",
        ]
        lines += [f"  dropped        {rows:,} rows by {name}" for name, rows in self.dropped.items()]
        if self.untitled_items:
            lines.append(f"  untitled       {self.untitled_items:,} items have no title")
        if self.train_only_users:
            lines.append(
                f"  short users    {self.train_only_users:,} have fewer than {MIN_HELD_OUT} interactions: "
                "they train and are never evaluated"
            )
        if self.bad_rows["count"]:
            lines.append(f"  unreadable     {self.bad_rows['count']:,} rows were passed over, first:")
            lines += [f"    {row}" for row in self.bad_rows["first"]]
        return "\n".join(lines)
