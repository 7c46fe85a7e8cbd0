"""Whether what was written is, read again, what it was written from: by logits.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.config import LlamaConfig
from core.hf_export import Adapters
from core.hf_names import places
from core.layers import Init
from core.llama import Compute
from core.llama_loader import abstract_model
from core.weight_writing import Tensor

# Of logits, max|a − b| / max|b|: what rounding every weight once may do. bfloat16 keeps 8 bits of a weight, float16 11.
TOLERANCES = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-4, "float64": 1e-4}


class ReadBackError(ValueError):
    """What was written is not, read again, what it was written from."""


def merging_tolerance(
    base: Mapping[str, Tensor], config: LlamaConfig, added: Adapters | None, dtype: np.dtype[Any] | None
) -> float:
    """How far the logits of `merged_tensors` may be from those of base and adapters: by what is rounded, if any is."""
    found = [TOLERANCES["float32"]]
    for name, place in places(config).items():
        source = base[name].dtype
        target = source if dtype is None else dtype
        is_merged = added is not None and place.path in added.pairs
        if is_merged or jnp.promote_types(source, target) != target:
            found.append(TOLERANCES[target.name])
    return max(found)


def probe(config: LlamaConfig) -> np.ndarray:
    """Token ids to compare logits on: the first of the vocabulary, and random ones, int32 [2, T]; T is 16 at most."""
    length = min(16, config.max_position_embeddings, config.sliding_window or 16)
    random = np.random.default_rng(0).integers(0, config.vocab_size, length)
    return np.stack([np.arange(length) % config.vocab_size, random]).astype(np.int32)


def logits(params: nnx.State, config: LlamaConfig, added: Adapters | None = None) -> np.ndarray:
    """The logits float32 [B, T, V] of a Llama's parameters after `probe`, adapters beside the weights; in float32.

    `params` may be of any dtype: one layer at a time is widened.
    """
    model, abstract = abstract_model(config, Compute(), Init(lora=None if added is None else added.lora))
    arrays = dict(nnx.to_flat_state(params))
    for path, leaf in nnx.to_flat_state(abstract):
        if path not in arrays:  # an adapter's half
            assert added is not None
            a, b = added.pairs[(*path[:-2], "weight")]
            arrays[path] = leaf.replace(a if path[-1] == "a" else b)
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda params, ids: model.apply(params, input_ids=ids))
        return np.asarray(forward(nnx.from_flat_state([*arrays.items()]), probe(config)))


def compare(found: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    """max|found − expected| / max|expected| of logits.

    Raises:
        ReadBackError: more than `tolerance`, or not a number.
    """
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= tolerance:
        raise ReadBackError(
            f"read back, the logits differ from the model's by {error:.2g} of the largest; at most {tolerance:.0e} is "
            "rounding"
        )
    return error
