"""Which files of a folder are the log, which of them is the item table, and what the data set is called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from efficientids.data.sources.tables import FORMATS, PARQUET, format_of
from efficientids.data.sources.typed import SPLITS
from efficientids.errors import UserError

_ITEM_TABLES = ("items", "item_titles", "item_table", "item_meta", "products")
_NOT_A_LOG = re.compile(r"^(\.|meta_|readme|provenance|users?\.|item_ids?\b)|\.(item|index|user|kg|link)(\.|$)", re.I)
_GENERAL_NAMES = ("sequences", "ratings", "interactions", "inter", "data", "log", "events", "clicks", "reviews")


@dataclasses.dataclass(frozen=True)
class LogFile:
    """A file of the log; `split` where its name (or its folder's, train/x.csv) says one."""

    path: Path
    split: int | None = None


def log_files(inputs: Sequence[Path], formats: Sequence[str] = FORMATS, *, needs_train: bool = True) -> list[LogFile]:
    """The log's files: those given, or those that a folder holds for it.

    Of a folder: files named train, valid and test, in it or in folders of these names; else its one file of a fitting
    format; else all its Parquet files. Files of one split stand behind each other, train first. Raises UserError when a
    path is missing, a folder's log is not clear, or some names tell a split and others do not.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; check --input")
    if len(inputs) != 1 and (folder := next((path for path in inputs if path.is_dir()), None)):
        raise UserError(f"{folder}: a folder among several --input; give one folder, or files")
    chosen = list(inputs) if not inputs[0].is_dir() else _of_folder(inputs[0], formats)
    files = [LogFile(path, split_of(path)) for path in chosen]
    splits = {file.split for file in files}
    if len(files) == 1 or splits == {None}:
        return [LogFile(file.path) for file in files]
    if None in splits:
        names = ", ".join(file.path.name for file in files)
        raise UserError(f"{names}: some names say train, valid or test and others do not; rename them or name fewer")
    if len(splits) == 1:
        return [LogFile(file.path) for file in files]
    if needs_train and SPLITS["train"] not in splits:
        raise UserError(f"{files[0].path}: no train file beside it; give it as --input too")
    return sorted(files, key=lambda file: file.split or 0)


def split_of(path: Path) -> int | None:
    """The split that a file's name says, else its folder's; None for none. "x.train.inter", "val.csv", "test/x.csv"."""
    found = {SPLITS[word] for word in re.split(r"[._\-]", path.name.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else SPLITS.get(path.parent.name.lower())


def _of_folder(folder: Path, formats: Sequence[str]) -> list[Path]:
    children = [child for child in _entries(folder) if child.is_dir() and child.name.lower() in SPLITS]
    entries = [*_entries(folder), *(entry for child in children for entry in _entries(child))]
    found = [path for path in entries if path.is_file() and _may_be_log(path, formats)]
    split = [path for path in found if split_of(path) is not None]
    if len({split_of(path) for path in split}) > 1:
        return split
    if len(found) == 1 or (found and all(format_of(path) in PARQUET for path in found)):
        return found
    held = ", ".join(path.name for path in (found or _entries(folder))[:8]) or "nothing"
    what = "may be the log" if found else f"is a log ({', '.join(formats)})"
    several = "several files" if found else "no file"
    raise UserError(f"{folder}: {several} {what} (it holds {held}); name the file with --input")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _may_be_log(path: Path, formats: Sequence[str]) -> bool:
    if format_of(path) not in formats or _NOT_A_LOG.search(path.name):
        return False
    return _stem(path) not in _ITEM_TABLES


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def data_set_name(files: Sequence[LogFile]) -> str:
    """From the file's name, or from its folder's where that is a general one such as sequences or train."""
    path = files[0].path
    words = [word for word in re.split(r"[._\-]", _stem(path)) if word.lower() not in SPLITS]
    if not words or all(word.lower() in _GENERAL_NAMES for word in words):
        folder = path.resolve().parent
        return folder.parent.name if folder.name.lower() in SPLITS else folder.name
    return "-".join(words) if split_of(Path(path.name)) is not None else _stem(path)


def find_item_table(files: Sequence[LogFile]) -> Path | None:
    """The item table that lies beside the log under a usual name: items.csv, item_titles.tsv, X.item.json beside X.txt,
    or the only *.item.json. Raises UserError where several do."""
    stem = _stem(files[0].path)
    folder = files[0].path.parent
    folders = [folder] if folder.name.lower() not in SPLITS else [folder, folder.parent]
    entries = [path for place in folders for path in _entries(place) if path.is_file()]
    usual = [path for path in entries if _stem(path) in _ITEM_TABLES and format_of(path) in FORMATS]
    named = [path for path in entries if path.name.removesuffix(".gz").endswith(".item.json")]
    named = [path for path in named if _stem(path) == stem] or named
    found = usual + named
    if len(found) > 1:
        raise UserError(f"{folder}: {', '.join(path.name for path in found)} may each be the item table; give --items")
    return found[0] if found else None
