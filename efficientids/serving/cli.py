"""`python -m efficientids recommend`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from core.platform import start_devices
from efficientids.errors import UserError
from efficientids.flags import command_line
from efficientids.loading import open_run
from efficientids.log import duration, progress
from efficientids.serving.recommend import chosen_users, recommend_users


@dataclasses.dataclass(frozen=True)
class RecommendConfig:
    """Top-k items for users of the run's data set, after their whole history, as a Parquet file."""

    run: Path
    """The run folder R, R/STEP or R/checkpoints/STEP."""
    output: Path
    """The Parquet file to write: user_id, rank, item_id, title, score. Score: higher is better; a
    log-probability for models that are trained, counted scores for item_knn and popularity."""
    users: str = "all"
    """`all`, or a file with one external user id a line."""
    data_dir: Path | None = None
    """Where the run's data set is now. Default: where it was."""
    k: int = 10
    """Items a user."""
    step: int | None = None
    """Which checkpoint. Default: the best by validation NDCG@10 (of equals the later)."""
    seen: Literal["mask", "keep"] = "mask"
    """Whether items of the user's history may be recommended."""
    batch_size: int = 256
    """Users at a time."""
    overwrite: bool = False
    """Replace the output file if it exists."""
    json: bool = False
    """Print the summary as JSON."""


def main(arguments: Sequence[str]) -> int:
    """Recommends; returns the exit code."""
    config = command_line(RecommendConfig, arguments, prog="efficientids recommend")
    if config.k < 1 or config.batch_size < 1:
        raise UserError(f"--k {config.k}, --batch_size {config.batch_size}: at least 1")
    if config.output.is_dir():
        raise UserError(f"--output {config.output} is a folder; give a file")
    if config.output.exists() and not config.overwrite:
        raise UserError(f"--output {config.output} exists; give another file, or --overwrite")
    if not config.output.parent.is_dir():
        raise UserError(f"--output {config.output}: no folder {config.output.parent}")
    start_devices()
    loaded = open_run(config.run, config.step)
    dataset = loaded.dataset(config.data_dir)
    if config.k > dataset.catalogue_size:
        raise UserError(f"--k {config.k}: the catalogue has {dataset.catalogue_size} items")
    users = chosen_users(dataset, config.users)
    began = time.perf_counter()
    table = recommend_users(
        loaded.recommender,
        loaded.model,
        dataset,
        users,
        k=config.k,
        keep_seen=config.seen == "keep",
        batch_size=config.batch_size,
        progress=progress("recommended for", "users", sys.stderr),
    )
    # Written beside and renamed: a killed run leaves no half file under the name asked for.
    partial = config.output.with_name(config.output.name + ".partial")
    table.write_parquet(partial)
    partial.replace(config.output)
    seconds = time.perf_counter() - began
    summary = {"users": len(users), "rows": len(table), "output": str(config.output), "step": loaded.step}
    if config.json:
        print(json.dumps({**summary, "seconds": seconds}))
    else:
        print(f"{len(table):,} recommendations for {len(users):,} users in {duration(seconds)}: {config.output}")
    return 0
