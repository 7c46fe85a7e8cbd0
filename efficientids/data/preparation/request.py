"""What `prepare` was asked for: which bytes, which flags. The same request needs no second run."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientids.data import layout
from efficientids.data.dataset import Dataset
from efficientids.data.manifest import read_manifest
from efficientids.data.preparation.prepare import Recipe
from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.report import DataReport
from efficientids.data.sources.base import Source
from efficientids.data.sources.options import SourceOptions
from efficientids.errors import UserError

_REVISION = 1  # to be raised when the same request gives other files


def describe(source: Source, options: SourceOptions, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """The request as plain values for the manifest: files by name, size and sha256 (their folders are left out), flags,
    and the `fingerprint` of all of it. The salt goes into the fingerprint alone."""
    files = []
    for file in source.files:
        progress.say(f"looking at {file.name}")
        files.append({"name": file.name, "bytes": file.stat().st_size, "sha256": layout.sha256_of(file)})
    flags = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    return _marked({"files": files, "source": source.kind, "flags": {**flags, **recipe.flags()}}, recipe.salt)


def describe_generated(seed: int) -> dict[str, Any]:
    """The request for generated data."""
    return _marked({"files": [], "source": "generated", "flags": {"seed": seed}}, None)


def prepared_already(output: Path, request: Mapping[str, Any]) -> DataReport | None:
    """The report of the data set in `output` where it answers this very request and is whole; else None."""
    if not (output / layout.MANIFEST).is_file():
        return None
    try:
        manifest, _ = read_manifest(output)
        if manifest.get("request", {}).get("fingerprint") != request["fingerprint"]:
            return None
        Dataset.open(output)
        return DataReport.from_json((output / layout.REPORT).read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError, TypeError, KeyError):  # not ours, or damaged: --overwrite is asked for
        return None


def _marked(request: dict[str, Any], salt: bytes | None) -> dict[str, Any]:
    text = json.dumps({"revision": _REVISION, "format": layout.FORMAT_VERSION, **request}, sort_keys=True)
    keyed = hashlib.sha256(text.encode()).digest() if salt is None else hmac.digest(salt, text.encode(), "sha256")
    return {**request, "fingerprint": keyed.hex()}
