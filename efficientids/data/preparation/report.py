"""What is in a data set, in numbers: printed by `prepare`, as text or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficientids.data.layout import LEAVE_ONE_OUT, MIN_HELD_OUT, Contents, without_target
from efficientids.data.preparation import measure, splits


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of users, items and interactions; lengths are interactions a user; shares and the density (of distinct
    pairs of user and item) are fractions.

    `num_users`, `num_items` (with an interaction), `catalogue_size` and `num_interactions` are the manifest's names of
    `users`, `items`, `catalogue` and `interactions`, and are written beside them.

    `timed`: there are times. `tied_share`: rows whose timestamp equals that of another row of the same user (their
    order is the tie-break's). `repeats`: rows whose user had the item before. `train_only_users` have no target in any
    split. `split`: its rule and the counts of rows that train, of targets, of users who have some. `dropped`: rows
    taken out, by filter. `bad_rows`: unreadable rows. `notes`: what the reader chose by itself, in words.
    `length_histogram`: (low, high, users), both ends included. `popularity`: (share of items, share of interactions),
    the most popular first, at most 101 points. `by_month`: (month such as "2000-12", interactions), if there are times.
    `item_table`: how many `items` it has and how many of the log's are `known` to it; None without one. By split:
    `cold_targets`, whose item no training row has; `misplaced_targets`, with a row later than themselves before them.
    """

    name: str
    source: str
    users: int
    items: int
    catalogue: int
    interactions: int
    length_min: int
    length_median: float
    length_mean: float
    length_max: int
    density: float
    timed: bool
    tied_share: float
    repeats: int
    train_only_users: int
    untitled_items: int
    catalogue_rule: str
    order: Mapping[str, str]
    filters: Mapping[str, Any]
    split: Mapping[str, Any]
    dropped: Mapping[str, int]
    bad_rows: Mapping[str, Any]
    notes: Sequence[str]
    length_histogram: Sequence[tuple[int, int, int]]
    popularity: Sequence[tuple[float, float]]
    by_month: Sequence[tuple[str, int]]
    item_table: Mapping[str, int] | None = None
    cold_targets: Mapping[str, int] = dataclasses.field(default_factory=dict)
    misplaced_targets: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        contents: Contents,
        dropped: Mapping[str, int] | None = None,
        bad_rows: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        item_table: Mapping[str, int] | None = None,
    ) -> DataReport:
        """Measures `contents`, block by block; what the reader and the filters did before is told by the others."""
        lengths = np.diff(contents.offsets)
        n = len(contents.item_ids)
        found, targets = measure.histories(contents), measure.targets(contents)
        untitled = len(contents.items)
        if "title" in contents.items.columns:
            untitled = contents.items["title"].replace("", None).null_count()
        return cls(
            name=contents.name,
            source=contents.source,
            users=len(lengths),
            items=int((found.item_rows > 0).sum()),
            catalogue=len(contents.items),
            interactions=n,
            length_min=int(lengths.min()),
            length_median=float(np.median(lengths)),
            length_mean=float(lengths.mean()),
            length_max=int(lengths.max()),
            density=(n - found.repeats) / (len(lengths) * len(contents.items)),
            timed=contents.timed,
            tied_share=found.tied / n,
            repeats=found.repeats,
            train_only_users=without_target(lengths, contents.held_out, contents.offsets),
            untitled_items=int(untitled),
            catalogue_rule=contents.catalogue,
            order=dict(contents.order),
            filters=dict(contents.filters),
            split=splits.describe(contents.split, contents.offsets, contents.held_out),
            dropped=dict(dropped or {}),
            bad_rows=dict(bad_rows or {"count": 0, "first": []}),
            notes=list(notes),
            length_histogram=measure.length_histogram(lengths),
            popularity=measure.popularity_curve(found.item_rows),
            by_month=found.by_month,
            item_table=item_table,
            cold_targets=targets.cold,
            misplaced_targets=targets.misplaced,
        )

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """What `to_json` wrote. Raises ValueError or TypeError for anything else."""
        values = json.loads(text)
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})

    def to_json(self) -> str:
        """All fields, as one JSON object; the counts under the manifest's names, too."""
        counts = {
            "num_users": self.users,
            "num_items": self.items,
            "catalogue_size": self.catalogue,
            "num_interactions": self.interactions,
        }
        return json.dumps({**dataclasses.asdict(self), **counts}, indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """The same for people: one line a fact."""
        lines = [
            f"Data set {self.name} ({self.source})",
            f"  users          {self.users:,}",
            f"  items          {self.items:,} with an interaction, {self.catalogue:,} in the catalogue "
            f"({_CATALOGUE[self.catalogue_rule]})",
            f"  interactions   {self.interactions:,} (density {self.density:.4%})",
            f"  a user's       min {self.length_min}, median {self.length_median:g}, mean {self.length_mean:.1f}, "
            f"max {self.length_max}",
            f"  order          {_facts(self.order)}",
        ]
        if self.timed:
            lines.append(
                f"  same time      {self.tied_share:.1%} of rows share their timestamp with another row of the user"
            )
        lines += [
            f"  repeats        {self.repeats:,} rows name an item that the user had before",
            f"  filters        {_facts(self.filters)}",
        ]
        lines += [f"  dropped        {rows:,} rows by {name}" for name, rows in self.dropped.items()]
        lines += self._split_lines()
        if self.item_table is not None:
            further = self.item_table["items"] - self.item_table["known"]
            lines.append(
                f"  item table     knows {self.item_table['known']:,} items of the log, and {further:,} others"
            )
        if self.item_table is not None and self.untitled_items:
            lines.append(f"  untitled       {self.untitled_items:,} items have no title")
        lines += [f"  note           {note}" for note in self.notes]
        if self.bad_rows["count"]:
            lines.append(f"  unreadable     {self.bad_rows['count']:,} rows were passed over, first:")
            lines += [f"    {row}" for row in self.bad_rows["first"]]
        return "\n".join(lines)

    def _split_lines(self) -> list[str]:
        split = self.split
        rule = str(split["rule"]).replace("_", "-")
        if "test_start" in split:
            validation, test = (np.datetime64(split[f"{part}_start"], "s") for part in ("validation", "test"))
            rule += f", validation from {validation}, test from {test}"
        lines = []
        if any(self.misplaced_targets.values()):
            lines.append(
                f"  WARNING        {_by_split(self.misplaced_targets)} targets come before a row of their own history: "
                "the split contradicts the times, and what is later is known in training"
            )
        lines += [
            f"  split          {rule}: {split['train']:,} rows train, {split['validation']:,} targets of "
            f"{split['validation_users']:,} users validate, {split['test']:,} of {split['test_users']:,} test"
        ]
        if split["rule"] == LEAVE_ONE_OUT and self.train_only_users:
            lines.append(
                f"  short users    {self.train_only_users:,} have fewer than {MIN_HELD_OUT} interactions: "
                "they train and are never evaluated"
            )
        elif self.train_only_users:
            lines.append(f"  no target      {self.train_only_users:,} users are never evaluated")
        if any(self.cold_targets.values()):
            lines.append(f"  cold targets   {_by_split(self.cold_targets)} targets are items that no training row has")
        without = split.get("without_history", {})
        if any(without.values()):
            lines.append(
                f"  no history     {without['validation']:,} rows of validation and {without['test']:,} of test come "
                "first of their user: they are no targets"
            )
        return lines


_CATALOGUE = {"interactions": "those with an interaction", "table": "the whole item table"}


def _by_split(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count:,} {split}" for split, count in counts.items())


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in facts.items() if value is not None) or "none"
