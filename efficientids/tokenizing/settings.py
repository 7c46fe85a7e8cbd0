"""What a tokenizer is made with; plain data."""

from __future__ import annotations

import dataclasses
from typing import Literal

from core.residual_quantizer import ResidualGrad
from core.rqvae import RQVAEConfig
from efficientids.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """Settings of `making.make_tokenizer`; the defaults are those of ETEGRec's RQ-VAE (arXiv 2409.05546).

    Attributes:
        method: an RQ-VAE, or k-means of item vectors level by level without a network.
        levels: codes of each real level; the suffix level comes behind them.
        suffix_size: codes of the suffix level: so many items may share their real codes.
        hidden, latent_dim, residual_grad: see `core.rqvae.RQVAEConfig`.
        epochs, batch_size, learning_rate, weight_decay, grad_clip: of the RQ-VAE's AdamW.
        seed: of everything.
        sinkhorn: the last real level spreads items that agree so far over its codes (`core.sinkhorn`).

    Raises:
        UserError: a value out of range.
    """

    method: Literal["rqvae", "kmeans"] = "rqvae"
    levels: tuple[int, ...] = (256, 256, 256)
    suffix_size: int = 256
    hidden: tuple[int, ...] = (512, 256)
    latent_dim: int = 128
    residual_grad: ResidualGrad = "straight_through"
    epochs: int = 100
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    seed: int = 0
    sinkhorn: bool = False

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise UserError(f"--levels {','.join(map(str, self.levels))}: give at least one level of at least 2 codes")
        for name in ("suffix_size", "latent_dim", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        if min(self.hidden, default=1) < 1:
            raise UserError(f"--hidden {','.join(map(str, self.hidden))}: give widths of at least 1")
        if not self.learning_rate > 0:
            raise UserError(f"--learning_rate {self.learning_rate}: give a number above 0")
        for name in ("seed", "weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: give 0 or more")

    def rqvae(self, input_dim: int) -> RQVAEConfig:
        """The shape of the RQ-VAE for vectors of this width."""
        return RQVAEConfig(
            input_dim, self.levels, self.hidden, self.latent_dim, residual_grad=self.residual_grad
        )  # fmt: skip
