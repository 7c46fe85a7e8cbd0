"""Codes with a limit on how many items share one: entropic optimal transport instead of each item's nearest code.

LC-Rec (arXiv 2311.09049) uses it, with equal shares, against collisions at the last level of an index.

Legend: N items, d latent width, L levels, K codes of a level.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from core.residual_quantizer import ResidualQuantizer, squared_distances
from core.suffixes import buckets


def spread_codes(
    quantizer: ResidualQuantizer,
    latents_Nd: Array,
    levels: Collection[int],
    *,
    epsilon: float = 0.02,
    iterations: int = 100,
) -> np.ndarray:
    """The codes of a whole catalogue int32 [N, L], where `levels` spread the items that agree so far over their codes.

    At such a level, n items with equal codes before it may put at most max(1, n / K) of their weight on one code; at
    the others each takes its nearest. An item's codes then depend on the catalogue that it was indexed with. Equal
    latents get equal codes.

    Args:
        quantizer: its codebooks.
        latents_Nd: float [N, d].
        levels: which levels (0 … L − 1) spread; (L − 1,) lowers collisions at the least cost in distance.
        epsilon, iterations: as of `spread`. Memory is a few arrays [N, K].

    Raises:
        ValueError: a level that the quantiser does not have, or what `spread` refuses.
    """
    unknown = sorted(set(levels) - set(range(len(quantizer.codebooks))))
    if unknown:
        raise ValueError(f"sinkhorn at level {unknown[0]}: the levels are 0 to {len(quantizer.codebooks) - 1}")
    residual_Nd, codes_NL = latents_Nd.astype(jnp.float32), np.zeros((len(latents_Nd), 0), np.int32)
    for level, codebook in enumerate(quantizer.codebooks):
        if level in levels:
            distances_NK = squared_distances(residual_Nd, codebook[...])
            _, group_N = np.unique(buckets(codes_NL), return_inverse=True)
            code_N = spread(distances_NK, jnp.asarray(group_N, jnp.int32), epsilon=epsilon, iterations=iterations)
        else:
            code_N = ResidualQuantizer([codebook[...]]).codes(residual_Nd)[:, 0]
        residual_Nd = residual_Nd - codebook[...][code_N]
        codes_NL = np.concatenate([codes_NL, np.asarray(code_N)[:, None]], axis=1)
    return codes_NL


def spread(distances_NK: Array, group_N: Array, *, epsilon: float = 0.02, iterations: int = 100) -> Array:
    """Codes int32 [N] at low total distance, where no code takes more than its share of a group.

    Each item takes the code of most weight in a transport plan (Sinkhorn-Knopp in logarithms; Cuturi, 2013): a row of
    the plan sums to 1, a column over a group of n rows to at most max(1, n / K), which for n ≥ K is an equality. The
    dual is climbed in turn by rows and by columns, whose potentials stay ≤ 0: where nothing crowds, an item keeps its
    nearest code. Taking one code a row rounds the plan, so that a share may be passed.

    Args:
        distances_NK: float [N, K], ≥ 0.
        group_N: int [N], 0 … N − 1, which items share.
        epsilon: the entropy's weight, in units of the mean distance above each item's nearest; > 0.
        iterations: of rows and columns in turn; static.

    Raises:
        ValueError: epsilon or iterations out of range.
    """
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"sinkhorn with epsilon {epsilon}, {iterations} iterations: expected above 0 and at least 1")
    return _spread(distances_NK, group_N, epsilon, iterations)


@functools.partial(jax.jit, static_argnums=3)
def _spread(distances_NK: Array, group_N: Array, epsilon: float, iterations: int) -> Array:
    num_items, num_codes = distances_NK.shape
    above_NK = distances_NK - jnp.min(distances_NK, axis=1, keepdims=True)
    affinity_NK = -above_NK / (epsilon * jnp.maximum(jnp.mean(above_NK), jnp.finfo(jnp.float32).tiny))
    # At most N groups: so many rows of potentials serve any grouping with one compilation.
    sizes_G = jnp.bincount(group_N, length=num_items)
    log_share_G1 = jnp.log(jnp.maximum(1.0, sizes_G / num_codes))[:, None]

    def climb(_: int, column_GK: Array) -> Array:
        weights_NK = affinity_NK + column_GK[group_N]
        row_N1 = -jax.nn.logsumexp(weights_NK, axis=1, keepdims=True)
        return jnp.minimum(0.0, log_share_G1 - _group_logsumexp(affinity_NK + row_N1, group_N))

    column_GK = jax.lax.fori_loop(0, iterations, climb, jnp.zeros((num_items, num_codes)))
    return jnp.argmax(affinity_NK + column_GK[group_N], axis=1).astype(jnp.int32)


def _group_logsumexp(x_NK: Array, group_N: Array) -> Array:
    """log Σ exp over the rows of each group, [N, K]; −∞ where a group has none."""
    most_GK = jax.ops.segment_max(x_NK, group_N, x_NK.shape[0])
    sums_GK = jax.ops.segment_sum(jnp.exp(x_NK - most_GK[group_N]), group_N, x_NK.shape[0])
    return most_GK + jnp.log(sums_GK)
