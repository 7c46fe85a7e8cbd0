"""What int8 and nf4 change of a pretrained Llama: its weights, its next-token distribution, its perplexity.

`python benchmarks/quantization.py --weights stories260K/hf [--positions 128 --rows 16]`

The text is sampled from the model itself in float32, from BOS on. Every format is compared with float32; bfloat16
parameters stand beside them, as what a frozen Llama is usually held in. KL is the mean of KL(float32 ‖ format) over
positions, in nats; agreement is the share of positions with the same most probable token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from machine import header  # isort: skip  # sets jax up

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.llama_loader import LlamaLoader
from core.quantized import dequantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    print(header())
    whole, parameters = held(options.weights, param_dtype=jnp.float32)
    ids_BT = sampled(whole, options.rows, options.positions)
    expected = logits(whole, ids_BT)
    print(f"{'held in':<10}{'layers, bytes':>15}{'weight error':>14}{'KL':>10}{'agreement':>11}{'perplexity':>12}")
    print(f"{'float32':<10}{layer_bytes(parameters):>15,}{'':>35}{perplexity(expected, ids_BT):>12.3f}")
    for name, how in (
        ("bfloat16", {"param_dtype": jnp.bfloat16}),
        ("int8", {"param_dtype": jnp.float32, "quantize": "int8"}),
        ("nf4", {"param_dtype": jnp.float32, "quantize": "nf4"}),
    ):
        model, parameters = held(options.weights, **how)
        found = logits(model, ids_BT)
        p, q = jax.nn.log_softmax(expected), jax.nn.log_softmax(found)
        kl = float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
        agreement = float(jnp.mean(jnp.argmax(expected, -1) == jnp.argmax(found, -1)))
        print(
            f"{name:<10}{layer_bytes(parameters):>15,}{weight_error(whole, model):>14.2%}{kl:>10.5f}{agreement:>11.2%}"
            f"{perplexity(found, ids_BT):>12.3f}"
        )


def held(weights: Path, **how: Any) -> tuple[Any, nnx.State]:
    """The model held in some way, and its parameters."""
    model, params, _ = LlamaLoader(path=weights).load_model(**how)
    return nnx.merge(model.graphdef, params), params


@nnx.jit
def logits(model: Any, ids_BT: jax.Array) -> jax.Array:
    """[B, T, V], computed in float32."""
    return model(ids_BT)


def sampled(model: Any, rows: int, positions: int, bos: int = 1) -> jax.Array:
    """Text of the model's own, int32 [B, T], at temperature 1."""
    ids_BT = jnp.full((rows, positions), bos, jnp.int32)
    for place in range(1, positions):
        following_BV = logits(model, ids_BT)[:, place - 1]
        ids_BT = ids_BT.at[:, place].set(jax.random.categorical(jax.random.key(place), following_BV))
    return ids_BT


def layer_bytes(params: nnx.State) -> int:
    """Bytes of the stacked layers: what quantising changes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))


def perplexity(logits_BTV: jax.Array, ids_BT: jax.Array) -> float:
    """exp of the mean negative log-likelihood of each next token."""
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV[:, :-1]), ids_BT[:, 1:, None], axis=-1)
    return float(jnp.exp(-logp.mean()))


def weight_error(whole: Any, other_model: Any) -> float:
    """‖W − Ŵ‖ / ‖W‖ over all linear maps of the layers."""
    difference = total = 0.0
    for part, names in (("attention", "q k v o"), ("mlp", "gate up down")):
        for name in names.split():
            weight = getattr(getattr(whole.layers, part), name).weight[...].astype(jnp.float32)
            other = getattr(getattr(other_model.layers, part), name).weight
            if hasattr(other, "codes"):
                axis, format = other.axis, other.format
                dense = jax.vmap(lambda c, s, a=axis, f=format: dequantize(c, s, a, f, jnp.float32))
                other_dense = dense(other.codes[...], other.scales[...])
            else:
                other_dense = other[...].astype(jnp.float32)
            difference += float(jnp.sum((weight - other_dense) ** 2))
            total += float(jnp.sum(weight**2))
    return float(np.sqrt(difference / total))


if __name__ == "__main__":
    main()
