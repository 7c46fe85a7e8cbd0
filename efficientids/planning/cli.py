"""`python -m efficientids plan`: the same as `train_llama.py --estimate_memory_only`."""

from __future__ import annotations

from collections.abc import Sequence

from efficientids import train


def main(arguments: Sequence[str]) -> int:
    """Takes the flags of a training run; returns the exit code (`planning.plan`)."""
    return train.main([*arguments, "--estimate_memory_only"])
