"""Texts tokenised once: a content-addressed cache of token ids.

    $EFFICIENTIDS_CACHE/tokens/KEY/     (without the variable: ~/.cache/efficientids/tokens/KEY/)
        tokens.npy      int32 [n], all texts' token ids in a row, of full length
        offsets.npy     int64 [N + 1]: text i has tokens offsets[i] … offsets[i + 1] − 1
        manifest.json   sizes, and the sha256 of both files

KEY is a sha256 of all that decides the tokens: the texts in order, the bytes of tokenizer.json, the version of the
tokenizers library and of this format. An entry is written beside its place and renamed into it, so that it is there
whole or not at all, however many processes write it and whenever they are killed. It is verified when it is read; a
damaged one is made anew.

Legend: N texts, n tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import tokenizers

from core.platform import cache_root
from efficientids.data import layout
from efficientids.data.preparation.progress import Progress

VARIABLE = "EFFICIENTIDS_CACHE"
FORMAT_VERSION = 1
"""Raise it when the same texts and tokenizer would come to other tokens or other files."""

_TOKENS, _OFFSETS, _MANIFEST = "tokens.npy", "offsets.npy", "manifest.json"
# Texts at a time: what the tokenizer makes of a text takes about 100 bytes a token until it is written.
_CHUNK = 2048
# A folder of a build that nobody has written to for so long belongs to a process that was killed.
_ABANDONED_S = 3600.0

Texts = Callable[[], Iterator[pl.Series]]
"""Makes the texts, in chunks of any size (String, no nulls); called twice, it must make the same ones."""


class Tokens(NamedTuple):
    """Token ids of N texts: `tokens` int32 [n], `offsets` int64 [N + 1]; memory-mapped where they come from files."""

    tokens: np.ndarray
    offsets: np.ndarray


def tokenised(texts: Texts, total: int, tokenizer: Path, encoder: tokenizers.Tokenizer) -> Tokens:
    """The tokens of `texts`, from the cache where it has them; else they are made and kept there.

    Where the cache cannot be written, one line on stderr says so and the tokens are made in memory.

    Args:
        total: how many texts there are: what progress lines count towards.
        tokenizer: the tokenizer.json that `encoder` was read from.
    """
    key = key_of(texts, tokenizer)
    try:
        entry = root() / key
        found = _open(entry)
        return _build(entry, texts, total, encoder) if found is None else found
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        _say_once(f"no token cache ({error}): tokenising without it; set {VARIABLE} to a folder that can be written")
    chunks = list(_encode(texts, total, encoder))
    lengths = np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths in chunks)])
    return Tokens(np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in chunks)]), np.cumsum(lengths))


def root() -> Path:
    """The folder of the entries. Raises RuntimeError where neither the variable nor a home directory is known."""
    return cache_root() / "tokens"


def key_of(texts: Texts, tokenizer: Path) -> str:
    """64 hexadecimal digits; see the head of this file."""
    # Lengths apart from the characters: ["ab", "c"] and ["a", "bc"] differ, however the texts are cut into chunks.
    lengths, characters = hashlib.sha256(), hashlib.sha256()
    for chunk in texts():
        lengths.update(chunk.str.len_bytes().to_numpy().astype("<i8").tobytes())
        characters.update("".join(chunk.to_list()).encode())
    parts = (
        f"efficientids tokens {FORMAT_VERSION}, tokenizers {tokenizers.__version__}",
        layout.sha256_of(tokenizer),
        lengths.hexdigest(),
        characters.hexdigest(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _open(entry: Path, report: bool = True) -> Tokens | None:
    """A whole, undamaged entry; None where there is none or it is damaged, which a line reports."""
    if not entry.exists():
        return None
    try:
        files = json.loads((entry / _MANIFEST).read_bytes())["files"]
        for name in (_TOKENS, _OFFSETS):
            if layout.sha256_of(entry / name) != files[name]["sha256"]:
                raise ValueError(f"{name} is not what {_MANIFEST} says")
        return _mapped(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if report:
            print(f"token cache: {entry} is damaged ({error}); tokenising anew", file=sys.stderr, flush=True)
        return None


def _mapped(entry: Path) -> Tokens:
    offsets = np.load(entry / _OFFSETS, allow_pickle=False)
    # An empty array cannot be memory-mapped.
    mode: Any = "r" if offsets[-1] else None
    return Tokens(np.asarray(np.load(entry / _TOKENS, mmap_mode=mode, allow_pickle=False)), offsets)


def _build(entry: Path, texts: Texts, total: int, encoder: tokenizers.Tokenizer) -> Tokens:
    """Writes the entry and returns it. Another process may do the same at the same time: both get their own."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _sweep(entry.parent)
    new = Path(tempfile.mkdtemp(prefix=f".new-{entry.name[:16]}-", dir=entry.parent))
    try:
        new.chmod(0o755)  # mkdtemp makes it private to the user
        _write(new, texts, total, encoder)
        # Opened before it has its name: from then on it is everybody's, and may be replaced.
        made = _mapped(new)
        _publish(new, entry)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return made


def _write(folder: Path, texts: Texts, total: int, encoder: tokenizers.Tokenizer) -> None:
    lengths = [np.zeros(1, np.int64)]
    with (folder / _TOKENS).open("wb") as file:
        # NumPy leaves room in the header for the axis to grow; the length is filled in at the end.
        header = {"descr": "<i4", "fortran_order": False, "shape": (0,)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        for ids, length in _encode(texts, total, encoder):
            file.write(ids.astype("<i4").tobytes())
            lengths.append(length)
        offsets = np.cumsum(np.concatenate(lengths))
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (int(offsets[-1]),)})
        if file.tell() != begin:
            raise AssertionError(f"the header of {_TOKENS} grew from {begin} to {file.tell()} bytes")
    np.save(folder / _OFFSETS, offsets, allow_pickle=False)
    manifest = {
        "format": "efficientids-tokens",
        "format_version": FORMAT_VERSION,
        "tokenizers": tokenizers.__version__,
        "num_texts": len(offsets) - 1,
        "num_tokens": int(offsets[-1]),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": layout.sha256_of(folder / name)}
            for name in (_TOKENS, _OFFSETS)
        },
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _publish(new: Path, entry: Path) -> None:
    """Renames `new` to `entry`, unless another process was first; a damaged entry gives way."""
    for _ in range(3):  # more would mean that somebody damages entries as fast as they are made
        try:
            os.rename(new, entry)  # fails where a folder with content has the name
            return
        except OSError:
            if not entry.exists():
                raise
        if _open(entry, report=False) is not None:
            return
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent))
        try:
            os.rename(entry, aside / "entry")
        except FileNotFoundError:
            pass  # another process has moved it aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what killed processes have left."""
    for left in (*folder.glob(".new-*"), *folder.glob(".damaged-*")):
        try:
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except OSError:  # its owner has just removed it
            continue
        if time.time() - newest > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def _encode(texts: Texts, total: int, encoder: tokenizers.Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids int32 in a row and the length int64 of each text, some texts at a time."""
    progress, done = Progress(), 0
    for chunk in texts():
        for piece in (chunk[first : first + _CHUNK] for first in range(0, len(chunk), _CHUNK)):
            encoded = encoder.encode_batch_fast(piece.to_list(), add_special_tokens=False)
            ids = [np.asarray(encoding.ids, np.int32) for encoding in encoded]
            yield np.concatenate(ids), np.array([len(row) for row in ids], np.int64)
            done += len(piece)
            progress.say(f"tokenised {done:,}/{total:,} texts")


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
