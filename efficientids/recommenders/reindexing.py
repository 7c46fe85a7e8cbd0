"""New codes for a whole catalogue from its tokenizer as it is now: what stands between two turns of ETEGRec's training.

Legend: N items (1 … N; 0 is padding), I width of an item vector, L levels (the suffix level's last).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core import sharding
from core.code_use import code_metrics
from core.residual_quantizer import ResidualQuantizer
from core.semantic_ids import version_name
from core.sinkhorn import spread_codes
from efficientids.recommenders.base import Ended
from efficientids.recommenders.etegrec_model import ETEGRecModel, ETEGRecSpec, code_table

EVENT = "reindexed"


def reindexed(model: ETEGRecModel, spec: ETEGRecSpec) -> Ended:
    """Gives every item the codes that the tokenizer has for it now, in a new table, trie and version of old shapes.

    Where more items share their codes than the suffix level has codes, all keep the codes of before: histories, labels
    and trie are looked up in that one table, so they are of one version still, and the run's hours are not lost.

    Returns:
        The model; a row with the metrics of the new codes (`code_metrics`), `changed`, the share of items whose
        codes are others than before, `version`, that of the table from now on, and `kept`, whether it is the old one.
    """
    assert model.tokenizer is not None
    sizes, count = spec.table.level_sizes, spec.num_items
    before_NL = sharding.to_host(model.ids.codes_RL[...])[1 : count + 1]
    codes_NL = real_codes(model, spec)
    found = code_metrics(codes_NL, sizes[:-1])
    kept = found["largest_bucket"] > sizes[-1]
    if not kept:
        nnx.update(model.ids, nnx.state(code_table(codes_NL, spec.table)))
    after_NL = sharding.to_host(model.ids.codes_RL[...])[1 : count + 1]
    changed = float((before_NL != after_NL).any(axis=1).mean())
    version = version_name(sharding.to_host(model.ids.version[...]))
    row = {"event": EVENT, **found, "changed": changed, "version": version, "kept": kept}
    return Ended(model, row, _overflow(row, sizes[-1]) if kept else _in_words(row, sizes[-1]))


def real_codes(model: ETEGRecModel, spec: ETEGRecSpec) -> np.ndarray:
    """The codes that the tokenizer has for items 1 … N, int32 [N, L − 1], made as the first ones were: the nearest, or
    with `spec.sinkhorn` spread over the last real level."""
    assert model.tokenizer is not None and model.vectors_NI is not None
    graphdef, state = nnx.split(model.tokenizer)
    if not spec.sinkhorn:
        return sharding.to_host(_nearest(graphdef, state, model.vectors_NI[...]))
    latents_Nd = sharding.to_host(_latents(graphdef, state, model.vectors_NI[...]))
    codebooks = [jnp.asarray(sharding.to_host(book[...])) for book in model.tokenizer.quantizer.codebooks]
    return spread_codes(ResidualQuantizer(codebooks), jnp.asarray(latents_Nd), (len(codebooks) - 1,))


@functools.partial(jax.jit, static_argnums=0)
def _nearest(graphdef: Any, state: nnx.State, vectors_NI: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).codes(vectors_NI[1:])


@functools.partial(jax.jit, static_argnums=0)
def _latents(graphdef: Any, state: nnx.State, vectors_NI: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).latents(vectors_NI[1:])


def _in_words(row: dict[str, Any], suffixes: int) -> str:
    used = "/".join(f"{share:.0%}" for share in row["used"])
    perplexity = "/".join(f"{value:.0f}" for value in row["perplexity"])
    return (
        f"items indexed anew: {row['changed']:.1%} have other codes; codes used {used}  perplexity {perplexity}  "
        f"collisions {row['collisions'][-1]:.2%}  largest suffix {row['largest_bucket'] - 1} of 0 … {suffixes - 1}  "
        f"version {row['version']}"
    )


def _overflow(row: dict[str, Any], suffixes: int) -> str:
    return (
        f"WARNING: after this turn {row['largest_bucket']} items would share their codes, but the suffix level has "
        f"{suffixes}: all items keep their codes of before (version {row['version']}), and training goes on with "
        f"them. To let codes follow their tokenizer, tokenize again with --suffix_size {row['largest_bucket']} or more"
    )
