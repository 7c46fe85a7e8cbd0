"""Writes a data set folder in one piece: either the whole new folder is there, or nothing has changed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from efficientids.data import layout
from efficientids.data.dataset import Dataset
from efficientids.data.preparation.workplace import check_destination, workplace
from efficientids.errors import UserError

Extra = Mapping[str, Mapping[str, np.ndarray]]


def write_dataset(
    path: str | Path,
    contents: layout.Contents,
    *,
    extra: Extra | None = None,
    beside: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Writes `contents` as the data set folder `path` and opens it.

    `extra` gives further files: name ending in .npz → arrays; `beside` texts that are no part of the data set (the
    report). The folder is made beside `path` and renamed into place; with `overwrite` the data set that was there is
    removed once the new one is whole. Raises UserError when the destination may not be written (`check_destination`) or
    the contents break a rule of `layout`.
    """
    path = Path(path).resolve()
    check_destination(path, overwrite)
    try:
        with workplace(path, f"{os.getpid()}-{uuid.uuid4().hex[:8]}") as place:
            new = place.folder(path.name)
            fill(new, contents, extra, beside)
            place.put(new, path, overwrite)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); nothing there was changed") from error
    return Dataset.open(path)


def fill(
    folder: Path, contents: layout.Contents, extra: Extra | None = None, beside: Mapping[str, str] | None = None
) -> None:
    """Writes every file into `folder` and opens it, which checks each rule of the format on what was really written.

    Arrays that lie in `folder` already (`contents` has them memory-mapped from there) are left as they are.
    """
    arrays = {
        layout.ITEM_IDS: contents.item_ids,
        layout.TIMESTAMPS: contents.timestamps,
        layout.OFFSETS: contents.offsets,
    }
    num_items = layout.check_arrays(folder, arrays, len(contents.items))
    if contents.held_out is not None:
        layout.check_held_out(folder, contents.held_out, contents.offsets)
        arrays |= contents.held_out.arrays()
    for name, array in arrays.items():
        if not (folder / name).exists():
            np.save(folder / name, array, allow_pickle=False)
    contents.items.write_parquet(folder / layout.ITEMS)
    contents.users.write_parquet(folder / layout.USERS)
    for name, members in (extra or {}).items():
        np.savez(folder / name, allow_pickle=False, **members)
    for name, text in (beside or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    lengths = np.diff(contents.offsets)
    manifest = {
        "format": layout.FORMAT,
        "format_version": layout.FORMAT_VERSION,
        "name": contents.name,
        "source": contents.source,
        "num_users": len(lengths),
        "num_items": num_items,
        "catalogue_size": len(contents.items),
        "num_interactions": len(contents.item_ids),
        "train_only_users": layout.without_target(lengths, contents.held_out, contents.offsets),
        "timestamps": contents.timed,
        "order": dict(contents.order),
        "split": dict(contents.split),
        "filters": dict(contents.filters),
        "catalogue": contents.catalogue,
        "request": dict(contents.request),
        "id_dtype": str(layout.DTYPES[layout.ITEM_IDS]),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": layout.sha256_of(folder / name)}
            for name in (layout.ITEMS, layout.USERS, *arrays, *(extra or {}))
        },
    }
    (folder / layout.MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    Dataset.open(folder)
