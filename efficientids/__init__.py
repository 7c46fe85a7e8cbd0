"""Recommenders with a Llama inside: data, training, evaluation and recommendation."""

from __future__ import annotations

from typing import Any

import core  # noqa: F401  # before jax: see core.platform


def __getattr__(name: str) -> Any:
    # Lazily: preparing data needs no Orbax.
    if name == "load_run":
        from efficientids.loading import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
