"""What must be settled before jax first looks for devices."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY_FRACTION = 0.92
"""Of a GPU's memory, what a run takes for its pool: jax's own 0.75 would leave 8 of 32 GB idle. The rest is for the
CUDA context, cuDNN, NCCL and the display."""

_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_JAX_FRACTION = 0.75
# Beyond it the least recently used programs go first.
_COMPILATION_CACHE_BYTES = 4 * 2**30

# What the CUDA libraries' static initialisers print on a machine without a driver, before any log level is read; and
# what XLA says when it compiles for a GPU that is not there.
_KNOWN_NOISE = (
    "cudart_stub.cc",
    "before absl::InitializeLog()",
    "Using fallback sort algorithm",
    "hlo_rematerialization.cc",
    "slow_operation_alarm.cc",
    "Very slow compile?",
    "*" * 32,
)


def has_nvidia_device() -> bool:
    """True where the NVIDIA driver shows a device node (an installed plugin alone proves nothing)."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def prefer_memory_fraction() -> None:
    """On a machine with an NVIDIA GPU, lets jax take `MEMORY_FRACTION` of it, unless the user settled that.

    For commands, before jax looks for devices. A process of the user's own that imports this package keeps jax's value.
    """
    if has_nvidia_device() and not any(os.environ.get(name) for name in _FRACTIONS) and _preallocates():
        os.environ[_FRACTIONS[1]] = str(MEMORY_FRACTION)


def memory_fraction() -> float:
    """The share of a GPU's memory that a command started in this environment may take.

    Raises:
        ValueError: the user's variable is no positive number.
    """
    for name in _FRACTIONS:
        text = os.environ.get(name)
        if text:
            try:
                given = float(text)
            except ValueError:
                given = 0.0
            if not given > 0:
                raise ValueError(f"{name}={text}: give a share such as {MEMORY_FRACTION}, or unset it")
            return given
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        return 1.0  # no pool: whatever is free
    return MEMORY_FRACTION if _preallocates() else _JAX_FRACTION


def _preallocates() -> bool:
    return os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() not in ("false", "0")


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


def cache_root() -> Path:
    """Where caches of this project are: $EFFICIENTIDS_CACHE, else efficientids in $XDG_CACHE_HOME, else ~/.cache.

    Raises:
        RuntimeError: neither a variable nor a home directory is known.
    """
    given, shared = os.environ.get("EFFICIENTIDS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given).absolute()
    return (Path(shared) if shared else Path.home() / ".cache").absolute() / "efficientids"


def start_devices() -> None:
    """For a command that computes: looks for devices (quietly), and keeps compiled programs from run to run."""
    quiet_devices()
    enable_compilation_cache()


def enable_compilation_cache() -> None:
    """On a GPU, keeps compiled programs in `cache_root()/xla`, or where JAX_COMPILATION_CACHE_DIR says.

    Not on a CPU: there jax 0.10.1 complains on stderr, two long lines a program, that its own program was compiled for
    another machine, whenever LLVM tunes with "prefer-no-gather" (jax-ml/jax#38445).
    """
    import jax

    if jax.default_backend() != "gpu":
        return
    settings: Any = jax.config
    if not settings.jax_compilation_cache_dir:  # the environment's variable arrives there
        try:
            folder = cache_root() / "xla"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:
            print(f"programs are compiled anew in each run: no cache ({error})", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _COMPILATION_CACHE_BYTES)
    # On several GPUs cuDNN attention carries the address of a Python object, which would make each start a new key
    # (jax-ml/jax#21159). What the key then misses (scale and mask) follows from the shapes here.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
