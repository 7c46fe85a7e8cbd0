"""RQ-VAE: an encoder, residual quantisation of its latents, a decoder (TIGER, arXiv 2305.05065; ETEGRec, 2409.05546).

Legend: B items, I input width, d latent width, L levels, K codes of a level.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from core.layers import Init, Linear
from core.residual_quantizer import INDEXED_AT_A_TIME, Quantized, ResidualGrad, ResidualQuantizer, uniform_codebooks


@dataclasses.dataclass(frozen=True)
class RQVAEConfig:
    """The shape of an RQ-VAE.

    Attributes:
        input_dim: I.
        level_sizes: K of each level.
        hidden_sizes: the encoder's widths between I and d; the decoder's are the same backwards.
        latent_dim: d.
        beta: weight of the commitment term.
        residual_grad: see `ResidualQuantizer`.

    Raises:
        ValueError: a size below 1, no level, or a negative beta.
    """

    input_dim: int
    level_sizes: tuple[int, ...] = (256, 256, 256)
    hidden_sizes: tuple[int, ...] = (512, 256)
    latent_dim: int = 128
    beta: float = 0.25
    residual_grad: ResidualGrad = "straight_through"

    def __post_init__(self) -> None:
        if not self.level_sizes or min(*self.widths, *self.level_sizes) < 1 or not 0 <= self.beta < math.inf:
            raise ValueError(
                f"RQ-VAE of widths {self.widths}, levels {self.level_sizes}, beta {self.beta}: give at least one level,"
                " sizes of at least 1 and a beta of at least 0"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RQVAEConfig:
        """The inverse of `dataclasses.asdict`, after JSON made lists of its tuples. Raises KeyError, TypeError."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("level_sizes", "hidden_sizes")}})

    @property
    def widths(self) -> tuple[int, ...]:
        """I, the hidden sizes, d."""
        return (self.input_dim, *self.hidden_sizes, self.latent_dim)


class RQVAEOutput(NamedTuple):
    """One pass over items.

    Attributes:
        reconstruction_BI: float32 [B, I].
        quantized: of the latents.
        reconstruction_loss_B: float32 [B], the mean over I of the squared error.
    """

    reconstruction_BI: Array
    quantized: Quantized
    reconstruction_loss_B: Array

    @property
    def quantization_loss_B(self) -> Array:
        """Float32 [B]: the mean over levels."""
        return jnp.mean(self.quantized.losses_BL, axis=1)

    @property
    def loss_B(self) -> Array:
        """Float32 [B]: reconstruction + quantisation, by row so that padded ones can be left out of a sum."""
        return self.reconstruction_loss_B + self.quantization_loss_B


class MLP(nnx.Module):
    """Linear maps with ReLU between and none after the last; Xavier-normal weights, zero biases."""

    def __init__(self, widths: Sequence[int], key: Array) -> None:
        sizes = list(itertools.pairwise(widths))
        keys = jax.random.split(key, len(sizes))
        self.layers = nnx.List(
            [Linear(k, (i,), (o,), True, Init(math.sqrt(2 / (i + o)))) for k, (i, o) in zip(keys, sizes, strict=True)]
        )

    def __call__(self, x: Array) -> Array:
        """[..., first width] → [..., last width]."""
        for layer in list(self.layers)[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class RQVAE(nnx.Module):
    """Item vectors → codes, and back. Codebooks start uniform; `core.residual_kmeans` gives better ones."""

    def __init__(self, config: RQVAEConfig, key: Array) -> None:
        key_encoder, key_decoder, key_codes = jax.random.split(key, 3)
        self.config = config
        self.encoder = MLP(config.widths, key_encoder)
        self.decoder = MLP(config.widths[::-1], key_decoder)
        codebooks = uniform_codebooks(config.level_sizes, config.latent_dim, key_codes)
        self.quantizer = ResidualQuantizer(codebooks, config.beta, config.residual_grad)

    def __call__(self, x_BI: Array) -> RQVAEOutput:
        """Item vectors float [B, I] → reconstruction, codes, losses."""
        quantized = self.quantizer.quantize(self.encoder(x_BI))
        reconstruction_BI = self.decoder(quantized.vectors_Bd)
        return RQVAEOutput(reconstruction_BI, quantized, jnp.mean((reconstruction_BI - x_BI) ** 2, axis=1))

    def latents(self, x_NI: Array) -> Array:
        """The latents of any number of items, float32 [N, d]: in chunks, for a whole catalogue."""
        at_a_time = max(1, min(INDEXED_AT_A_TIME, x_NI.shape[0]))
        return jax.lax.map(lambda x_I: self.encoder(x_I[None])[0], x_NI, batch_size=at_a_time)

    def codes(self, x_NI: Array) -> Array:
        """The codes of items, int32 [N, L]: a catalogue's, or those of new items, without training."""
        return self.quantizer.codes(self.latents(x_NI))
