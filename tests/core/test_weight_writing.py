"""Safetensors files written tensor by tensor: their bytes, shards, and what is noticed."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.weight_files import CheckpointCorrupt
from core.weight_writing import Tensor, check_written, write_tensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "flags": np.array([True, False, True]),
    "ids": np.arange(5, dtype=np.int32),
    "half": RNG.standard_normal((3, 2)).astype(ml_dtypes.bfloat16),
    "table": RNG.standard_normal((4, 6)).astype(np.float32).T,  # not contiguous
    "codes": RNG.integers(0, 255, (2, 3)).astype(np.uint8),
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 4), np.float32),
}


def tensors() -> dict[str, Tensor]:
    return {name: Tensor.of(np.asarray(array)) for name, array in ARRAYS.items()}


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    """Bit for bit: the header's text and order, the padding, the data."""
    written = write_tensors(tmp_path, tensors())
    assert list(written) == ["model.safetensors"] and {f.name for f in tmp_path.iterdir()} == set(written)
    contiguous = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in ARRAYS.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_and_their_index(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    size = tensors()["table"].nbytes
    written = write_tensors(
        tmp_path, tensors(), stem="other", max_shard_bytes=size, progress=lambda *done: told.append(done)
    )
    assert told == [(i + 1, 7) for i in range(7)]
    # Filled in order up to the limit; the table alone is as large as that.
    assert list(written) == [f"other-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "other.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    found = {file: load_file(tmp_path / file) for file in written}
    assert index["weight_map"] == {name: file for file, held in found.items() for name in held}
    assert [sum(a.nbytes for a in held.values()) <= size for held in found.values()] == [True] * 3
    for name, array in ARRAYS.items():
        read = found[index["weight_map"][name]][name]
        assert read.dtype == array.dtype and np.array_equal(read, array)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    assert len(write_tensors(tmp_path, tensors(), max_shard_bytes=1)) == len(ARRAYS)


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def read() -> np.ndarray:
        assert not [earlier for earlier in made if earlier() is not None]
        array = np.zeros(8, np.float32)
        made.append(weakref.ref(array))
        return array

    write_tensors(tmp_path, {str(i): Tensor((8,), np.dtype(np.float32), read) for i in range(4)})
    assert len(made) == 4


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    written = write_tensors(tmp_path, tensors())
    check_written(tmp_path, written)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: read back, it has other bytes"):
        check_written(tmp_path, written)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such dtype: x complex64"):
        write_tensors(tmp_path, {"x": Tensor.of(np.zeros(2, np.complex64))})
    announced = Tensor((3,), np.dtype(np.float32), lambda: np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"x: float32 \[2\] was read, float32 \[3\] announced"):
        write_tensors(tmp_path, {"x": announced})
