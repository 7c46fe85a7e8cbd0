"""The one door to all sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from efficientids.data.sources.amazon import open_amazon
from efficientids.data.sources.base import Source
from efficientids.data.sources.movielens import open_movielens
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.pixelrec import open_pixelrec
from efficientids.data.sources.recbole import open_recbole
from efficientids.data.sources.sequences import open_sequences
from efficientids.data.sources.table import open_table_source
from efficientids.errors import UserError

Open = Callable[[Sequence[Path], Path | None, SourceOptions], Source]

_ITEM_TABLE = frozenset(("item_id_column", "title_column", "text_columns", "item_id_offset"))
_LOG = frozenset(("user_column", "item_column", "time_column", "rating_column"))
_TEXT_TABLE = frozenset(("separator", "header", "split_column", "history_column"))


def _movielens(inputs: Sequence[Path], items: Path | None, options: SourceOptions) -> Source:
    if items is not None:
        raise UserError("--items has no meaning with --source movielens: movies.dat or movies.csv is the item table")
    if len(inputs) != 1:
        raise UserError("--input: --source movielens reads one folder")
    return open_movielens(inputs[0])


_SOURCES: Mapping[str, tuple[Open, frozenset[str]]] = {
    "amazon": (open_amazon, _ITEM_TABLE),
    "movielens": (_movielens, frozenset()),
    "pixelrec": (open_pixelrec, _ITEM_TABLE),
    "recbole": (open_recbole, _ITEM_TABLE | _LOG | {"history_column"}),
    "sequences": (open_sequences, _ITEM_TABLE | {"user_column", "sequence_column"}),
    "table": (open_table_source, _ITEM_TABLE | _LOG | _TEXT_TABLE),
}
KINDS = tuple(_SOURCES)


def open_source(kind: str, inputs: Sequence[Path], items: Path | None, options: SourceOptions) -> Source:
    """Looks at the files of a source, and reads only as much as it needs to know their form.

    Args:
        kind: one of `KINDS`.
        inputs: files, or one folder.
        items: the item table; None: the one that lies beside the log under a usual name, if any.
        options: what is known of columns and forms.

    Raises:
        UserError: a file is missing, empty or of another form, a column cannot be found, or an option has no meaning
            for this kind.
    """
    if kind not in _SOURCES:
        raise UserError(f"--source {kind}: none of {', '.join(KINDS)}")
    if not inputs:
        raise UserError(f"--input is missing: give the files or the folder that --source {kind} reads")
    opening, meant = _SOURCES[kind]
    for name in options.given():
        if name not in meant:
            raise UserError(f"--{name} has no meaning with --source {kind}; leave it out")
    return opening(inputs, items, options)
