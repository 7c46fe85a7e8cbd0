"""Variables of a model by our own names: all of them, or those that Hugging Face's formats cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # safetensors finds bfloat16 by it
import numpy as np
from flax import nnx
from safetensors import safe_open

from core.functional import Buffer, filled, named
from core.lora import LoRAParam
from core.quantized import QuantizedParam
from core.read_back import ReadBackError
from core.weight_writing import Tensor
from efficientids.recommenders.base import Histories, Ranked, Recommender, in_llama
from efficientids.systems.base import abstract

_KINDS = {LoRAParam: "adapter", QuantizedParam: "quantised", Buffer: "buffer", nnx.Param: "parameter"}
_PROBED_K = 5


class Variable(NamedTuple):
    """A variable: `kind` a word of what it is, `part` the module that it belongs to in its own words, perhaps none."""

    tensor: Tensor
    kind: str
    part: str


def variables(model: nnx.Module, *, with_llama: bool) -> dict[str, Variable]:
    """The variables of a model by their paths, as in "items.table_NE"."""
    found = {}
    for name, variable in named(nnx.state(model)).items():
        path = tuple(name.split("."))
        if with_llama or not in_llama(path, variable):
            kind = next((word for known, word in _KINDS.items() if isinstance(variable, known)), "state")
            found[name] = Variable(Tensor.of(variable[...]), kind, _part(model, path))
    return found


def read_model(folder: Path, files: list[str], recommender: Recommender) -> nnx.Module:
    """The model of a recommender from files that hold all its variables.

    Raises:
        ReadBackError: variables are missing, or of another shape or dtype, or there are more.
    """

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for file in files:
            with safe_open(folder / file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  # no dictionary
                    yield name, opened.get_tensor(name)

    try:
        return filled(*abstract(recommender), tensors())
    except ValueError as error:
        raise ReadBackError(f"read back: {error}") from error


def probe(recommender: Recommender, model: nnx.Module) -> Ranked:
    """Recommendations to compare two models by: after item 1 once, and twice. Every catalogue has it."""
    histories = Histories(np.array([[1, 0], [1, 1]], np.int32), np.array([1, 2], np.int32))
    return recommender.recommend(model, histories, _PROBED_K, None)


def compare_ranked(found: Ranked, expected: Ranked) -> None:
    """Raises ReadBackError unless items and scores are the same: they come from the same bits by the same program."""
    if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise ReadBackError("read back, the model recommends other items, or with other scores")


def _part(model: nnx.Module, path: tuple[Any, ...]) -> str:
    """The first line of the text of the part that a variable is in; none where it is the model's own."""
    part = getattr(model, str(path[0]), None) if len(path) > 1 else None
    known = part is not None and type(part).__module__.split(".")[0] in ("core", "efficientids")
    return (type(part).__doc__ or "").strip().split("\n")[0] if known else ""
