"""Small data sets for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from efficientids.data import layout
from efficientids.data.dataset import Dataset
from efficientids.data.layout import Contents
from efficientids.data.preparation import report_page
from efficientids.data.writing import write_dataset

MakeContents = Callable[..., Contents]


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the page with plots out, which takes longer than everything else that `prepare` does to a small log."""
    monkeypatch.setattr(report_page, "files", lambda report: {layout.REPORT: report.to_json() + "\n"})


@pytest.fixture(scope="session")
def make_contents() -> MakeContents:
    """Histories (one list of items a user) and a catalogue size → Contents; the times of a user are 10, 20, 30, …"""

    def make(histories: Sequence[Sequence[int]], catalogue_size: int = 9) -> Contents:
        lengths = [len(history) for history in histories]
        return Contents(
            name="tiny",
            source="test",
            items=pl.DataFrame(
                {
                    "item": np.arange(1, catalogue_size + 1, dtype=np.int32),
                    "item_id": [f"i{item}" for item in range(1, catalogue_size + 1)],
                    "title": [f"Title {item}" for item in range(1, catalogue_size + 1)],
                }
            ),
            users=pl.DataFrame(
                {
                    "user": np.arange(len(histories), dtype=np.int32),
                    "user_id": [f"u{user}" for user in range(len(histories))],
                }
            ),
            item_ids=np.array([item for history in histories for item in history], np.int32),
            timestamps=np.array([10 * (t + 1) for length in lengths for t in range(length)], np.int64),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            order={"rule": "time", "tie_break": "none"},
            filters={"core": None},
        )

    return make


@pytest.fixture
def dataset(tmp_path: Path, make_contents: MakeContents) -> Dataset:
    """Five users with histories of 5, 3, 2, 8 and 1 items; 9 items of which the last has no interaction."""
    histories = [[1, 2, 3, 4, 5], [6, 7, 8], [1, 2], [8, 7, 6, 5, 4, 3, 2, 1], [3]]
    return write_dataset(tmp_path / "tiny", make_contents(histories))
