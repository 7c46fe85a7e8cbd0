"""A prepared data set, opened: memory-mapped histories, the tables of items and users, the split.

Legend: U users, n interactions, N catalogue size, h the history of one user, oldest first.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl

from efficientids.data import layout
from efficientids.data.manifest import AGAIN, check_unchanged, map_array, read_manifest, read_table
from efficientids.errors import UserError

Split = Literal["train", "validation", "test", "all"]

# How many of the newest interactions a split may not look at.
_HELD_BACK: Mapping[str, int] = {"train": 2, "validation": 2, "test": 1, "all": 0}


class Examples(NamedTuple):
    """What a split asks to predict, M examples in the order of users, then time.

    `users` int32 [M]; `lengths` int64 [M]: the history is the user's first `lengths` interactions; `targets` int32 [M],
    0 where there is none (split "all").
    """

    users: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray


class Dataset:
    """A data set folder, read only. Made by `Dataset.open`; the arrays are memory-mapped and never copied whole.

    Leave-one-out: h[-1] is the test target, h[-2] the validation target.

        split         history      target
        train         h[:-2]       none (each item of the history is the target of those before it)
        validation    h[:-2]       h[-2]
        test          h[:-1]       h[-1]
        all           h            none (to recommend what comes next)

    A user with fewer than 3 interactions has no target in any split and trains in full (every split gives the whole
    h); `train_only_users` counts them. A split by time, or one that came with the data, marks any rows as targets: a
    user may have several in a split, or none. `train_lengths` and `examples` are the same for all kinds of splits.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], fingerprint: str, arrays: Mapping[str, np.ndarray]):
        self.path = path
        self.manifest = manifest
        self.fingerprint = fingerprint  # sha256 of the manifest, which holds the sha256 of every file
        self.item_ids = arrays[layout.ITEM_IDS]
        self.timestamps = arrays[layout.TIMESTAMPS]
        self.offsets = arrays[layout.OFFSETS]
        self.lengths = np.diff(self.offsets)
        self.held_out: layout.HeldOut | None = None  # of a split other than leave-one-out
        if manifest["split"]["rule"] != layout.LEAVE_ONE_OUT:
            self.held_out = layout.HeldOut(*(arrays[name] for name in layout.SPLIT_FILES))

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Opens and checks the folder `path`.

        Raises UserError naming file, field, value and remedy for: no such folder, no manifest or one of another format,
        missing files, wrong dtypes or shapes, offsets that do not rise to n, ids outside 1..N, an empty data set,
        counts that differ from the manifest, and files that changed since they were written (size, sha256).
        """
        path = Path(path)
        manifest, fingerprint = read_manifest(path)
        if manifest["num_interactions"] == 0:  # before the arrays: an empty file cannot be memory-mapped
            raise UserError(f"{path}: the data set is empty (0 interactions); prepare it from a source that has some")
        for name in manifest["files"]:
            if not (path / name).is_file():
                raise UserError(f"{path / name}: missing, though {layout.MANIFEST} lists it. {AGAIN}")
        split_files = () if manifest["split"]["rule"] == layout.LEAVE_ONE_OUT else layout.SPLIT_FILES
        arrays = {name: map_array(path / name) for name in (*layout.DTYPES, *split_files)}
        num_items = layout.check_arrays(path, arrays, manifest["catalogue_size"])
        dataset = cls(path, manifest, fingerprint, arrays)
        if dataset.held_out is not None:
            layout.check_held_out(path, dataset.held_out, dataset.offsets)
        counts = {
            "num_users": len(dataset.lengths),
            "num_items": num_items,
            "catalogue_size": len(dataset.items),
            "num_interactions": len(dataset.item_ids),
            "train_only_users": layout.without_target(dataset.lengths, dataset.held_out, dataset.offsets),
        }
        for field, found in counts.items():
            if manifest[field] != found:
                raise UserError(
                    f"{path / layout.MANIFEST}: {field} is {manifest[field]}, but the files hold {found}. {AGAIN}"
                )
        layout.check_tables(path, dataset.items, dataset.users, len(dataset.lengths))
        check_unchanged(path, manifest["files"])
        return dataset

    @property
    def num_users(self) -> int:
        return int(self.manifest["num_users"])

    @property
    def num_items(self) -> int:
        """Items with at least one interaction."""
        return int(self.manifest["num_items"])

    @property
    def catalogue_size(self) -> int:
        """N: items are 1..N. What a model's item table is sized by (N + 1 rows with the padding)."""
        return int(self.manifest["catalogue_size"])

    @property
    def num_interactions(self) -> int:
        return int(self.manifest["num_interactions"])

    @property
    def train_only_users(self) -> int:
        """Users without a target in any split (leave-one-out: of fewer than 3 interactions): never evaluated."""
        return int(self.manifest["train_only_users"])

    @property
    def timed(self) -> bool:
        """Whether the interactions have times; otherwise `timestamps` is all 0."""
        return bool(self.manifest["timestamps"])

    @functools.cached_property
    def items(self) -> pl.DataFrame:
        """One row an item, in the order of `item` (1..N): item, item_id, title, genres, …"""
        return read_table(self.path / layout.ITEMS)

    @functools.cached_property
    def items_sha256(self) -> str:
        """Which item each index stands for: the sha256 of the external ids in order, a line each."""
        return hashlib.sha256("\n".join(self.items["item_id"].to_list()).encode()).hexdigest()

    @functools.cached_property
    def users(self) -> pl.DataFrame:
        """One row a user, in the order of `user` (0..U-1): user, user_id, …"""
        return read_table(self.path / layout.USERS)

    @functools.cached_property
    def train_lengths(self) -> np.ndarray:
        """How many of each user's first interactions train, int64 [U]; 0 where a user begins after the train part."""
        if self.held_out is not None:
            return self.held_out.train_lengths
        return self.split_lengths("train")

    def training_histories(self) -> tuple[np.ndarray, np.ndarray]:
        """All users' training items, flat int32 [E], and where each user's begin, int64 [U + 1]; nothing held out."""
        place = np.arange(len(self.item_ids)) - np.repeat(self.offsets[:-1], self.lengths)
        items = self.item_ids[place < np.repeat(self.train_lengths, self.lengths)]
        return items, np.concatenate([[0], np.cumsum(self.train_lengths)])

    def examples(self, split: Split) -> Examples:
        """What `split` ("validation", "test", "all") asks to predict; "all": every user's whole history, target 0.

        Leave-one-out gives one example to every user who has 3 interactions or more. Raises UserError for "train" and
        for an unknown split.
        """
        users = np.arange(self.num_users, dtype=np.int32)
        if split == "all":
            return Examples(users, self.lengths, np.zeros(self.num_users, np.int32))
        if split not in ("validation", "test"):
            raise UserError(f"split: {split!r} has no examples; give validation, test or all")
        if self.held_out is None:
            users = users[self.lengths >= layout.MIN_HELD_OUT]
            lengths = self.split_lengths(split)[users]
            return Examples(users, lengths, self.item_ids[self.offsets[users] + lengths])
        rows = self.held_out.validation_rows if split == "validation" else self.held_out.test_rows
        users = (np.searchsorted(self.offsets, rows, "right") - 1).astype(np.int32)
        return Examples(users, rows - self.offsets[users], self.item_ids[rows])

    def split_lengths(self, split: Split) -> np.ndarray:
        """Length of every user's history in `split`, int64 [U].

        Raises UserError for an unknown split, and for one of which a user may have several examples.
        """
        if split not in _HELD_BACK:
            raise UserError(f"split: {split!r} is none of {', '.join(get_args(Split))}")
        if self.held_out is not None and split in ("validation", "test"):
            raise UserError(f"{self.path}: a user may have several examples in {split}; `examples` gives them all")
        if self.held_out is not None:
            return self.held_out.train_lengths if split == "train" else self.lengths
        return np.where(self.lengths >= layout.MIN_HELD_OUT, self.lengths - _HELD_BACK[split], self.lengths)

    def history(self, user: int, split: Split) -> np.ndarray:
        """Items of one user's history in `split`, oldest first, int32 [h]; a view of the file."""
        return self.item_ids[self._rows(user, split)]

    def history_times(self, user: int, split: Split) -> np.ndarray:
        """Seconds since 1970 of each item of `history`, int64 [h]; a view of the file."""
        return self.timestamps[self._rows(user, split)]

    def targets(self, split: Split) -> np.ndarray:
        """The held-out item of every user, int32 [U]; 0 where there is none (short users, `train` and `all`)."""
        starts, lengths = self.offsets[:-1], self.split_lengths(split)
        targets = np.zeros(self.num_users, np.int32)
        if split in ("validation", "test"):
            held = self.lengths >= layout.MIN_HELD_OUT
            targets[held] = self.item_ids[(starts + lengths)[held]]
        return targets

    def _rows(self, user: int, split: Split) -> slice:
        if not 0 <= user < self.num_users:
            raise UserError(f"user: {user} is outside 0..{self.num_users - 1} of {self.path}")
        start = int(self.offsets[user])
        return slice(start, start + int(self.split_lengths(split)[user]))
