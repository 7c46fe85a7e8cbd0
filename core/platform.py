"""What must be settled before jax first looks for devices."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What the CUDA libraries' static initialisers print on a machine without a driver, before any log level is read.
_KNOWN_NOISE = ("cudart_stub.cc", "before absl::InitializeLog()")


def has_nvidia_device() -> bool:
    """True where the NVIDIA driver shows a device node (an installed plugin alone proves nothing)."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def quiet_without_gpu() -> None:
    """On a machine without a GPU, keeps the CUDA plugin from printing a traceback and then imports jax.

    The plugin is installed there only to compile programs for GPUs (`efficientids.planning`); at start it would look
    for CUDA libraries, fail and say so at length. A value that the user has set stays.
    """
    if has_nvidia_device():
        return
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if "jax" not in sys.modules:
        with without_known_noise():
            import jax  # noqa: F401


@contextmanager
def without_known_noise() -> Iterator[None]:
    """Holds back what is written to file descriptor 2, then passes on every line that is not known noise."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines(keepends=True):
                if not any(noise in line for noise in _KNOWN_NOISE):
                    sys.stderr.write(line)


def quiet_devices() -> None:
    """Looks for devices now, without the CUDA libraries' lines on a machine that has none."""
    import jax

    if has_nvidia_device():
        jax.devices()
        return
    with without_known_noise():
        jax.devices()
