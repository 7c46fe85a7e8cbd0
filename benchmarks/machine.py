"""What every benchmark prints first: hardware, versions, command."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from core.platform import quiet_devices  # before jax: importing core keeps the CUDA plugin quiet


def header() -> str:
    """One block of text that says where the numbers below it were measured."""
    import jax

    quiet_devices()
    model = "unknown processor"
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return (
        f"machine: {model}, {os.cpu_count()} cores; devices {[d.device_kind for d in jax.devices()]}\n"
        f"versions: python {platform.python_version()}, jax {jax.__version__}\n"
        f"command: python {' '.join(sys.argv)}"
    )


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The median wall-clock seconds of `call` (its result is waited for), after one call that compiles."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]
