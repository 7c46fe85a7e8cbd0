"""RecBole's atomic files: x.inter, x.item and x.user, tab-separated, with a type behind each name of the header
(`user_id:token`); and its benchmark files x.train.inter, x.valid.inter, x.test.inter, which may have histories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efficientids.data.sources.columns import USER, need_column
from efficientids.data.sources.delimited import DelimitedFile
from efficientids.data.sources.files import LogFile, log_files
from efficientids.data.sources.histories import open_histories
from efficientids.data.sources.item_table import describe, named_rows
from efficientids.data.sources.log_source import LogSource, RowsTable
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.reading import decoded, first_line
from efficientids.data.sources.table import rows_source, with_items
from efficientids.data.sources.tables import check_file
from efficientids.errors import UserError

TYPES = ("token", "token_seq", "float", "float_seq")


def open_recbole(inputs: Sequence[Path], items: Path | None, options: SourceOptions) -> LogSource:
    """The folder or .inter files; x.item and x.user beside them are read too. Raises UserError for another header."""
    files = log_files(inputs, (".inter",))
    opened = [open_atomic(file.path) for file in files]
    tables, types = [table for table, _ in opened], opened[0][1]
    sequences = [name for name, kind in types.items() if kind == "token_seq"]
    if options.history_column is not None or sequences:
        if len(sequences) > 1 and options.history_column is None:
            raise UserError(f"{files[0].path}: {', '.join(sequences)} may each be the history; give --history_column")
        history = options.history_column or sequences[0]
        if history not in sequences:
            raise UserError(f"--history_column {history}: {files[0].path} has no such column of type token_seq")
        source = open_histories(files, tables, history, options, spaced=True)
    else:
        source = rows_source(files, tables, options, "recbole")
    source.kind = "recbole"
    source.name = files[0].path.name.split(".")[0]
    _add_users(source, files)
    beside = files[0].path.with_name(f"{source.name}.item")
    path = items if items is not None else (beside if beside.is_file() else None)
    if path is None or path.suffix != ".item":
        return with_items(source, files, path, options)
    table = named_rows(open_atomic(path)[0], options)
    source.item_table = table
    source.files = (*source.files, path)
    source.notes.append(describe(table))
    return source


def open_atomic(path: Path) -> tuple[DelimitedFile, dict[str, str]]:
    """An atomic file, its columns without their types; and the types. Raises UserError for another header."""
    check_file(path)
    header = decoded(path, first_line(path)).split("\t")
    types = dict(field.rpartition(":")[::2] for field in header)
    odd = [field for field in header if field.rpartition(":")[2] not in TYPES or ":" not in field]
    if odd or len(types) < len(header):
        raise UserError(
            f"{path}: the header must name columns as name:type, parted by tabulators, a type being one of "
            f"{', '.join(TYPES)}; found {odd[0] if odd else header!r}. For other tables use --source table"
        )
    return DelimitedFile(path, tuple(types), "\t", quoted=False), types


def _add_users(source: LogSource, files: Sequence[LogFile]) -> None:
    path = files[0].path.with_name(f"{source.name}.user")
    if not path.is_file():
        return
    rows = open_atomic(path)[0]
    user = need_column(path, rows.columns, USER, None, "user_column", "user ids")
    names = {user: "user_id", **{name: name for name in rows.columns if name != user}}
    source.user_table = RowsTable(rows, names)
    source.files = (*source.files, path)
