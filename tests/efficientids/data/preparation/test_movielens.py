"""MovieLens 1M as LRURec prepared it: the same filter, order and tie-break give the same sequences."""

from __future__ import annotations

import json
from pathlib import Path

from efficientids.data.dataset import Dataset
from efficientids.data.preparation.cli import PrepareConfig, prepare


def test_order_is_lrurecs_for_all_users(real_data: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(output=tmp_path / "ml-1m", source="movielens", input=(real_data / "ml-1m",), json=True))
    dataset = Dataset.open(tmp_path / "ml-1m")
    report = json.loads((tmp_path / "ml-1m" / "report.json").read_text())
    assert 0.48 < report["tied_share"] < 0.50  # why the tie-break matters
    item_ids = json.loads((real_data / "ml-1m-lrurec" / "item_ids.json").read_text())
    ours = dataset.items["item_id"].to_list()
    users = dataset.users["user_id"].to_list()
    compared = 0
    with (real_data / "ml-1m-lrurec" / "sequences.jsonl").open() as lines:
        for user, line in enumerate(lines):
            theirs = json.loads(line)
            sequence = [*theirs["train"], *theirs["val"], *theirs["test"]]
            history = dataset.item_ids[dataset.offsets[user] : dataset.offsets[user + 1]]
            assert users[user] == str(theirs["user"])
            assert [ours[item - 1] for item in history] == [str(item_ids[str(item)]) for item in sequence]
            compared += 1
    assert compared == 6_040
