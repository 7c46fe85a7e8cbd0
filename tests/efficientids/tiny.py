"""Sizes and flags of the tiny jobs that the tests train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from core.config import TINY

NUM_USERS, NUM_ITEMS = 60, 30
LLAMA = dataclasses.replace(TINY, vocab_size=64, hidden_size=16, intermediate_size=24, head_dim=8)
FROZEN = ("--freeze_llama",)
# Four steps with a checkpoint after two and four.
SMALL_JOB: dict[str, Any] = {
    "num_steps": 4, "batch_size": 8, "seq_len": 8, "eval_every": 2, "learning_rate": 1e-2, "dropout": 0.0,
    "gradient_checkpointing": "none",
}  # fmt: skip
ETEGREC_JOB: dict[str, Any] = {
    "recommender": "etegrec", "levels": "6,6", "suffix_size": 32, "code_dim": 8, "max_seq_len": 6, "batch_size": 8,
    "length_buckets": 1, "pretrain_epochs": 2, "dropout": 0.0, "gradient_checkpointing": "none", "beams": 4,
}  # fmt: skip


def events(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's `metrics.jsonl`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def best_step(run: Path) -> int:
    """The step that a run's best checkpoint has."""
    # Of equals Orbax takes the later one.
    return max(events(run, "validation"), key=lambda line: (line["ndcg@10"], line["step"]))["step"]


def flags(**values: Any) -> list[str]:
    """name=value → --name=value."""
    return [f"--{name}={value}" for name, value in values.items()]
