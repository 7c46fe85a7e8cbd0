"""Whether what was written is, read again, what it was written from: by logits.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

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
    return _by_layer(params, config, added, quantize, lambda path, array, layer: array)


def merged_logits(
    params: nnx.State, config: LlamaConfig, added: Adapters | None, dtype: np.dtype[Any] | None
) -> np.ndarray:
    """Those that the checkpoint of `core.hf_export.merged_tensors` must give: the same sums, made a layer at a time.

    Args:
        params: the base.
        added: what is merged.
        dtype: that every parameter is rounded to; None: its own.
    """
    return _by_layer(params, config, None, None, functools.partial(merged, added, dtype))


def merged(
    added: Adapters | None, dtype: np.dtype[Any] | None, path: tuple[Any, ...], array: Array, layer: int | None
) -> Array:
    """A parameter of the base (of a layer, or of none) with what is added to it, rounded once."""
    target = array.dtype if dtype is None else dtype
    if added is None or layer is None or path not in added.pairs:
        return array.astype(target)
    total = np.asarray(array).astype(np.float32) + np.asarray(added.update(path, layer))
    return jnp.asarray(total.astype(target))


def _by_layer(
    params: nnx.State,
    config: LlamaConfig,
    added: Adapters | None,
    quantize: Format | None,
    made: Callable[[tuple[Any, ...], Array, int | None], Array],
) -> np.ndarray:
    """Logits by a Llama of one layer, run with each layer's parameters in turn.

    In one program a CPU would widen the weights of all layers before the first.

    Args:
        made: (path, array, layer or None) → the parameter to compute with.
    """
    init = Init(quantize=quantize, lora=None if added is None else added.lora)
    model, abstract = abstract_model(dataclasses.replace(config, num_layers=1), Compute(), init)
    arrays = {path: leaf[...] for path, leaf in nnx.to_flat_state(params)}
    leaves = nnx.to_flat_state(abstract)
    for path, _ in leaves:
        if path not in arrays:  # an adapter's half
            assert added is not None
            a, b = added.pairs[(*path[:-2], "weight")]
            arrays[path] = a if path[-1] == "a" else b
    around = {path: made(path, arrays[path], None) for path, _ in leaves if path[0] != "layers"}

    def of_layer(layer: int) -> nnx.State:
        found = [
            (path, leaf.replace(around[path] if path in around else made(path, arrays[path][layer], layer)[None]))
            for path, leaf in leaves
        ]
        return nnx.from_flat_state(found)

    @jax.jit
    def begin(state: nnx.State, ids: Array) -> Array:
        return nnx.merge(model.graphdef, state).embed(ids)

    @jax.jit
    def go_on(state: nnx.State, x_BTD: Array) -> Array:
        return nnx.merge(model.graphdef, state).layer_outputs(x_BTD)[0]

    @jax.jit
    def end(state: nnx.State, x_BTD: Array) -> Array:
        llama = nnx.merge(model.graphdef, state)
        return llama.logits(llama.norm(x_BTD))

    with jax.default_matmul_precision("highest"):
        first = of_layer(0)
        x_BTD = begin(first, jnp.asarray(probe(config)))
        for layer in range(config.num_layers):
            # Before it is done the next layer's parameters are not needed.
            x_BTD = jax.block_until_ready(go_on(of_layer(layer), x_BTD))
        return np.asarray(end(first, x_BTD))


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
