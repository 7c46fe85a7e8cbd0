"""A prepared data set, opened: memory-mapped histories, the tables of items and users, the leave-one-out split.

Legend: U users, n interactions, N catalogue size, h the history of one user, oldest first.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from efficientids.data import layout
from efficientids.errors import UserError

Split = Literal["train", "validation", "test", "all"]

# How many of the newest interactions a split may not look at.
_HELD_BACK: Mapping[str, int] = {"train": 2, "validation": 2, "test": 1, "all": 0}

_COUNTS = ("num_users", "num_items", "catalogue_size", "num_interactions", "train_only_users")


class Dataset:
    """A data set folder, read only. Made by `Dataset.open`; the arrays are memory-mapped and never copied whole.

    Leave-one-out: h[-1] is the test target, h[-2] the validation target.

        split         history      target
        train         h[:-2]       none (each item of the history is the target of those before it)
        validation    h[:-2]       h[-2]
        test          h[:-1]       h[-1]
        all           h            none (to recommend what comes next)

    A user with fewer than 3 interactions has no target in any split and trains in full (every split gives the whole
    h); `train_only_users` counts them.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], fingerprint: str, arrays: Mapping[str, np.ndarray]):
        self.path = path
        self.manifest = manifest
        self.fingerprint = fingerprint  # sha256 of the manifest, which holds the sha256 of every file
        self.item_ids = arrays[layout.ITEM_IDS]
        self.timestamps = arrays[layout.TIMESTAMPS]
        self.offsets = arrays[layout.OFFSETS]
        self.lengths = np.diff(self.offsets)

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Opens and checks the folder `path`.

        Raises UserError naming file, field, value and remedy for: no such folder, no manifest or one of another format,
        missing files, wrong dtypes or shapes, offsets that do not rise to n, ids outside 1..N, an empty data set,
        counts that differ from the manifest, and files that changed since they were written (size, sha256).
        """
        path = Path(path)
        manifest, fingerprint = _read_manifest(path)
        if manifest["num_interactions"] == 0:  # before the arrays: an empty file cannot be memory-mapped
            raise UserError(f"{path}: the data set is empty (0 interactions); prepare it from a source that has some")
        for name in manifest["files"]:
            if not (path / name).is_file():
                raise UserError(f"{path / name}: missing, though {layout.MANIFEST} lists it. {_AGAIN}")
        arrays = {name: _map_array(path / name) for name in layout.DTYPES}
        num_items = layout.check_arrays(path, arrays, manifest["catalogue_size"])
        dataset = cls(path, manifest, fingerprint, arrays)
        counts = {
            "num_users": len(dataset.lengths),
            "num_items": num_items,
            "catalogue_size": len(dataset.items),
            "num_interactions": len(dataset.item_ids),
            "train_only_users": int((dataset.lengths < layout.MIN_HELD_OUT).sum()),
        }
        for field, found in counts.items():
            if manifest[field] != found:
                raise UserError(
                    f"{path / layout.MANIFEST}: {field} is {manifest[field]}, but the files hold {found}. {_AGAIN}"
                )
        layout.check_tables(path, dataset.items, dataset.users, len(dataset.lengths))
        _check_unchanged(path, manifest["files"])
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
        """Users with fewer than 3 interactions: they train and are never evaluated."""
        return int(self.manifest["train_only_users"])

    @functools.cached_property
    def items(self) -> pl.DataFrame:
        """One row an item, in the order of `item` (1..N): item, item_id, title, genres, …"""
        return _read_table(self.path / layout.ITEMS)

    @functools.cached_property
    def users(self) -> pl.DataFrame:
        """One row a user, in the order of `user` (0..U-1): user, user_id, …"""
        return _read_table(self.path / layout.USERS)

    def split_lengths(self, split: Split) -> np.ndarray:
        """Length of every user's history in `split`, int64 [U]. Raises UserError for an unknown split."""
        if split not in _HELD_BACK:
            raise UserError(f"split: {split!r} is none of {', '.join(get_args(Split))}")
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


_AGAIN = "Prepare the data set again with `python -m efficientids prepare`"


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    file = path / layout.MANIFEST
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder. Make a data set with `python -m efficientids prepare --output {path}`"
        )
    if not file.is_file():
        raise UserError(f"{path}: no prepared data set (no {layout.MANIFEST}). Give the --output folder of `prepare`")
    raw = file.read_bytes()
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}). {_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != layout.FORMAT:
        raise UserError(f"{file}: field format is not {layout.FORMAT!r}: the folder is no prepared data set")
    if manifest.get("format_version") != layout.FORMAT_VERSION:
        found = manifest.get("format_version")
        raise UserError(f"{file}: format_version is {found!r}, this program reads {layout.FORMAT_VERSION}. {_AGAIN}")
    for field in _COUNTS:
        value = manifest.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{file}: {field} is {value!r}, expected a count. {_AGAIN}")
    files = manifest.get("files")
    missing = [name for name in layout.REQUIRED_FILES if not isinstance(files, dict) or name not in files]
    if missing:
        raise UserError(f"{file}: field files does not list {', '.join(missing)}. {_AGAIN}")
    return manifest, hashlib.sha256(raw).hexdigest()


def _map_array(file: Path) -> np.ndarray:
    try:
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file}: not a readable .npy file ({error}). {_AGAIN}") from error
    # A plain view of the same memory: indexing np.memmap itself is several times slower.
    return np.asarray(mapped)


def _read_table(file: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}). {_AGAIN}") from error


def _check_unchanged(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, recorded in files.items():
        size = (path / name).stat().st_size
        if size != recorded["bytes"]:
            raise UserError(f"{path / name}: {size} bytes, {layout.MANIFEST} says {recorded['bytes']}. {_AGAIN}")
        if layout.sha256_of(path / name) != recorded["sha256"]:
            raise UserError(f"{path / name}: its sha256 is not the manifest's: it was changed or damaged. {_AGAIN}")
