"""Full against two-level softmax: seconds for loss and gradients of one batch, over catalogue sizes.

`python benchmarks/softmax.py [--positions 4096 --width 64]`. What `--head auto` decides by is this table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from machine import header, seconds  # isort: skip  # sets jax up

import jax
import jax.numpy as jnp
import numpy as np

from core import hierarchical_softmax, softmax
from core.clustering import from_assignment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--items", type=int, nargs="+", default=[1_000, 3_416, 10_000, 30_000, 100_000])
    options = parser.parse_args()
    print(header())
    print(f"{options.positions} positions, width {options.width}, float32; seconds for loss and gradients, median of 5")
    print(
        f"{'items':>9}{'clusters':>10}{'products':>10}{'full':>10}{'two-level':>11}{'full/two-level':>16}{'full/products':>15}"
    )
    rows = []
    for items in options.items:
        rows.append(row(options.positions, options.width, items))
        limit, full, two = (rows[-1][name] for name in ("products_s", "full_s", "two_level_s"))
        print(
            f"{items:>9,}{rows[-1]['clusters']:>10}{limit:>10.4f}{full:>10.4f}{two:>11.4f}{full / two:>16.1f}"
            f"{full / limit:>15.2f}",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": header(), "rows": rows}, indent=2))


def row(positions: int, width: int, items: int) -> dict[str, float]:
    """Seconds for one catalogue size; `products` are the full softmax's three bare matrix products, its limit."""
    keys = jax.random.split(jax.random.key(0), 5)
    count = math.ceil(math.sqrt(items))
    clusters = from_assignment(np.arange(items) % count, count)
    h_TD = jax.random.normal(keys[0], (positions, width))
    table_ND = 0.02 * jax.random.normal(keys[1], (items + 1, width))
    bias_N = jnp.zeros(items + 1)
    centroids_CD = 0.02 * jax.random.normal(keys[2], (count, width))
    targets_T = jax.random.randint(keys[3], (positions,), 1, items + 1)
    weights_T = jnp.ones(positions)

    def full(h: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
        return softmax.cross_entropy([softmax.item_segment(h, table, bias)], targets_T, weights_T)

    def two_level(h: jax.Array, params: hierarchical_softmax.TwoLevelParams) -> jax.Array:
        return hierarchical_softmax.loss(h, params, clusters, targets_T, weights_T)

    def products(h: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = h @ table.T
        return logits @ table, logits.T @ h

    params = hierarchical_softmax.TwoLevelParams(centroids_CD, jnp.zeros(count), table_ND, bias_N)
    full_step = jax.jit(jax.value_and_grad(full, argnums=(0, 1, 2)))
    two_step = jax.jit(jax.value_and_grad(two_level, argnums=(0, 1)))
    bare = jax.jit(products)
    return {
        "items": items,
        "clusters": count,
        "products_s": seconds(lambda: bare(h_TD, table_ND)),
        "full_s": seconds(lambda: full_step(h_TD, table_ND, bias_N)),
        "two_level_s": seconds(lambda: two_step(h_TD, params)),
    }


if __name__ == "__main__":
    main()
