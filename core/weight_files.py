"""Weight files of a Hugging Face checkpoint, read one tensor at a time: safetensors, and `.bin` through torch.

The safetensors library checks a file; its tensors are then read by offset: the library maps the whole file, and every
page touched counts against the process until the file is closed. Format: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ALIGNMENT = 64  # bytes

# The dtypes that weights may have, by safetensors' name. Quantised ones are not weights of this Llama.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_TORCH_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded."""


class WeightsNotFound(CheckpointError):
    """No weights where they were looked for."""


class CheckpointCorrupt(CheckpointError):
    """A weight file, or its index, that is damaged."""


class Header(NamedTuple):
    """What a file says of a tensor before its bytes are read; `dtype` is safetensors' name, a key of DTYPES or not."""

    shape: tuple[int, ...]
    dtype: str


class WeightFile(Protocol):
    """A file of named tensors."""

    path: Path
    headers: dict[str, Header]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor with the dtype of its header, or those `rows` (without a step) of its first axis."""


def find_weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a checkpoint's folder, in Hugging Face's order of preference, shards sorted by name.

    One `model.safetensors`, else the shards of `model.safetensors.index.json`, else `pytorch_model.bin`, else the
    shards of its index.

    Raises:
        WeightsNotFound: none of these, or a shard that the index names is not there.
        CheckpointCorrupt: an unreadable index.
    """
    folder = Path(folder)
    for name in (*_SAFETENSORS, *_TORCH):
        if (folder / name).is_file():
            return _shards(folder / name) if name.endswith(".index.json") else [folder / name]
    raise WeightsNotFound(f"{folder}: no weights there; expected one of {', '.join((*_SAFETENSORS, *_TORCH))}")


def open_weight_file(path: Path) -> WeightFile:
    """Reads the headers of a weight file.

    Raises:
        CheckpointCorrupt: truncated or damaged; the message names the file.
        CheckpointError: a `.bin` file and no torch (2.6 or later) to read it.
    """
    return TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


def weights_checksum(path: str | Path) -> str:
    """Identifies the weights of a checkpoint's folder by the names and contents of its weight files.

    Returns:
        64 hex digits: sha256 of the lines "sha256 of the file, two spaces, its name" (what `sha256sum` prints).

    Raises:
        WeightsNotFound, CheckpointCorrupt: as `find_weight_files`.
    """
    total = hashlib.sha256()
    for file in find_weight_files(path):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{digest}  {file.name}\n".encode())
    return total.hexdigest()


def _shards(index: Path) -> list[Path]:
    """The files that an index names; which tensor is where the files themselves say."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{index}: not an index of weight files with a weight_map ({error})") from error
    suffix = ".bin" if index.name in _TORCH else ".safetensors"
    # An index is input from outside: it may not lead out of its folder.
    bad = [name for name in names if Path(name).name != name or not name.endswith(suffix)]
    if bad or not names:
        raise CheckpointCorrupt(f"{index}: weight_map names {bad or 'no file'}; names of {suffix} files are expected")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise WeightsNotFound(
            f"{index.parent}: {index.name} names {', '.join(absent)}, not there; download the checkpoint again"
        )
    return [index.parent / name for name in names]


class SafetensorsFile:
    """A safetensors file: an unsigned 64-bit length, that many bytes of JSON, then the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Opening touches the header alone; the library checks lengths, offsets, shapes and the file's size.
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointCorrupt(f"{path}: not a complete safetensors file ({error}); download it again") from error
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        self.headers = {name: Header(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
        self._offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        (length, *row), dtype = self.headers[name].shape, DTYPES[self.headers[name].dtype]
        first, end, _ = rows.indices(length)
        row_bytes = math.prod(row) * dtype.itemsize
        size = (end - first) * row_bytes
        # Aligned so that jax on a CPU can use the memory as it is, without a copy.
        buffer = np.empty(size + _ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % _ALIGNMENT
        data = buffer[start : start + size]
        with self.path.open("rb") as stream:
            stream.seek(self._offsets[name] + first * row_bytes)
            if stream.readinto(data.data) != size:
                raise CheckpointCorrupt(f"{self.path}: became shorter while it was read")
        return data.view(dtype).reshape(end - first, *row)


class TorchFile:
    """A `.bin` file: the one door to `torch.load`. Its tensors are mapped, not read, where the format allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        torch = _import_torch(path)
        try:
            # Only archives can be mapped; before torch 1.6 files were bare pickles.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise CheckpointCorrupt(f"{path}: not a readable file of weights ({error}); download it again") from error
        if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
            raise CheckpointCorrupt(f"{path}: holds something else than named tensors")
        self._tensors: dict[str, Any] = loaded
        self.headers = {
            name: Header(tuple(tensor.shape), _TORCH_DTYPES.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in loaded.items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        tensor, dtype = self._tensors[name][rows], self.headers[name].dtype
        if dtype == "BF16":  # NumPy knows no bfloat16 of torch's: hand over the bits
            import torch

            return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
        return tensor.numpy()


class SplitFile:
    """A file whose tensors named in `parts` are shown as several, cut along the first axis.

    Args:
        file: to read from.
        parts: a tensor's name → the names of its parts, in order, with the rows of each. A tensor that has not as many
            rows stays whole.
    """

    def __init__(self, file: WeightFile, parts: Mapping[str, Mapping[str, int]]) -> None:
        self.path, self._file = file.path, file
        self.headers: dict[str, Header] = {}
        self._cuts: dict[str, tuple[str, int, int]] = {}
        for name, header in file.headers.items():
            rows = parts.get(name, {})
            if len(rows) < 2 or header.shape[:1] != (sum(rows.values()),):
                self.headers[name] = header
                continue
            start = 0
            for part, size in rows.items():
                self.headers[part] = Header((size, *header.shape[1:]), header.dtype)
                self._cuts[part] = (name, start, start + size)
                start += size

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        if name not in self._cuts:
            return self._file.read(name, rows)
        whole, start, end = self._cuts[name]
        first, last, _ = rows.indices(end - start)
        return self._file.read(whole, slice(start + first, start + last))


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: .bin weights need torch; pip install -r requirements-torch.txt, or use safetensors"
        ) from error
    # Before 2.6 `weights_only` could be made to run code (CVE-2025-32434).
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise CheckpointError(f"{path}: .bin weights need torch 2.6 or later, not {torch.__version__}")
    return torch
