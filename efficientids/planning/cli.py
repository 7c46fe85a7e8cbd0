"""`python -m efficientids plan`: the same as `train_llama.py --estimate_memory_only`."""

from __future__ import annotations

from collections.abc import Sequence

from efficientids import train

_WHAT = """Will a training run fit, how large a batch, and how fast at best; without a GPU, and nothing is trained.

Takes the flags of the run. Exit code 3: nothing fits."""


def main(arguments: Sequence[str]) -> int:
    """Takes the flags of a training run; returns the exit code (`planning.plan`)."""
    return train.main([*arguments, "--estimate_memory_only"], prog="efficientids plan", what=_WHAT)
