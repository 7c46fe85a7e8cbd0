"""What `prepare` was asked for: which bytes, which flags. The same request needs no second run."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientids.data import layout
from efficientids.data.dataset import Dataset
from efficientids.data.manifest import read_manifest
from efficientids.data.preparation.prepare import Recipe
from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.report import DataReport
from efficientids.data.preparation.workplace import workplace
from efficientids.data.sources.base import MAX_BAD_SHARE, Source
from efficientids.data.sources.options import SourceOptions
from efficientids.errors import UserError

_REVISION = 1  # to be raised when the same request gives other files, and when a default that it leaves out changes


def describe(
    source: Source, options: SourceOptions, recipe: Recipe, max_bad_share: float, progress: Progress
) -> dict[str, Any]:
    """The request as plain values for the manifest: files by name, size and sha256 (their folders are left out), flags,
    and the `fingerprint` of all of it. The salt goes into the fingerprint alone."""
    files = []
    for file in source.files:
        progress.say(f"looking at {file.name}")
        files.append({"name": file.name, "bytes": file.stat().st_size, "sha256": layout.sha256_of(file)})
    flags = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    if max_bad_share != MAX_BAD_SHARE:  # as all that is left at its default and does not depend on the source
        flags["max_bad_share"] = max_bad_share
    return _marked({"files": files, "source": source.kind, "flags": {**flags, **recipe.flags()}}, recipe.salt)


def describe_generated(seed: int) -> dict[str, Any]:
    """The request for generated data."""
    return _marked({"files": [], "source": "generated", "flags": {"seed": seed}}, None)


def prepared_already(output: Path, request: Mapping[str, Any]) -> DataReport | None:
    """The report of the data set in `output` where it answers this very request and is whole; else None.

    Raises UserError where only the report is missing or damaged.
    """
    if not (output / layout.MANIFEST).is_file():
        return None
    try:
        manifest, _ = read_manifest(output)
        if manifest.get("request", {}).get("fingerprint") != request["fingerprint"]:
            return None
        Dataset.open(output)
    except (UserError, OSError):  # not ours, or damaged: --overwrite is asked for
        return None
    file = output / layout.REPORT
    again = "the data set beside it is what is asked for; give --overwrite to prepare it again, with its report"
    try:
        return DataReport.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; {again}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not a readable report ({error!r}); {again}") from error


def page_again(output: Path, report: DataReport) -> bool:
    """Makes the report's page again where it is missing; tells whether it was. Raises UserError where it cannot be."""
    output = output.resolve()
    if (output / layout.PAGE).exists():
        return False
    from efficientids.data.preparation import report_page  # it loads a plotting library

    missing = {name: text for name, text in report_page.files(report).items() if not (output / name).exists()}
    if not missing:
        return False
    try:
        with workplace(output, "page") as place:
            for name, text in missing.items():
                (place.path / name).write_text(text, encoding="utf-8")
                os.replace(place.path / name, output / name)
    except OSError as error:
        raise UserError(f"{output / layout.PAGE}: missing, and cannot be written ({error})") from error
    return True


def _marked(request: dict[str, Any], salt: bytes | None) -> dict[str, Any]:
    text = json.dumps({"revision": _REVISION, "format": layout.FORMAT_VERSION, **request}, sort_keys=True)
    keyed = hashlib.sha256(text.encode()).digest() if salt is None else hmac.digest(salt, text.encode(), "sha256")
    return {**request, "fingerprint": keyed.hex()}
