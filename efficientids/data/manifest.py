"""Reads a data set folder's manifest and files, and says what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from efficientids.data import layout
from efficientids.errors import UserError

_COUNTS = ("num_users", "num_items", "catalogue_size", "num_interactions", "train_only_users")
_RULES = (layout.LEAVE_ONE_OUT, layout.TIME, layout.GIVEN)
AGAIN = "Prepare the data set again with `python -m efficientids prepare`"


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The checked manifest of the folder `path` and its sha256. A version 1 manifest gets the fields of version 2.

    Raises UserError naming the field and the value for a missing folder or manifest, another format, counts that are
    none, an unknown split rule and files that are not listed.
    """
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
        raise UserError(f"{file}: not JSON ({error}). {AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != layout.FORMAT:
        raise UserError(f"{file}: field format is not {layout.FORMAT!r}: the folder is no prepared data set")
    _check_form(file, manifest)
    for field in _COUNTS:
        value = manifest.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{file}: {field} is {value!r}, expected a count. {AGAIN}")
    files = manifest.get("files")
    needed = (
        *layout.REQUIRED_FILES,
        *(() if manifest["split"]["rule"] == layout.LEAVE_ONE_OUT else layout.SPLIT_FILES),
    )
    missing = [name for name in needed if not isinstance(files, dict) or name not in files]
    if missing:
        raise UserError(f"{file}: field files does not list {', '.join(missing)}. {AGAIN}")
    return manifest, hashlib.sha256(raw).hexdigest()


def _check_form(file: Path, manifest: dict[str, Any]) -> None:
    """Checks version, split and timestamps, and fills in what version 1 has no field for."""
    version = manifest.get("format_version")
    if version not in layout.READABLE_VERSIONS:
        known = " and ".join(map(str, layout.READABLE_VERSIONS))
        raise UserError(f"{file}: format_version is {version!r}, this program reads {known}. {AGAIN}")
    if version == 1:
        manifest |= {"split": {"rule": layout.LEAVE_ONE_OUT}, "timestamps": True}
    split = manifest.get("split")
    rule = split.get("rule") if isinstance(split, dict) else None
    if rule not in _RULES:
        raise UserError(f"{file}: split has the rule {rule!r}, none of {', '.join(_RULES)}. {AGAIN}")
    if not isinstance(manifest.get("timestamps"), bool):
        raise UserError(f"{file}: timestamps is {manifest.get('timestamps')!r}, expected true or false. {AGAIN}")


def map_array(file: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped, read only. Raises UserError where it is not readable."""
    try:
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file}: not a readable .npy file ({error}). {AGAIN}") from error
    # A plain view of the same memory: indexing np.memmap itself is several times slower.
    return np.asarray(mapped)


def read_table(file: Path) -> pl.DataFrame:
    """The whole of a parquet file. Raises UserError where it is not readable."""
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}). {AGAIN}") from error


def check_unchanged(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError for the first of `files` (name → bytes, sha256) under `path` that is not as it was written."""
    for name, recorded in files.items():
        size = (path / name).stat().st_size
        if size != recorded["bytes"]:
            raise UserError(f"{path / name}: {size} bytes, {layout.MANIFEST} says {recorded['bytes']}. {AGAIN}")
        if layout.sha256_of(path / name) != recorded["sha256"]:
            raise UserError(f"{path / name}: its sha256 is not the manifest's: it was changed or damaged. {AGAIN}")
