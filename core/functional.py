"""Models as values: a graph definition with a pure `apply`, and the variable type of buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

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
