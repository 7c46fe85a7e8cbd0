"""Residual k-means: codebooks level by level from the vectors alone, without training.

Of a trained encoder's latents they start an RQ-VAE; of item vectors they are a tokenizer without a network:
`ResidualQuantizer(residual_kmeans(vectors, …)).codes(vectors)`, with `core.layers.unit(vectors)` for cosines.

Legend: N vectors, d their width, L levels, K codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from core.kmeans import kmeans
from core.residual_quantizer import ResidualQuantizer


def residual_kmeans(
    vectors_Nd: np.ndarray | jax.Array, level_sizes: Sequence[int], key: jax.Array, *, rounds: int = 30
) -> list[np.ndarray]:
    """Float32 [K, d] a level: the means of k-means clusters of what the levels before leave of each vector.

    Args:
      vectors_Nd: float [N, d], all finite, N at least the largest K. A sample serves: codes are for any vector.
      level_sizes: K of each level.
      key: for the seeds of k-means.
      rounds: of k-means at most.

    Raises:
      ValueError: more codes than vectors, or a vector that is not finite.
    """
    residual_Nd = np.asarray(vectors_Nd, np.float32)
    codebooks = []
    for level, size in enumerate(level_sizes):
        assignment_N = kmeans(residual_Nd, size, jax.random.fold_in(key, level), rounds=rounds)
        sums_Kd = jax.ops.segment_sum(residual_Nd, assignment_N, size)
        codebook_Kd = np.asarray(sums_Kd) / np.bincount(assignment_N, minlength=size)[:, None].astype(np.float32)
        # By the nearest code, as vectors are indexed later, and not by the cluster that k-means ended with.
        nearest_N = ResidualQuantizer([codebook_Kd]).codes(jax.numpy.asarray(residual_Nd))[:, 0]
        residual_Nd = residual_Nd - codebook_Kd[np.asarray(nearest_N)]
        codebooks.append(codebook_Kd)
    return codebooks
