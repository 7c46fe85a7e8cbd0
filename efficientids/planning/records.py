"""What was found of a step is kept on disk, so that asking again is instant: nothing is traced, nothing compiled.

    FOLDER/plans/KEY.json     (FOLDER: `core.platform.cache_root`)

KEY is a sha256 of all that decides the program: the project's own source, versions, XLA's flags, the resolved
configuration, the shapes that it comes to, and the device. An entry is written beside its place and renamed into it, so
that it is there whole or not at all, whoever writes it and whenever they are killed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import core
import efficientids
from core.platform import cache_root

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12",
             "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13")  # fmt: skip
_VARIABLES = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")


def key_of(*facts: Any) -> str:
    """64 hexadecimal digits; `facts` are plain values or have a `repr` that tells all."""
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return hashlib.sha256(repr([_source(), versions(), environment, facts]).encode()).hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what traces and compiles, by package."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _source() -> str:
    """The sha256 of every Python file of the two packages."""
    digest = hashlib.sha256()
    for package in (core, efficientids):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _folder() -> Path:
    return cache_root() / "plans"


def read(key: str) -> dict[str, Any] | None:
    """What is kept under `key`; None where nothing is, or nothing that can be read."""
    try:
        values = json.loads((_folder() / f"{key}.json").read_bytes())
    except (OSError, ValueError, RuntimeError):
        return None
    return values if isinstance(values, dict) else None


def write(key: str, values: dict[str, Any]) -> None:
    """Keeps plain values. Without a place to, nothing is kept."""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".new-")
    except (OSError, RuntimeError):
        return
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(values, file)
        os.replace(name, folder / f"{key}.json")
    except OSError:
        os.unlink(name)
