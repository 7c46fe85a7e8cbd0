"""Residual quantisation: a vector as a sum of codes, one a level, each nearest to what the levels before left over.

Legend: B vectors, d their width, L levels, K codes of a level (levels may differ), N vectors to index, P vectors of a
pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

ResidualGrad = Literal["straight_through", "passthrough"]
INDEXED_AT_A_TIME = 8192
"""Vectors whose distances are alive at a time in `codes`: 8 MiB in float32 a level of 256 codes."""


class Quantized(NamedTuple):
    """What `ResidualQuantizer.quantize` finds.

    Attributes:
        codes_BL: int32 [B, L], local to each level: 0 … K − 1.
        vectors_Bd: float32 [B, d], the sum of the codes' vectors. Its gradient goes to the latents as it is (straight
            through, arXiv 1308.3432) and never to the codebooks.
        distances: a level's squared distances float32 [B, K] from its residual to its codes, differentiable.
        losses_BL: float32 [B, L], mean over d of (e − sg r)² + beta·(sg e − r)² with residual r and code vector e
            (arXiv 1711.00937, eq. 3). The paper's loss is the mean over all B and L.
    """

    codes_BL: Array
    vectors_Bd: Array
    distances: tuple[Array, ...]
    losses_BL: Array


class ResidualQuantizer(nnx.Module):
    """Codebooks that gradients train, one a level (arXiv 2107.03312; as in TIGER, arXiv 2305.05065).

    Attributes:
        codebooks: float32 [K, d] a level.
        beta: weight of the commitment term.
        residual_grad: where a deeper level's gradient goes. "straight_through", the official code's: the next residual
            is r − (r + sg(e − r)), whose derivative by r is zero, so that levels behind the first give the latents
            nothing. "passthrough": it is r − sg(e), and every level's gradient reaches the latents. Values are equal.
    """

    def __init__(
        self,
        codebooks: Sequence[Array | np.ndarray],
        beta: float = 0.25,
        residual_grad: ResidualGrad = "straight_through",
    ) -> None:
        """Raises ValueError: no level, codebooks that are not [K, d] with K ≥ 1 and one d, or an unknown name."""
        shapes = [codebook.shape for codebook in codebooks]
        if not shapes or any(len(shape) != 2 or shape[0] < 1 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"codebooks of shapes {shapes}: expected one [K, d] a level, K ≥ 1, all of the same d")
        if residual_grad not in get_args(ResidualGrad):
            raise ValueError(f"residual_grad {residual_grad!r}: expected one of {', '.join(get_args(ResidualGrad))}")
        self.codebooks = nnx.List([nnx.Param(jnp.asarray(codebook, jnp.float32)) for codebook in codebooks])
        self.beta, self.residual_grad = beta, residual_grad

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """K of each level."""
        return tuple(codebook.shape[0] for codebook in self.codebooks)

    def quantize(self, latents_Bd: Array) -> Quantized:
        """Latents [B, d] of any float dtype, along their own nearest codes."""
        latents_Bd = latents_Bd.astype(jnp.float32)
        residual_Bd, sum_Bd = latents_Bd, jnp.zeros_like(latents_Bd)
        codes, distances, losses = [], [], []
        for codebook in self.codebooks:
            distance_BK = squared_distances(residual_Bd, codebook[...])
            code_B = jnp.argmin(distance_BK, axis=1).astype(jnp.int32)
            e_Bd, stop = codebook[...][code_B], jax.lax.stop_gradient
            commitment_Bd = (stop(e_Bd) - residual_Bd) ** 2
            losses.append(jnp.mean((e_Bd - stop(residual_Bd)) ** 2 + self.beta * commitment_Bd, axis=1))
            codes.append(code_B)
            distances.append(distance_BK)
            sum_Bd += stop(e_Bd)
            residual_Bd = residual_Bd - stop(e_Bd)
            if self.residual_grad == "straight_through":
                residual_Bd = stop(residual_Bd)
        # The straight-through steps of the levels telescope: in value their sum is Σ e, in gradient the identity.
        vectors_Bd = latents_Bd + stop(sum_Bd - latents_Bd)
        return Quantized(jnp.stack(codes, axis=1), vectors_Bd, tuple(distances), jnp.stack(losses, axis=1))

    def codes(self, latents_Nd: Array) -> Array:
        """The codes alone, int32 [N, L], of any number of latents: in chunks, for a whole catalogue."""

        def one(latent_d: Array) -> Array:
            return self.quantize(latent_d[None]).codes_BL[0]

        return jax.lax.map(one, latents_Nd, batch_size=max(1, min(INDEXED_AT_A_TIME, latents_Nd.shape[0])))

    def replace(self, codebooks: Sequence[Array | np.ndarray]) -> None:
        """Puts other codebooks of the same shapes in place: those of `core.residual_kmeans` before training.

        Raises:
            ValueError: other shapes.
        """
        found, expected = ([tuple(book.shape) for book in books] for books in (codebooks, self.codebooks))
        if found != expected:
            raise ValueError(f"codebooks of shapes {found} cannot replace those of {expected}")
        for param, codebook in zip(self.codebooks, codebooks, strict=True):
            param[...] = jnp.asarray(codebook, jnp.float32)

    def revive(self, counts: Sequence[Array], latents_Pd: Array, key: Array) -> Array:
        """Moves codes that nothing used onto residuals of a pool, in place; how many a level, int32 [L].

        A dead code gets the residual of a random latent at that level, a different one for each as far as the pool
        goes. Levels are done in order, each on the residuals that the levels before now leave. An optimiser's moments
        of the moved rows stay as they were.

        Args:
            counts: a level's uses [K] over a window (`count_codes`).
            latents_Pd: float [P, d], P ≥ 1.
            key: for the draws.

        Raises:
            ValueError: `counts` does not fit the levels.
        """
        found = tuple(count.shape for count in counts)
        if found != tuple((size,) for size in self.level_sizes):
            raise ValueError(f"counts of shapes {found} for levels of {self.level_sizes} codes")
        residual_Pd, revived = latents_Pd.astype(jnp.float32), []
        for level, (codebook, count_K) in enumerate(zip(self.codebooks, counts, strict=True)):
            dead_K = count_K == 0
            order_P = jax.random.permutation(jax.random.fold_in(key, level), residual_Pd.shape[0])
            drawn_K = order_P[(jnp.cumsum(dead_K) - 1) % residual_Pd.shape[0]]
            codebook[...] = jnp.where(dead_K[:, None], residual_Pd[drawn_K], codebook[...])
            nearest_P = jnp.argmin(squared_distances(residual_Pd, codebook[...]), axis=1)
            residual_Pd = residual_Pd - codebook[...][nearest_P]
            revived.append(jnp.sum(dead_K, dtype=jnp.int32))
        return jnp.stack(revived)


def uniform_codebooks(level_sizes: Sequence[int], dim: int, key: Array) -> list[Array]:
    """Float32 [K, dim] a level, uniform in ± 1/K: how the official code starts without k-means."""
    keys = jax.random.split(key, len(level_sizes))
    return [
        jax.random.uniform(key, (size, dim), minval=-1 / size, maxval=1 / size)
        for key, size in zip(keys, level_sizes, strict=True)
    ]


def count_codes(codes_BL: Array, level_sizes: Sequence[int], weights_B: Array | None = None) -> tuple[Array, ...]:
    """How often each code stands in int [B, L]: [K] a level; rows of weight 0 (padding) do not count."""
    return tuple(jnp.bincount(codes_BL[:, level], weights_B, length=size) for level, size in enumerate(level_sizes))


def squared_distances(x_Bd: Array, codebook_Kd: Array) -> Array:
    """‖x − e‖² float32 [B, K] from one matrix product, without [B, K, d] in memory."""
    # "highest": TF32's 10 bits of mantissa would choose other codes on an NVIDIA GPU than on a CPU.
    products_BK = jnp.matmul(x_Bd, codebook_Kd.T, precision="highest")
    return jnp.sum(x_Bd**2, axis=1, keepdims=True) - 2 * products_BK + jnp.sum(codebook_Kd**2, axis=1)
