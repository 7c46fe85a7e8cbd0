"""Item vectors: what a tokenizer is made from. On disk V.npy, float32 [N + 1, I], and V.json beside it.

V.json says whose items the rows are (`items_sha256`) and which columns came from which source; a .npy without it is
taken as it is, one source.

Legend: N items (1 … N; row 0 is zeros), I columns, all sources together.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efficientids.data.cooccurrence import cooccurrence_vectors
from efficientids.data.dataset import Dataset
from efficientids.data.manifest import map_array
from efficientids.errors import UserError

FORMAT = "efficientids-item-vectors"
COOCCURRENCE_DIM, COOCCURRENCE_WINDOW = 256, 10


@dataclasses.dataclass(frozen=True, eq=False)
class ItemVectors:
    """Vectors of a catalogue's items.

    Attributes:
        vectors_NI: float32 [N + 1, I], all finite; row 0 zeros. An item about which a source knows nothing has zeros in
            that source's columns.
        sources: name and number of columns of each source, in the order of the columns.
    """

    vectors_NI: np.ndarray
    sources: tuple[tuple[str, int], ...]

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.vectors_NI) - 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each source."""
        return tuple(width for _, width in self.sources)


@dataclasses.dataclass(frozen=True, eq=False)
class Standard:
    """A shift and a scale that make vectors of any source what a tokenizer is trained on.

    Each source's columns are centred and divided by one number, so that sources count alike whatever their widths and
    units, and the mean square of all is 1. Within a source, and so for one source alone, no distance ratio changes.
    What it does to an item depends on no other item: new ones are treated as those were that it was made from.

    Attributes:
        mean_I, scale_I: float32 [I].
        widths: columns of each source.
    """

    mean_I: np.ndarray
    scale_I: np.ndarray
    widths: tuple[int, ...]

    @staticmethod
    def of(vectors: ItemVectors) -> Standard:
        """That of a catalogue.

        Raises:
            UserError: a source whose vectors are all equal.
        """
        known_NI, mean_I, scale_I = vectors.vectors_NI[1:], [], []
        for (name, width), columns in zip(vectors.sources, _columns(vectors.widths), strict=True):
            some_MI = known_NI[:, columns].astype(np.float64)
            some_MI = some_MI[some_MI.any(axis=1)]
            mean = some_MI.mean(axis=0) if len(some_MI) else np.zeros(width)
            spread = math.sqrt(np.mean((some_MI - mean) ** 2)) if len(some_MI) else 0.0
            # Equal vectors differ by the rounding of their mean.
            if not spread > 1e-6 * np.abs(mean).max(initial=0.0):
                raise UserError(
                    f"item vectors of source {name}: they are all equal, so they tell no item from another; give others"
                )
            total = math.sqrt(sum(vectors.widths) / (len(vectors.widths) * width))
            mean_I.append(mean)
            scale_I.append(np.full(width, total / spread))
        return Standard(
            np.concatenate(mean_I).astype(np.float32), np.concatenate(scale_I).astype(np.float32), vectors.widths
        )

    def apply(self, vectors: ItemVectors) -> np.ndarray:
        """Float32 [N + 1, I]; zeros stay zeros: what is not known is the mean.

        Raises:
            UserError: vectors of other sources' widths.
        """
        if vectors.widths != self.widths:
            raise UserError(
                f"item vectors with {_in_words(vectors.widths)}, where the tokenizer was made from "
                f"{_in_words(self.widths)}; make them as those were made (embed-items with the same flags)"
            )
        out_NI = (vectors.vectors_NI - self.mean_I) * self.scale_I
        for columns in _columns(self.widths):
            out_NI[~vectors.vectors_NI[:, columns].any(axis=1), columns] = 0
        return out_NI


def unit_rows(vectors_MI: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; zeros stay zeros. By direction alone: popular items have long vectors."""
    lengths = np.linalg.norm(vectors_MI, axis=1, keepdims=True)
    return (vectors_MI / np.maximum(lengths, 1e-12)).astype(np.float32)


def joined(parts: Sequence[tuple[str, np.ndarray]]) -> ItemVectors:
    """Sources side by side: name and vectors [N + 1, I of it] of each; their rows get length 1."""
    columns = [unit_rows(vectors) for _, vectors in parts]
    sources = tuple((name, part.shape[1]) for (name, _), part in zip(parts, columns, strict=True))
    return ItemVectors(np.concatenate(columns, axis=1), sources)


def from_histories(dataset: Dataset, dim: int, seed: int) -> np.ndarray:
    """Co-occurrence vectors [N + 1, dim] of the training part of a data set's histories."""
    items, offsets = dataset.training_histories()
    size = dataset.catalogue_size
    found = cooccurrence_vectors(items, offsets, size, dim=dim, window=COOCCURRENCE_WINDOW, seed=seed)
    return np.concatenate([np.zeros((1, dim), np.float32), found])


def write_vectors(file: Path, vectors: ItemVectors, dataset: Dataset) -> None:
    """Writes FILE.npy and FILE.json, each whole or not at all; the .json last.

    Raises:
        UserError: the files cannot be written.
    """
    described = {
        "format": FORMAT,
        "items_sha256": dataset.items_sha256,
        "dataset": dataset.manifest["name"],
        "num_items": vectors.num_items,
        "width": vectors.vectors_NI.shape[1],
        "sources": [{"name": name, "columns": width} for name, width in vectors.sources],
    }
    try:
        # Numbers that change under an old description would be taken for what it says.
        _sidecar(file).unlink(missing_ok=True)
        beside = file.with_name(f".{file.name}.partial")
        with beside.open("wb") as stream:
            np.save(stream, vectors.vectors_NI.astype(np.float32), allow_pickle=False)
        os.replace(beside, file)
        beside.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, _sidecar(file))
    except OSError as error:
        raise UserError(f"--output {file} cannot be written ({error}); give another place") from error


def read_vectors(file: Path, dataset: Dataset, flag: str = "--vectors") -> ItemVectors:
    """The vectors of a data set's items.

    Without FILE.json beside it, [N, I] is taken as items 1 … N and [N + 1, I] as having the padding's row.

    Raises:
        UserError: no such file, no numbers, NaN, another number of items, or the items of another data set.
    """
    if not file.is_file():
        raise UserError(f"{flag} {file}: no such file; make one with `python -m efficientids embed-items`")
    try:
        array = np.asarray(map_array(file))
    except UserError as error:
        raise UserError(f"{flag}: {str(error).split('. ')[0]}") from error
    size = dataset.catalogue_size
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or array.shape[1] < 1:
        raise UserError(f"{flag} {file}: {array.dtype} of shape {list(array.shape)}; expected floats [{size}, width]")
    sources: tuple[tuple[str, int], ...] = ((file.stem, array.shape[1]),)
    rows = [size, size + 1]
    if _sidecar(file).is_file():
        sources, rows = _described(file, array, dataset, flag), [size + 1]
    if len(array) not in rows:
        expected = " or ".join(f"{count:,}" for count in rows)
        raise UserError(
            f"{flag} {file}: {len(array):,} rows; the {size:,} items of {dataset.path} need {expected} (one an item in "
            "the order of items.parquet, with or without a first row for padding); make them for this data set"
        )
    vectors_NI = np.zeros((size + 1, array.shape[1]), np.float32)
    vectors_NI[1:] = array[-size:]
    finite = np.isfinite(vectors_NI).all(axis=1)
    if not finite.all():
        item = int(np.argmin(finite))
        raise UserError(
            f"{flag} {file}: the vector of item {item} holds NaN or infinity ({int((~finite).sum())} items do); make "
            "them again"
        )
    return ItemVectors(vectors_NI, sources)


def _described(file: Path, array: np.ndarray, dataset: Dataset, flag: str) -> tuple[tuple[str, int], ...]:
    """The sources that FILE.json names, after its items were found to be the data set's."""
    sidecar = _sidecar(file)
    try:
        described = json.loads(sidecar.read_text(encoding="utf-8"))
        items = described["items_sha256"]
        sources = tuple((str(source["name"]), int(source["columns"])) for source in described["sources"])
        if described["format"] != FORMAT or sum(width for _, width in sources) != array.shape[1]:
            raise ValueError(f"format {described['format']!r}, columns {[width for _, width in sources]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{sidecar}: does not describe {file.name} of {array.shape[-1]} columns ({error!r}); make both again"
        ) from error
    if items != dataset.items_sha256:
        raise UserError(
            f"{flag} {file}: vectors of other items ({described.get('num_items')} of {described.get('dataset')}) than "
            f"those of {dataset.path}; make them for this data set with `python -m efficientids embed-items`"
        )
    return sources


def _sidecar(file: Path) -> Path:
    return file.with_suffix(".json")


def _columns(widths: Sequence[int]) -> list[slice]:
    ends = np.cumsum(widths).tolist()
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def _in_words(widths: Sequence[int]) -> str:
    return f"{' + '.join(map(str, widths))} columns"
