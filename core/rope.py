"""Rotary position embeddings (RoFormer, arXiv 2104.09864) with the scalings that Llama checkpoints use.

Half-split pairs, as Hugging Face stores Llama weights: coordinate i turns with coordinate i + H/2.

Legend: B batch, T positions, N heads, H head dimension.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from core.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig, padded_length: int) -> np.ndarray:
    """The H/2 angular frequencies in radians a position, float32, computed on the host.

    Args:
        config: names the scaling; see Hugging Face's `modeling_rope_utils.py` for the formulas' source.
        padded_length: positions in the batch, padding included. Only `dynamic` depends on it, and only beyond
            `max_position_embeddings`: Hugging Face's rule, so one text scores differently in a longer batch.
    """
    # Rounded to float32 wherever Hugging Face rounds: half a step off turns position 8,191 by up to 5e-4 rad.
    half = (np.arange(0, config.head_dim, 2) / config.head_dim).astype(np.float32).astype(np.float64)
    theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        stretch = max(padded_length, config.max_position_embeddings) / config.max_position_embeddings
        growth = scaling.factor * stretch - (scaling.factor - 1)
        theta = theta * growth ** (config.head_dim / (config.head_dim - 2))
    frequencies = 1.0 / (theta**half).astype(np.float32)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
        assert scaling.original_max_position_embeddings is not None
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
        # Fast frequencies stay, slow ones are divided by the factor, those between are blended.
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    assert frequencies.dtype == np.float32
    return frequencies


def rotation(config: LlamaConfig, positions_BT: Array, padded_length: int) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, H/2] in float32 for integer positions [B, T] (B may be 1, for all rows alike)."""
    return turned_by(inverse_frequencies(config, padded_length), positions_BT)


def turned_by(frequencies_h: np.ndarray, positions_BT: Array) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, H/2] in float32 of positions [B, T] times angular frequencies [H/2]."""
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * frequencies_h
    return jnp.cos(angles_BTh)[:, :, None], jnp.sin(angles_BTh)[:, :, None]


def rotate(x_BTNH: Array, cos_BT1h: Array, sin_BT1h: Array) -> Array:
    """Turns each pair (i, i + H/2) of queries or keys by its position's angle; float32 inside, x's dtype outside."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
