"""Item vectors → a tokenizer: by an RQ-VAE, or by k-means level by level."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.code_use import code_metrics
from core.residual_kmeans import residual_kmeans
from core.residual_quantizer import ResidualQuantizer
from core.sinkhorn import spread_codes
from core.suffixes import with_suffix
from efficientids.errors import UserError
from efficientids.tokenizing.pretraining import pretrain, sample
from efficientids.tokenizing.settings import TokenizerSettings
from efficientids.tokenizing.tokenizer import Tokenizer, parameters_of, with_padding
from efficientids.tokenizing.vectors import ItemVectors, Standard


def make_tokenizer(
    vectors: ItemVectors,
    settings: TokenizerSettings,
    say: Callable[[str], None],
    record: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Tokenizer:
    """A tokenizer in memory; the same for the same arguments.

    Args:
        vectors: of the N items.
        say: told lines about what goes on.
        record: told a row an epoch of the RQ-VAE (`pretraining.pretrain`).

    Raises:
        UserError: fewer items than a level has codes, vectors that are all equal, more items with equal codes than the
            suffix level has codes, or a loss that is no number.
    """
    if vectors.num_items < max(settings.levels):
        raise UserError(
            f"--levels {','.join(map(str, settings.levels))}: the catalogue has {vectors.num_items} items, and a level "
            "needs an item for each of its codes; give levels of at most that"
        )
    standard = Standard.of(vectors)
    vectors_NI = standard.apply(vectors)
    if settings.method == "rqvae":
        model = pretrain(vectors_NI, settings, say, record)
        rqvae, parameters, quantizer = model.config, parameters_of(model), model.quantizer
        latents_Nd = model.latents(jnp.asarray(vectors_NI[1:]))
    else:
        rows = sample(vectors.num_items, settings.seed)
        codebooks = residual_kmeans(vectors_NI[rows], settings.levels, jax.random.key(settings.seed))
        rqvae, quantizer = None, ResidualQuantizer(codebooks)
        parameters = {f"codebooks.{level}": codebook for level, codebook in enumerate(codebooks)}
        latents_Nd = jnp.asarray(vectors_NI[1:])
    last = len(settings.levels) - 1
    codes_NL = spread_codes(quantizer, latents_Nd, (last,)) if settings.sinkhorn else quantizer.codes(latents_Nd)
    try:
        codes_NL, metrics = suffixed(np.asarray(codes_NL), settings.levels, settings.suffix_size)
    except UserError:
        _refuse_equal(vectors_NI[1:], settings.suffix_size)
        raise
    return Tokenizer(
        None, settings.method, codes_NL, (*settings.levels, settings.suffix_size), rqvae, parameters, standard,
        vectors_NI, dataclasses.asdict(settings), metrics,
    )  # fmt: skip


def _refuse_equal(vectors_NI: np.ndarray, suffix_size: int) -> None:
    """Raises UserError where more items have one vector, and so equal codes, than the suffix level can tell apart."""
    rows_N = np.ascontiguousarray(vectors_NI).view(f"V{vectors_NI.shape[1] * vectors_NI.itemsize}").ravel()
    _, counts = np.unique(rows_N, return_counts=True)
    if counts.max() > suffix_size:
        raise UserError(
            f"--suffix_size {suffix_size}: {counts.max()} items have one and the same vector, so no codes can part "
            "them; mostly nothing is known of them, as of items of the table that nobody chose. Give vectors that know "
            "them (`embed-items` with texts), leave them out (`prepare --catalogue interactions`), or give "
            f"--suffix_size at least {counts.max()}"
        )


def suffixed(codes_NL: np.ndarray, levels: tuple[int, ...], suffix_size: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Real codes of items 1 … N → the table [N + 1, L + 1] with the suffix level, and the metrics of its codes.

    Raises:
        UserError: more items with equal codes than the suffix level has codes.
    """
    try:
        table = with_padding(with_suffix(codes_NL, suffix_size))
    except ValueError as error:
        raise UserError(
            f"--suffix_size {suffix_size}: {error}; or more codes or levels (--levels), or --sinkhorn"
        ) from error
    return table, code_metrics(codes_NL, levels)
