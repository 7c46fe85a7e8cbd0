"""ByteDance's csv for PixelRec and Books: interactions item_id,user_id,timestamp; items item_id,title,tag,description.

Their layout is dataset/X.csv with information/X.csv.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efficientids.data.sources.files import log_files
from efficientids.data.sources.log_source import LogSource
from efficientids.data.sources.options import SourceOptions
from efficientids.data.sources.table import rows_source, with_items
from efficientids.data.sources.tables import open_table
from efficientids.errors import UserError

_COLUMNS = ("item_id", "user_id", "timestamp")


def open_pixelrec(inputs: Sequence[Path], items: Path | None, options: SourceOptions) -> LogSource:
    """Interactions and, where it is given or lies in ../information, the table of items. The data are filtered as
    published, so there is no k-core unless asked. Raises UserError for other columns."""
    files = log_files(inputs, (".csv",))
    tables = [open_table(file.path, options) for file in files]
    for table in tables:
        if missing := [name for name in _COLUMNS if name not in table.columns]:
            raise UserError(
                f"{table.path}: no column {missing[0]}; PixelRec's interactions have {', '.join(_COLUMNS)}, this file "
                f"{', '.join(table.columns[:20])}. For other tables use --source table"
            )
    source = rows_source(files, tables, options, "pixelrec", core=0)
    beside = files[0].path.resolve().parent.parent / "information" / files[0].path.name
    return with_items(source, files, items or (beside if beside.is_file() else None), options)
