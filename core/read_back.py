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
from core.quantized import Format
from core.weight_writing import Tensor

TOLERANCE = 1e-4
"""Of logits in float32, `difference`: what the order of summation may do."""


class ReadBackError(ValueError):
    """What was written is not, read again, what it was written from."""


def merged_params(
    params: nnx.State, config: LlamaConfig, added: Adapters | None, dtype: np.dtype[Any] | None
) -> nnx.State:
    """What the checkpoint of `core.hf_export.merged_tensors` must be when it is loaded: the same sums, in our layout.

    Args:
        params: the base.
        added: what is merged.
        dtype: that every parameter is rounded to; None: its own.
    """
    arrays = dict(nnx.to_flat_state(params))
    for path, leaf in arrays.items():
        array = leaf[...]
        target = array.dtype if dtype is None else dtype
        if added is None or path not in added.pairs:
            arrays[path] = leaf.replace(array.astype(target))
            continue
        rows = np.empty(array.shape, target)
        for layer in range(config.num_layers):
            rows[layer] = np.asarray(array[layer]).astype(np.float32) + np.asarray(added.update(path, layer))
        arrays[path] = leaf.replace(jnp.asarray(rows))
    return nnx.from_flat_state([*arrays.items()])


def rounds(
    base: Mapping[str, Tensor], config: LlamaConfig, added: Adapters | None, dtype: np.dtype[Any] | None
) -> bool:
    """Whether merging and casting lose digits of float32."""
    for name, place in places(config).items():
        source = base[name].dtype
        target = source if dtype is None else dtype
        is_merged = added is not None and place.path in added.pairs
        if target.itemsize < 4 and (is_merged or jnp.promote_types(source, target) != target):
            return True
    return False


def probe(config: LlamaConfig) -> np.ndarray:
    """Token ids to compare logits on: the first of the vocabulary, and random ones, int32 [2, T]; T is 16 at most."""
    length = min(16, config.max_position_embeddings, config.sliding_window or 16)
    random = np.random.default_rng(0).integers(0, config.vocab_size, length)
    return np.stack([np.arange(length) % config.vocab_size, random]).astype(np.int32)


def logits(
    params: nnx.State, config: LlamaConfig, added: Adapters | None = None, quantize: Format | None = None
) -> np.ndarray:
    """The logits float32 [B, T, V] of a Llama's parameters after `probe`, adapters beside the weights; in float32.

    `params` may be of any dtype, or its layers in the format `quantize`: one layer at a time is widened.
    """
    model, abstract = abstract_model(
        config, Compute(), Init(quantize=quantize, lora=None if added is None else added.lora)
    )
    arrays = dict(nnx.to_flat_state(params))
    for path, leaf in nnx.to_flat_state(abstract):
        if path not in arrays:  # an adapter's half
            assert added is not None
            a, b = added.pairs[(*path[:-2], "weight")]
            arrays[path] = leaf.replace(a if path[-1] == "a" else b)
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda params, ids: model.apply(params, input_ids=ids))
        return np.asarray(forward(nnx.from_flat_state([*arrays.items()]), probe(config)))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """max|found − expected| / max|expected|."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(found: np.ndarray, expected: np.ndarray) -> float:
    """`difference` of logits that should be equal but for the order of summation.

    Raises:
        ReadBackError: more than `TOLERANCE`, or not a number.
    """
    error = difference(found, expected)
    if not error <= TOLERANCE:
        raise ReadBackError(
            f"read back, the logits differ from the model's by {error:.2g} of the largest; at most {TOLERANCE:.0e} is "
            "the order of summation"
        )
    return error
