"""Writes tensors as safetensors files, one tensor in memory at a time, in shards as Hugging Face names them.

Format: github.com/huggingface/safetensors, "Format". The library's own `save_file` wants all tensors of a file at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.weight_files import DTYPES, CheckpointCorrupt

MAX_SHARD_BYTES = 5 * 10**9
"""Hugging Face's "5GB"."""

# In the order of the library, which puts the last first: every tensor then begins at a multiple of its item size.
_NAMES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int16): "I16",
    np.dtype(np.uint16): "U16",
    DTYPES["F16"]: "F16",
    DTYPES["BF16"]: "BF16",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint32): "U32",
    DTYPES["F32"]: "F32",
    DTYPES["F64"]: "F64",
    np.dtype(np.int64): "I64",
    np.dtype(np.uint64): "U64",
}


class Tensor(NamedTuple):
    """A tensor that is made when it is wanted: `read` gives an array of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]

    @staticmethod
    def of(array: Any) -> Tensor:
        """An array of NumPy's or jax's; it comes to the host when it is read."""
        return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    stem: str = "model",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Writes STEM.safetensors, or STEM-00001-of-0000N.safetensors and so on with STEM.safetensors.index.json.

    Args:
        folder: exists; files of these names in it are replaced.
        tensors: each is read once; they fill shards in this order.
        stem: of the files' names.
        max_shard_bytes: of the tensors in one file; a tensor that is larger has a file of its own.
        progress: told (tensors written, all tensors).

    Returns:
        The names of the weight files → sha256 of the bytes that were handed to the disk; `check_written` compares.

    Raises:
        ValueError: a dtype that safetensors does not know, or an array that is not what its `Tensor` says.
        OSError: the disk is full, …; a file half written stays.
    """
    unknown = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _NAMES]
    if unknown:
        raise ValueError(f"safetensors holds no such dtype: {', '.join(unknown)}")
    shards = _shards(tensors, max_shard_bytes)
    count = len(shards)
    names = [
        f"{stem}-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors" for i in range(count)
    ]
    done = itertools.count(1)

    def one_more() -> None:
        if progress is not None:
            progress(next(done), len(tensors))

    written = {
        file: _write_file(folder / file, {name: tensors[name] for name in shard}, one_more)
        for file, shard in zip(names, shards, strict=True)
    }
    if count > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return written


def check_written(folder: Path, written: Mapping[str, str]) -> None:
    """Reads every file that `write_tensors` wrote once more.

    Raises:
        CheckpointCorrupt: its bytes are not those that were written.
    """
    for name, expected in written.items():
        with (folder / name).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise CheckpointCorrupt(f"{name}: read back, it has other bytes than were written; is the disk sound?")


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names, file by file; one file at least."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, Tensor], one_more: Callable[[], None]) -> str:
    """One file; sha256 of its bytes. `one_more` is called after each tensor."""
    rank = {dtype: place for place, dtype in enumerate(_NAMES)}
    order = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def put(data: Any) -> None:
            stream.write(data)
            digest.update(data)

        put(_header(order, tensors))
        for name in order:
            put(_bytes(name, tensors[name]))
            one_more()
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _header(order: Iterable[str], tensors: Mapping[str, Tensor]) -> bytes:
    """The length and the JSON in front of the tensors, padded with spaces to a multiple of 8 bytes."""
    # transformers refuses a file that does not say whose tensors it holds; "pt" is what all of them say.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        shape, dtype, _ = tensors[name]
        end = start + tensors[name].nbytes
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, tensor: Tensor) -> memoryview:
    array = tensor.read()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(
            f"{name}: {array.dtype} {list(array.shape)} was read, {tensor.dtype} {list(tensor.shape)} announced"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
