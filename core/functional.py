"""Models as values: a graph definition with a pure `apply`, variables by name, and the variable type of buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


class Buffer(nnx.Variable):
    """State that belongs to a model but is never differentiated: cluster assignments, code tables, tries.

    An argument of the compiled step (never closed over) and saved with the model.
    """


@dataclasses.dataclass(frozen=True)
class FunctionalModel:
    """A model without its parameters.

    `apply` is a pure function of the parameters and inputs, so `jax.jit`, `jax.grad` and friends take it as it is.
    """

    graphdef: nnx.GraphDef[Any]

    def apply(self, params: nnx.State, **inputs: Any) -> Any:
        """Calls the module with `params` (complete: every parameter and buffer) on `inputs`."""
        return nnx.merge(self.graphdef, params)(**inputs)


def named(state: nnx.State) -> dict[str, Any]:
    """Variables by their paths, as in "items.table_NE"."""
    return {_name(path): variable for path, variable in nnx.to_flat_state(state)}


def filled(graphdef: nnx.GraphDef, state: nnx.State, arrays: Iterable[tuple[str, np.ndarray]]) -> nnx.Module:
    """The model of an abstract `state` with the given arrays by their names (`named`).

    Raises:
        ValueError: an array is unknown, given twice, or of another shape or dtype; or some are missing.
    """
    leaves = {_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    found = []
    for name, array in arrays:
        path, leaf = leaves.pop(name, ((), None))
        if leaf is None or (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} {array.dtype} {list(array.shape)} is not of this model")
        found.append((path, leaf.replace(jnp.asarray(array))))
    if leaves:
        raise ValueError(f"not there: {', '.join(leaves)}")
    return nnx.merge(graphdef, nnx.from_flat_state(found))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
