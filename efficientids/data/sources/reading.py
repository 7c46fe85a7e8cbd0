"""Files as blocks of bytes that end where a line ends, packed by gzip or not: memory stays at a block."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from efficientids.errors import UserError

BLOCK_BYTES = 16 << 20
"""What is read at a time."""
MAX_LINE_BYTES = 64 << 20
"""A file without a line end for so long is not a text table."""
MAX_OBJECT_BYTES = 1 << 30
"""The largest file that is read as one JSON object."""

Cut = Callable[[bytes], int]
_BOM = b"\xef\xbb\xbf"


def line_cut(buffer: bytes) -> int:
    """Where the last line that is surely complete ends. Blank lines at the end stay behind: they may end the file."""
    return buffer.rstrip(b"\r\n").rfind(b"\n") + 1


def line_blocks(path: Path, cut: Cut = line_cut) -> Iterator[tuple[int, bytes]]:
    """Yields (number of the first line, from 1; bytes that end with a line end), without blank lines at the file's end.

    `cut` says how much of a buffer may go, at least up to a line end; 0: more must be read. A byte order mark is taken
    off. Raises UserError when the file is missing, empty, damaged, or has no line end for `MAX_LINE_BYTES`.
    """
    rest, line, seen = b"", 1, False
    for data in _reads(path):
        buffer = rest + data if seen else data.removeprefix(_BOM)
        seen = True
        used = cut(buffer)
        if not used and len(buffer) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}: no line ends within {MAX_LINE_BYTES >> 20} MiB from line {line}; not a text table"
            )
        if used:
            yield line, buffer[:used]
            line += buffer.count(b"\n", 0, used)
        rest = buffer[used:]
    rest = rest.rstrip(b"\r\n")
    if rest:
        yield line, rest + b"\n"
    elif line == 1:
        raise UserError(f"{path}: the file is empty; fetch or copy it again")


def _reads(path: Path) -> Iterator[bytes]:
    try:
        with open_bytes(path) as file:
            while data := file.read(BLOCK_BYTES):
                yield data
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: cannot be read ({reason}); check the file and its permissions, or fetch it again"
        ) from (error)


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked when its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def first_line(path: Path) -> bytes:
    """The first line, without its end; at most `MAX_LINE_BYTES`. Raises UserError as `line_blocks` does."""
    rest = b""
    for data in _reads(path):
        rest += data
        if b"\n" in rest or len(rest) > MAX_LINE_BYTES:
            break
    if not rest.strip():
        raise UserError(f"{path}: the file is empty; fetch or copy it again")
    return rest.removeprefix(_BOM).split(b"\n", 1)[0].rstrip(b"\r")


def decoded(path: Path, raw: bytes) -> str:
    """UTF-8 text. Raises UserError for other encodings."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from error


def json_object(path: Path) -> dict[str, Any]:
    """The file as one JSON object. Raises UserError for anything else, a key that occurs twice, too large a file."""
    parts: list[bytes] = []
    size = 0
    for data in _reads(path):
        size += len(data)
        if size > MAX_OBJECT_BYTES:
            raise UserError(f"{path}: over {MAX_OBJECT_BYTES >> 30} GiB for one JSON object; write JSON lines instead")
        parts.append(data)
    text = decoded(path, b"".join(parts).removeprefix(_BOM))
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); mend the file") from error
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: expected a JSON object with entries, found {type(value).__name__} {text[:40]!r}")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return value
