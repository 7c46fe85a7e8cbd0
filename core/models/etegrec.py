"""ETEGRec on a Llama: the next item's semantic ID, code by code (arXiv 2409.05546, decoder-only).

A history is the codes of its items; `core.code_sequences` lays them out, alone or with text around them. The hidden
state at the position before a code predicts it, by products with the table that also embeds it. Sequence-item and
preference-semantic alignment (`core.alignment`) read the state before the target's first code through two adapters.

Legend: B batch, T positions, H history items, L levels, K_l codes of level l, d code dimension, D the Llama's width,
M labels of a level in a row (H, padded), X excluded items, k results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from core.beam_search import Normalise, beam_search
from core.code_sequences import TEXT, CodeSequence, Template
from core.codebook_logits import CodebookLogits, code_loss
from core.config import LlamaConfig
from core.embeddings import SoftEmbedding
from core.layers import Dropout, Init, Linear
from core.llama import BranchCache, Compute, KVCache, Llama
from core.lora import LoRAConfig
from core.semantic_ids import SemanticIDs


@dataclasses.dataclass(frozen=True)
class ETEGRecConfig:
    """What a model is made of, beside the Llama's own shape.

    Attributes:
        level_sizes: K_l of every level, the suffix level's last.
        code_dim: d.
        latent_dim: of the tokenizer's latents, which the SIA adapter maps to; None: no adapter.
        item_dim: of the tokenizer's input, which the PSA adapter maps to; None: no adapter.
        template: text around a history; None: codes alone, behind a learned begin vector.
        init_std: deviation of projectors, adapters and new tables at the start.
        dropout: rate on input embeddings and on the Llama's residual branches while training.
        lora: adapters in the Llama's layers; None: none.
    """

    llama: LlamaConfig
    level_sizes: tuple[int, ...]
    code_dim: int = 128
    latent_dim: int | None = None
    item_dim: int | None = None
    template: Template | None = None
    init_std: float = 0.02
    dropout: float = 0.0
    lora: LoRAConfig | None = None


class CodeLoss(NamedTuple):
    """Σ −log p(code) of each level, and the number (or weight) of codes of each: float32 [L] both."""

    totals_L: Array
    weights_L: Array


class LlamaETEGRecModel(nnx.Module):
    """The recommender; the tokenizer and the code table are values of their own.

    Args:
        config: the shape.
        key: for the random start.
        tables: parameters [K_l, d] of the first levels, to start from the tokenizer's codebooks (copies of them), or to
            share them (the same `nnx.Param`s); levels without one start at random.
        compute, init: see `core.llama`; `init` is the Llama's own, everything else is float32.

    Raises:
        ValueError: a table of another shape.
    """

    def __init__(
        self,
        config: ETEGRecConfig,
        key: Array,
        tables: Sequence[nnx.Param[Array]] = (),
        compute: Compute | None = None,
        init: Init | None = None,
    ) -> None:
        self.config = config
        width, own = config.llama.hidden_size, Init(config.init_std)
        keys = iter(jax.random.split(key, 6 + len(config.level_sizes)))
        adapted = dataclasses.replace(init or Init(), lora=config.lora)
        self.llama = Llama(config.llama, next(keys), compute, adapted)
        self.soft_embedding = SoftEmbedding(config.code_dim, width, next(keys), own)
        self.codebook_logits = CodebookLogits(width, config.code_dim, next(keys), own)
        begin = next(keys)
        self.begin_D = nnx.Param(own.normal(begin, (width,))) if config.template is None else None
        self.enc_adapter = _adapter(next(keys), width, config.latent_dim, own)
        self.dec_adapter = _adapter(next(keys), width, config.item_dim, own)
        shapes = [(size, config.code_dim) for size in config.level_sizes]
        given = list(tables)
        for level, table in enumerate(given):
            if level >= len(shapes) or table.shape != shapes[level]:
                raise ValueError(f"table of level {level}: shape {table.shape}; the levels' are {shapes}")
        new = [nnx.Param(own.normal(next(keys), shape)) for shape in shapes[len(given) :]]
        self.tables = nnx.List([*given, *new])

    def embed(self, sequence: CodeSequence) -> Array:
        """The Llama's input [B, T, D]: codes by their level's table, text by the Llama's, else the begin vector.

        Raises:
            ValueError: a sequence without text for a model with a template, which has no begin vector.
        """
        dtype, is_code_BT1 = self.llama.compute.dtype, (sequence.levels >= 0)[..., None]
        codes_BTD = self.soft_embedding(self._tables(), jnp.maximum(sequence.levels, 0), sequence.codes, dtype)
        other = None if self.begin_D is None else self.begin_D[...].astype(dtype)
        if sequence.text is not None:
            text_BTD = self.llama.embed(sequence.text)
            other = text_BTD if other is None else jnp.where((sequence.levels == TEXT)[..., None], text_BTD, other)
        if other is None:
            raise ValueError("this model was made with a template: lay its histories out with it (core.code_sequences)")
        return jnp.where(is_code_BT1, codes_BTD, other)

    def hidden(self, sequence: CodeSequence, key: Array | None = None) -> Array:
        """Hidden states after the final norm [B, T, D]; with a key, under dropout."""
        x_BTD, key_layers, rate = self.embed(sequence), None, self.config.dropout
        if key is not None and (rate > 0 or (self.config.lora is not None and self.config.lora.dropout > 0)):
            key_input, key_layers = jax.random.split(key)
            x_BTD = Dropout(rate, key_input)(x_BTD, 0)
        return self.llama.hidden(x_BTD, dropout=rate, key=key_layers)

    def loss(
        self, hidden_BTD: Array, sequence: CodeSequence, weights_BH: Array, live: Sequence[Array] | None = None
    ) -> CodeLoss:
        """Negative log-likelihood of codes, each given all that stands before it.

        Args:
            hidden_BTD: `hidden(sequence)`.
            weights_BH: of each item of a history, and so of each of its codes. 0: not supervised (padding; or all but
                the target). H is at least the number of items of any row: more would not be counted.
            live: of each level bool [B, H, K_l], the codes among which each item's own is chosen
                (`SemanticIDs.siblings`); None: among all. What `top_k` scores with `normalise="children"` is trained
                with it.
        """
        inside_BT = jnp.arange(1, hidden_BTD.shape[1] + 1) < sequence.lengths[:, None]
        # The label of a position is what stands at the next one.
        level_BT = jnp.where(inside_BT, _next(sequence.levels), -1)
        item_BT = jnp.maximum(_next(sequence.items), 0)
        weight_BT = jnp.take_along_axis(weights_BH.astype(jnp.float32), item_BT, axis=1)
        projected_BTd = self.codebook_logits.project(hidden_BTD)
        totals, weights = [], []
        for level, table_Kd in enumerate(self._tables()):
            here_BT = level_BT == level
            chosen_BM = jnp.argsort(~here_BT, axis=1, stable=True)[:, : weights_BH.shape[1]]
            weights_BM = jnp.take_along_axis(jnp.where(here_BT, weight_BT, 0.0), chosen_BM, axis=1)
            codes_BM = jnp.take_along_axis(jnp.where(here_BT, _next(sequence.codes), 0), chosen_BM, axis=1)
            chosen_BMd = jnp.take_along_axis(projected_BTd, chosen_BM[..., None], axis=1)
            chosen_Td, live_TK = chosen_BMd.reshape(-1, self.config.code_dim), None
            if live is not None:
                items_BM1 = jnp.take_along_axis(item_BT, chosen_BM, axis=1)[..., None]
                live_TK = jnp.take_along_axis(live[level], items_BM1, axis=1).reshape(-1, table_Kd.shape[0])
            chunk = self.llama.compute.chunk_elements
            labels_T, weights_T = codes_BM.ravel(), weights_BM.ravel()
            totals.append(code_loss(chosen_Td, table_Kd, labels_T, weights_T, live_TK=live_TK, chunk_elements=chunk))
            weights.append(weights_BM.sum())
        return CodeLoss(jnp.stack(totals), jnp.stack(weights))

    def state(self, hidden_BTD: Array, sequence: CodeSequence) -> Array:
        """The hidden state that stands for each history, before its target's first code: [B, D]."""
        return jnp.take_along_axis(hidden_BTD, sequence.state[:, None, None], axis=1)[:, 0]

    def state_before(self, hidden_BTD: Array, sequence: CodeSequence, rows_A: Array, items_A: Array) -> Array:
        """The hidden states from which items' first codes are predicted: [A, D].

        Args:
            hidden_BTD: `hidden(sequence)`.
            rows_A, items_A: int [A], a row each, and which of its items (from 0) that are in the sequence.
        """
        first_BT = (_next(sequence.levels) == 0) & (jnp.arange(hidden_BTD.shape[1]) + 1 < sequence.lengths[:, None])
        here_AT = first_BT[rows_A] & (_next(sequence.items)[rows_A] == items_A[:, None])
        return hidden_BTD[rows_A, jnp.argmax(here_AT, axis=1)]

    def logits(self, hidden: Array, level: int) -> Array:
        """Hidden states [..., D] before a code of `level` → float32 logits [..., K_l]."""
        # In float32 whatever the Llama computes in: rounded scores would tie.
        return self.codebook_logits.logits(hidden.astype(jnp.float32), self._tables()[level])

    def top_k(
        self,
        sequence: CodeSequence,
        ids: SemanticIDs,
        k: int,
        *,
        beams: int,
        exclude: Array | None = None,
        normalise: Normalise = "alphabet",
    ) -> tuple[Array, Array]:
        """The k most probable next items: one pass over each history, which its beams share, and L − 1 cached steps.

        Args:
            sequence: laid out without a target.
            ids: the code table with its trie; its alphabets are the model's.
            k, beams, exclude, normalise: see `core.beam_search`, which also says what is exact.

        Returns:
            (scores float32 [B, k], item ids int32 [B, k]), best first.

        Raises:
            ValueError: alphabets of another size, or what `beam_search` refuses.
        """
        if ids.shape.level_sizes != self.config.level_sizes:
            raise ValueError(
                f"the code table has levels of {ids.shape.level_sizes} codes, the model of {self.config.level_sizes}; "
                "use the table that the model was made for"
            )
        x_BTD = self.embed(sequence)
        hidden_BTD, prefix = self.llama.extend(x_BTD, self.llama.init_cache(*x_BTD.shape[:2]), sequence.lengths)
        first_BK = self.logits(self.state(hidden_BTD, sequence), 0)

        advance = functools.partial(self._advance, prefix)
        return beam_search(ids, first_BK, None, advance, k=k, beams=beams, exclude_BX=exclude, normalise=normalise)

    def search_bytes(self, positions: int, beams: int) -> int:
        """About the bytes that `top_k` holds for a row: its history's cache, its beams' twice (re-ordered, the new one
        stands beside the old), a layer's activations of the history, and the candidates of a level."""
        llama, levels = self.config.llama, self.config.level_sizes
        itemsize = jnp.dtype(self.llama.compute.dtype).itemsize
        cached = 2 * llama.num_layers * llama.num_kv_heads * llama.head_dim * itemsize
        slots = positions + 2 * beams * (len(levels) - 1)
        activations = positions * (3 * llama.intermediate_size + 6 * llama.hidden_size) * itemsize
        return slots * cached + activations + 6 * beams * max(levels) * 4

    def _advance(
        self, prefix: KVCache, carry: BranchCache | None, level: int, parents_BW: Array, codes_BW: Array
    ) -> tuple[Array, BranchCache]:
        """Feeds the codes of level − 1 to the beams that took them; logits of `level` [B, W, K_l]."""
        if carry is None:
            slots = len(self.config.level_sizes) - 1
            branches = self.llama.init_branches(prefix, parents_BW.shape[1], slots)
        else:
            branches = carry.reordered(parents_BW)
        levels_BW = jnp.full(codes_BW.shape, level - 1, jnp.int32)
        x_BWD = self.soft_embedding(self._tables(), levels_BW, codes_BW, self.llama.compute.dtype)
        hidden_BWD, branches = self.llama.extend_branches(x_BWD, prefix, branches, level - 1)
        return self.logits(hidden_BWD, level), branches

    def _tables(self) -> list[Array]:
        return [table[...] for table in self.tables]


def _adapter(key: Array, width: int, out: int | None, init: Init) -> Linear | None:
    return None if out is None else Linear(key, (width,), (out,), True, init)


def _next(x_BT: Array) -> Array:
    """What stands at the next position; 0 after the last, which `lengths` keep from being read."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))
