"""What a user may say about the files of a source; what is not said is chosen from the files, and told in `notes`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Column names and forms of an interaction log and its item table; None: chosen from the file.

    A file without a header has the columns "1", "2", … from the left.
    """

    user_column: str | None = None
    """The column of user ids (usual names are recognised: user_id, userId, reviewerID, user, …)."""
    item_column: str | None = None
    """The column of item ids (item_id, itemId, asin, movieId, …); of a file with histories: the item to predict."""
    time_column: str | None = None
    """The column of times: seconds, ms, µs or ns since 1970, or ISO dates (timestamp, time, unixReviewTime, …)."""
    rating_column: str | None = None
    """The column of ratings (rating, overall, stars, …)."""
    split_column: str | None = None
    """The column that says train, valid or test of a row (split)."""
    history_column: str | None = None
    """The column with a row's history as a list of item ids (history_item_id, item_id_list)."""
    sequence_column: str | None = None
    """The field of JSON lines that holds a user's items in order (items, sequence, item_ids, …)."""
    separator: str | None = None
    """What parts the fields of a text table, such as "," or ";" or "::" ("tab" for a tabulator)."""
    header: bool | None = None
    """Whether the first line of a text table names the columns."""
    item_id_column: str | None = None
    """The column of item ids in the item table."""
    title_column: str | None = None
    """The column of titles in the item table (title, name, …)."""
    text_columns: tuple[str, ...] | None = None
    """Further columns of the item table to keep (description, brand, categories, genres, tags, …)."""
    item_id_offset: int | None = None
    """What is added to the item table's whole-number ids to get those of the log."""

    def given(self) -> tuple[str, ...]:
        """The names of the options that were said."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None)
