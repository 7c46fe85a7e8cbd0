"""A Llama of ours → Hugging Face's tensors, whole, adapters merged. PEFT's form of adapters alone: `core.peft_export`.

Nothing here holds a model: each tensor is made when it is written (`core.weight_writing`), from the weight file that
the base came from or from a row of our stacked parameters.

Legend: L layers, r rank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from core.config import LlamaConfig
from core.hf_names import Place, in_files, places
from core.llama import Llama
from core.lora import LoRAConfig, adapters, update
from core.weight_files import DTYPES, SplitFile, find_weight_files, open_weight_file
from core.weight_writing import Tensor


class NotExportable(ValueError):
    """What a format cannot hold."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a Llama: their settings, and a [L, in-axes…, r] and b [L, r, out-axes…] by the weight's path."""

    lora: LoRAConfig
    pairs: Mapping[tuple[Any, ...], tuple[Array, Array]]

    @staticmethod
    def of(llama: Llama) -> Adapters | None:
        """Those in a model, of which nothing else needs to be there; None where it has none."""
        found = adapters(llama)
        if not found:
            return None
        one = next(iter(found.values()))
        rank = one.b[...].shape[1]
        targets = tuple(str(path[-2]) for path in found)
        # alpha as it was given: alpha / r · r may miss it by a last digit.
        lora = LoRAConfig(rank, round(one.scale * rank, 9), targets, one.dropout)
        return Adapters(lora, {path: (adapter.a[...], adapter.b[...]) for path, adapter in found.items()})

    def update(self, path: tuple[Any, ...], layer: int) -> Array:
        """What is added to the weight at `path` in this layer: float32 [in-axes…, out-axes…]."""
        a, b = self.pairs[path]
        return update(a[layer], b[layer], self.lora.scale)


def checkpoint_tensors(folder: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in `core.hf_names.places`, read from its files when wanted."""
    found = {}
    for path in find_weight_files(folder):
        file = SplitFile(open_weight_file(path), in_files(config))
        for name in places(config).keys() & file.headers.keys():
            header = file.headers[name]
            found[name] = Tensor(header.shape, DTYPES[header.dtype], functools.partial(file.read, name))
    return found


def state_tensors(params: nnx.State, config: LlamaConfig) -> dict[str, Tensor]:
    """A Llama's parameters by the same names.

    Raises:
        NotExportable: weights are quantised.
    """
    arrays = dict(nnx.to_flat_state(params))
    found = {}
    for name, place in places(config).items():
        if place.path not in arrays:
            raise NotExportable("the weights are held quantised, and no file with the whole ones is known")
        array = arrays[place.path]
        found[name] = Tensor(place.layout.hf_shape, np.dtype(array.dtype), _row_reader(array, place))
    return found


def _row_reader(variable: Any, place: Place) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = variable[...] if place.layer is None else variable[...][place.layer]
        return place.layout.to_hf(np.asarray(array))

    return read


def merged_tensors(
    base: Mapping[str, Tensor], config: LlamaConfig, added: Adapters | None, dtype: np.dtype[Any] | None
) -> dict[str, Tensor]:
    """The tensors of a whole checkpoint by the names in its files: base + (alpha / r) · A B, summed in float32.

    A tied head is no tensor of its own: ours is one array with the embedding, so it cannot have been trained apart. An
    untied one is in `places`, and written.

    Args:
        base: by the names of `places`.
        added: what is merged.
        dtype: of the result, to which the sum is rounded once; None: each tensor's own in `base`.
    """
    wanted = places(config)

    def part(name: str) -> Tensor:
        place, tensor = wanted[name], base[name]
        target = tensor.dtype if dtype is None else dtype

        def read() -> np.ndarray:
            array = tensor.read()
            if added is not None and place.layer is not None and place.path in added.pairs:
                summand = np.asarray(place.layout.to_hf(added.update(place.path, place.layer)))
                array = array.astype(np.float32) + summand
            with np.errstate(over="ignore"):  # infinities are found, and named, when the file is read back
                return array.astype(target)

        return Tensor(tensor.shape, target, read)

    return {file: _joined([part(name) for name in parts]) for file, parts in in_files(config).items()}


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor of those along the first axis: that is how the files of a family with fused maps have them."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Tensor(shape, parts[0].dtype, lambda: np.concatenate([part.read() for part in parts]))
