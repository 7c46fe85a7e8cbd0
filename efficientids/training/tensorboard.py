"""TensorBoard's event files, written by ourselves.

A scalar is four fields of two protocol-buffer messages in a checksummed frame. The small library for it (tensorboardX
2.6.5) imports torch wherever that is installed (1.6 s), and hands events to a thread: a killed run loses the last
ones, and once the thread has died (a full disk), the training waits for it for ever.

Frame (TensorFlow, `record_writer.h`): length uint64, masked CRC-32C of the length, data, masked CRC-32C of the data;
all little-endian. Messages (`event.proto`, `summary.proto`): Event {1: wall_time double, 2: step int64, 3: file_version
string, 5: summary}, Summary {1: value, repeated}, Value {1: tag string, 2: simple_value float}.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientids.training.trackers import Status

FOLDER = "tensorboard"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class TensorBoard:
    """A tracker: `R/tensorboard/events.out.tfevents.TIME.PID`. What was logged is on its way to the disk at once, so a
    killed run leaves a file that reads to its last logged step.
    """

    def __init__(self) -> None:
        self._file: Path | None = None

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        """Makes the file; the configuration stands in config.yaml."""
        folder = run_path / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        # Viewers know the files by "tfevents" and read them in the order of their names.
        self._file = folder / f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}"
        self._append(_event(_field(3, _BYTES, b"brain.Event:2")))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event with a scalar for each metric, by its name."""
        values = b"".join(
            _field(1, _BYTES, _field(1, _BYTES, name.encode()) + _field(2, _FIXED32, struct.pack("<f", value)))
            for name, value in metrics.items()
        )
        self._append(_event(_field(2, _VARINT, _varint(step)) + _field(5, _BYTES, values)))

    def finish(self, status: Status) -> None:
        """Nothing is open."""

    def _append(self, event: bytes) -> None:
        assert self._file is not None, "log comes after start"
        with self._file.open("ab") as file:
            file.write(frame(event))


def frame(data: bytes) -> bytes:
    """`data` between its length and the checksums of both."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli; RFC 3720, appendix B.4): of b"123456789" it is 0xE3069283."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()


def _masked(data: bytes) -> int:
    """A checksum of data that holds checksums is weak, so TensorFlow turns and shifts it."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _event(fields: bytes) -> bytes:
    return _field(1, _FIXED64, struct.pack("<d", time.time())) + fields


def _field(number: int, wire_type: int, content: bytes) -> bytes:
    size = _varint(len(content)) if wire_type == _BYTES else b""
    return _varint(number << 3 | wire_type) + size + content


def _varint(value: int) -> bytes:
    if value < 0:
        raise ValueError(f"{value}: steps and sizes are not negative")
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
