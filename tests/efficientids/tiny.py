"""Sizes and flags of the tiny jobs that the tests train."""

from __future__ import annotations

import dataclasses
from typing import Any

from core.config import TINY

NUM_USERS, NUM_ITEMS = 60, 30
LLAMA = dataclasses.replace(TINY, vocab_size=64, hidden_size=16, intermediate_size=24, head_dim=8)
# Four steps with a checkpoint after two and four.
SMALL_JOB: dict[str, Any] = {
    "num_steps": 4, "batch_size": 8, "seq_len": 8, "eval_every": 2, "learning_rate": 1e-2, "dropout": 0.0,
    "gradient_checkpointing": "none",
}  # fmt: skip


def flags(**values: Any) -> list[str]:
    """name=value → --name=value."""
    return [f"--{name}={value}" for name, value in values.items()]
