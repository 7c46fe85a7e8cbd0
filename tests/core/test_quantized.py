"""Quantised weights against the plainest arithmetic."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.config import TINY
from core.layers import Init, LlamaLinear
from core.llama import Llama
from core.llama_loader import LlamaLoader
from core.quantized import _NF4, Format, QuantizedParam, block_size, dequantize, quantize
from tests.core.checkpoints import leaves, tensors_of, write

SHAPES = [((128, 6), 0), ((3, 64, 5), 1), ((2, 32, 5), 1), ((192, 2, 4), 0), ((172, 3), 0)]
FORMATS: list[Format] = ["int8", "nf4"]


def weights(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)


def oracle(weight: np.ndarray, axis: int, format: Format) -> np.ndarray:
    """Block by block, the nearest of all values that the block can hold."""
    moved = np.moveaxis(weight, axis, -1).copy()
    block = block_size(moved.shape[-1])
    for row in moved.reshape(-1, block):
        largest = np.abs(row).max()
        grid = np.arange(-127, 128) / 127 if format == "int8" else _NF4
        unit = np.float32(jnp.asarray(largest / (127 if format == "int8" else 1)).astype(jnp.bfloat16))
        if unit < largest / (127 if format == "int8" else 1):
            unit = np.float32(unit * (1 + 2.0**-7))  # at most one bfloat16 further
        values = (grid * 127 if format == "int8" else grid) * unit
        row[:] = values[np.abs(row[:, None] - values).argmin(axis=1)]
    return np.moveaxis(moved, -1, axis)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_every_weight_becomes_a_nearest_value(shape: tuple[int, ...], axis: int, format: Format) -> None:
    weight = weights(shape)
    codes, scales = quantize(jnp.asarray(weight), axis, format)
    found = np.asarray(dequantize(codes, scales, axis, format, jnp.float32))
    assert found.shape == shape
    # The scale is the least bfloat16 above the largest magnitude: the oracle's may lie one further, so errors compare.
    error, expected = np.abs(found - weight), np.abs(oracle(weight, axis, format) - weight)
    assert error.mean() <= expected.mean() * 1.01
    block = block_size(shape[axis])
    unit = np.repeat(np.asarray(scales.astype(jnp.float32)), block, axis=axis)
    widest = 0.5 if format == "int8" else np.diff(_NF4).max() / 2
    assert (error <= unit * widest * 1.0001).all()


@pytest.mark.parametrize("format", FORMATS)
def test_no_code_is_clipped_and_zero_stays_zero(format: Format) -> None:
    weight = weights((128, 4))
    weight[:64, 0] = 0
    codes, scales = quantize(jnp.asarray(weight), 0, format)
    found = np.asarray(dequantize(codes, scales, 0, format, jnp.float32))
    assert (found[:64, 0] == 0).all() and np.isfinite(found).all()
    largest = np.abs(weight.reshape(2, 64, 4)).max(axis=1)
    unit = np.asarray(scales.astype(jnp.float32)) * (127 if format == "int8" else 1)
    assert (unit >= largest).all() and (unit <= largest * (1 + 2.0**-7)).all()


def test_blocks_are_the_longest_that_divide() -> None:
    assert [block_size(n) for n in (4096, 11008, 128, 48, 172, 67)] == [64, 64, 64, 48, 43, 1]


def test_bytes_a_weight() -> None:
    for format, bits in (("int8", 8.25), ("nf4", 4.25)):
        codes, scales = quantize(jnp.asarray(weights((256, 64))), 0, format)
        assert 8 * (codes.nbytes + scales.nbytes) / (256 * 64) == bits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("inputs", "outputs"), [((64,), (2, 32)), ((2, 32), (64,))])
def test_a_quantised_map_and_its_gradient_are_those_of_the_dequantised_weight(
    inputs: tuple[int, ...], outputs: tuple[int, ...], format: Format
) -> None:
    linear = LlamaLinear(jax.random.key(0), "q", inputs, outputs, False, Init(quantize=format))
    held = linear.weight
    dense = dequantize(held.codes[...], held.scales[...], held.axis, format, jnp.float32).reshape(64, 64)
    x = jax.random.normal(jax.random.key(1), (5, 64))
    dy = jax.random.normal(jax.random.key(2), (5, 64))

    def through(x: jax.Array) -> jax.Array:
        return linear(x.reshape(5, *inputs)).reshape(5, 64)

    y, pull = jax.vjp(through, x)
    np.testing.assert_allclose(y, x @ dense, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(dy)[0], dy @ dense.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_llama_has_no_parameter_in_its_maps_and_is_near_the_whole_one(format: Format) -> None:
    whole, model = Llama(TINY, jax.random.key(0)), Llama(TINY, jax.random.key(0), init=Init(quantize=format))
    maps = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "weight" in path]
    assert not maps
    assert len(jax.tree.leaves(nnx.state(model, QuantizedParam))) == 2 * 7
    ids = jnp.arange(24).reshape(2, 12)
    a, b = whole.hidden(whole.embed(ids)).ravel(), model.hidden(model.embed(ids)).ravel()
    cosine = float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))
    assert cosine > (0.9999 if format == "int8" else 0.99), cosine


@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_quantised_as_they_are_read(tmp_path: Path, format: Format) -> None:
    write(tmp_path, TINY, tensors_of(TINY))
    _, whole, _ = LlamaLoader(path=tmp_path).load_model()
    _, params, _ = LlamaLoader(path=tmp_path).load_model(quantize=format)
    flat, held = leaves(whole), leaves(params)
    axes = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 0}
    for path, weight in flat.items():
        if path[-1] != "weight":
            np.testing.assert_array_equal(held[path], weight)
            continue
        codes, scales = jax.vmap(lambda w, axis=axes[path[-2]]: quantize(w, axis, format))(weight)
        np.testing.assert_array_equal(held[*path, "codes"], codes)
        np.testing.assert_array_equal(held[*path, "scales"], scales)


@pytest.mark.parametrize(("size", "format"), [(127, "int8"), (67, "nf4"), (7, "nf4")])
def test_an_axis_that_does_not_divide_is_refused(size: int, format: Format) -> None:
    with pytest.raises(ValueError, match=f"an axis of {size} does not divide"):
        quantize(jnp.zeros((size, 2)), 0, format)
