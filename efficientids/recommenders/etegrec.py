"""ETEGRec as a recommender: tokenizer and recommender trained in turn, semantic IDs generated (arXiv 2409.05546).

Codes of histories and of targets are looked up on the device, in the one code table that the model holds: nothing that
is trained on, searched or saved can be of another version than the rest.

Legend: B rows, H history items, A anchors, N items, I width of an item vector, L levels (the suffix level's last).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.alignment import Anchors, anchors, psa_loss, sia_loss
from core.code_sequences import CodeSequence, lay_out
from core.code_tables import build
from core.layers import Init
from core.llama import Compute
from core.lora import is_adapter
from efficientids.recommenders.base import (
    Batch,
    Cycle,
    Ended,
    Histories,
    LossSum,
    Phase,
    Ranked,
    Training,
    in_llama,
)
from efficientids.recommenders.etegrec_model import Contents, ETEGRecModel, ETEGRecSpec, Turns
from efficientids.recommenders.reindexing import reindexed
from efficientids.recommenders.shapes import ranked


def in_tokenizer(path: tuple[Any, ...], _: Any) -> bool:
    """The filter for the tokenizer's parameters, where they are its own."""
    return bool(path) and path[0] == "tokenizer"


class ETEGRec:
    """See `efficientids.recommenders.base.Recommender`.

    Args:
        spec: shapes.
        compute, init: how the Llama computes and starts.
        training, turns: None where nothing is to be trained; `training` is of the recommender's turns, its
            `llama_optimizer` None for a frozen Llama.
        contents: for `filled`; None where a checkpoint fills the model.
    """

    def __init__(
        self,
        spec: ETEGRecSpec,
        *,
        compute: Compute | None = None,
        init: Init | None = None,
        training: Training | None = None,
        turns: Turns | None = None,
        contents: Contents | None = None,
    ) -> None:
        self.spec, self._compute, self._init = spec, compute, init
        self._training, self._turns, self._contents = training, turns, contents

    @property
    def max_items(self) -> int:
        """H: the newest items of a history that the model looks at."""
        return self.spec.max_items

    @property
    def history(self) -> str:
        """What of a history the model looks at, and how it searches: part of the evaluation protocol."""
        among = "all of a level" if self.spec.normalise == "alphabet" else "those that lead to an item"
        return f"newest {self.max_items} items; {self.spec.beams} beams, codes scored among {among}"

    def init(self, key: jax.Array) -> ETEGRecModel:
        """The whole system at its start, but for what `filled` puts there."""
        return ETEGRecModel(self.spec, key, compute=self._compute, init=self._init)

    def filled(self, model: ETEGRecModel) -> ETEGRecModel:
        """The model with the tokenizer, the codes that it gave, and tables that start as its codebooks.

        Raises:
            ValueError: codes that the model's table cannot hold, or item vectors or a tokenizer of other shapes.
        """
        contents, spec = self._contents, self.spec
        if contents is None:
            raise ValueError("this recommender was built without `contents`")
        nnx.update(model.ids, nnx.state(build(contents.codes_NL, spec.table.level_sizes, spec.table)))
        if model.tokenizer is None or contents.tokenizer is None:
            return model
        assert contents.vectors_NI is not None and model.vectors_NI is not None
        if contents.vectors_NI.shape != model.vectors_NI.shape or contents.tokenizer.config != spec.tokenizer:
            raise ValueError(
                f"vectors {contents.vectors_NI.shape} and tokenizer {contents.tokenizer.config}; the model is made for "
                f"{model.vectors_NI.shape} and {spec.tokenizer}"
            )
        nnx.update(model.tokenizer, nnx.state(contents.tokenizer))
        model.vectors_NI[...] = jnp.asarray(contents.vectors_NI, jnp.float32)
        if not spec.tied:
            for table, codebook in zip(model.tables, model.tokenizer.quantizer.codebooks, strict=False):
                table[...] = codebook[...] + 0  # arrays of their own: the steps of one give theirs away
        return model

    def plan(self) -> Sequence[Phase | Cycle]:
        """Tokenizer and recommender in turn, then codes alone from the best checkpoint."""
        training, turns = self._training, self._turns
        if training is None or turns is None:
            raise ValueError("this recommender was built without `training`")
        own = nnx.All(nnx.Not(in_llama), nnx.Not(in_tokenizer))
        adapted = is_adapter if self.spec.model.lora is not None else nnx.All(in_llama, nnx.Not(_is_table_of_words))
        llama = None if training.llama_optimizer is None else adapted
        recommender = dataclasses.replace(
            training.phase("recommender", own, self._recommender_loss, llama), num_steps=turns.recommender_steps
        )
        if self.spec.tied:
            # Code loss moves the codebooks, and with them the codes that items should have.
            recommender = dataclasses.replace(recommender, on_end=self.reindex)
        off = self._switched_off(turns)
        recommender = dataclasses.replace(recommender, switched_off=off)
        phases = [recommender]
        if turns.tokenizer_steps:
            parameters = nnx.Any(in_tokenizer, self._is_shared_table)
            tokenizer = dataclasses.replace(
                training.phase("tokenizer", parameters, self._tokenizer_loss), num_steps=turns.tokenizer_steps,
                groups=[(parameters, turns.tokenizer)], on_end=self.reindex, validated=False,
            )  # fmt: skip
            phases = [tokenizer, recommender]
        plan: list[Phase | Cycle] = [Cycle(phases, turns.rounds)]
        if turns.finetune_steps:
            plan.append(self._finetuning(training, turns, llama))
        return plan

    def _switched_off(self, turns: Turns) -> list[tuple[Any, str]]:
        """What the weights of the losses leave without a gradient in the recommender's turns."""
        weights = {
            "enc_adapter": ("--kl_loss", turns.kl_loss),
            "dec_adapter": ("--dec_cl_loss", turns.dec_cl_loss),
            "codebook_logits": ("--code_loss", turns.code_loss),
        }
        return [(_first_name_is(name), f"zero: {flag} 0") for name, (flag, weight) in weights.items() if not weight]

    def _finetuning(self, training: Training, turns: Turns, llama: Any) -> Phase:
        assert turns.finetune is not None
        # With the tokenizer goes what it shares: its codes are final.
        own = nnx.All(nnx.Not(in_llama), nnx.Not(in_tokenizer), nnx.Not(self._is_shared_table), nnx.Not(_is_alignment))
        groups = [(own, turns.finetune)]
        if llama is not None:
            assert training.llama_optimizer is not None
            share = turns.finetune.learning_rate / training.optimizer.learning_rate
            rate = training.llama_optimizer.learning_rate * min(1.0, share)
            groups.append((llama, dataclasses.replace(turns.finetune, learning_rate=rate)))
        phase = training.phase("finetune", own, self._code_loss)
        return dataclasses.replace(phase, groups=groups, num_steps=turns.finetune_steps, start_from="best")

    def _is_shared_table(self, path: tuple[Any, ...], _: Any) -> bool:
        real = 0 if self.spec.tokenizer is None else len(self.spec.tokenizer.level_sizes)
        return self.spec.tied and len(path) > 1 and path[0] == "tables" and int(path[1]) < real

    def reindex(self, model: ETEGRecModel) -> Ended:
        """Gives every item the codes that the tokenizer has for it now (`reindexing.reindexed`)."""
        return reindexed(model, self.spec)

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        """The k best items that the search finds; see `core.beam_search` for what is exact.

        Padding rows get no item: there is nothing to continue. More beams than the run's search where
        k is larger; but of k = beams + 1 the last may be missing.

        Raises:
            ValueError: ids outside 0 … N, or a history without items.
        """
        # One result beyond the beams gets none of its own: evaluation asks for it, to see whether it ties.
        beams = self.spec.beams if k <= self.spec.beams + 1 else k
        program = functools.partial(self._top_k, beams=beams)
        return ranked(program, model, histories, k, exclude, max_items=self.max_items, num_items=self.spec.num_items)

    @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("k", "beams"))
    def _top_k(
        self, graphdef: Any, state: nnx.State, ids: jax.Array, lengths: jax.Array, exclude: jax.Array, *,
        k: int, beams: int,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        model, spec = nnx.merge(graphdef, state), self.spec
        sequence = self.sequence(model, ids, lengths, with_target=False)
        scores, items = model.top_k(sequence, model.ids, k, beams=beams, exclude=exclude, normalise=spec.normalise)
        real_B1 = (lengths > 0)[:, None]
        return jnp.where(real_B1, scores, -jnp.inf), jnp.where(real_B1, items, 0)

    def sequence(
        self, model: ETEGRecModel, item_ids_BH: jax.Array, lengths_B: jax.Array, *, with_target: bool
    ) -> CodeSequence:
        """Histories → the codes that the model's own table has for them, laid out."""
        codes_BHL = model.ids.codes_of(item_ids_BH)
        return lay_out(codes_BHL, lengths_B, self.spec.model.template, with_target=with_target)

    def _code_loss(self, model: ETEGRecModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        return self._codes_and_hidden(model, batch, key)[0]

    def _codes_and_hidden(
        self, model: ETEGRecModel, batch: Batch, key: jax.Array | None
    ) -> tuple[LossSum, jax.Array, CodeSequence]:
        """The code loss, and the hidden states [B, T, D] of the sequences that it is of."""
        assert self._turns is not None
        ids_BH, lengths_B = batch["item_ids"], batch["lengths"]
        sequence = self.sequence(model, ids_BH, lengths_B, with_target=True)
        hidden_BTD = model.hidden(sequence, key)
        place_H = jnp.arange(ids_BH.shape[1])
        first_B = jnp.ones_like(lengths_B) if self._turns.targets == "all" else jnp.maximum(lengths_B - 1, 1)
        # The first item has no history: what it is like is no part of what is asked.
        weights_BH = ((place_H >= first_B[:, None]) & (place_H < lengths_B[:, None])).astype(jnp.float32)
        live = model.ids.siblings(ids_BH) if self.spec.normalise == "children" else None
        found = model.loss(hidden_BTD, sequence, weights_BH, live)
        names = [f"code{level + 1}_loss" for level in range(len(self.spec.model.level_sizes))]
        metrics = dict(zip(names, zip(found.totals_L, found.weights_L, strict=True), strict=True))
        loss = LossSum(found.totals_L.sum(), found.weights_L.sum(), weights_BH.sum(), metrics)
        return loss, hidden_BTD, sequence

    def _anchors(self, batch: Batch) -> Anchors:
        """Where tokenizer and recommender are aligned: at every supervised item, each item once.

        Behind a template's suffix stands the last one alone, and there the states are read.
        """
        assert self._turns is not None
        template = self.spec.model.template
        last_alone = self._turns.targets == "last" or (template is not None and bool(template.suffix))
        return anchors(batch["item_ids"], batch["lengths"], last_alone=last_alone)

    def _recommender_loss(self, model: ETEGRecModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        turns = self._turns
        assert turns is not None
        codes, hidden_BTD, sequence = self._codes_and_hidden(model, batch, key)
        codes = codes._replace(metrics={**codes.metrics, "code_loss": (codes.total, codes.weight)})
        codes = codes._replace(total=turns.code_loss * codes.total)
        if model.tokenizer is None:
            return codes
        at = self._anchors(batch)
        states_AD = model.state_before(hidden_BTD, sequence, at.rows, at.places)
        return self._with_alignment(codes, model, at, states_AD, step >= turns.aligned_from)

    def _tokenizer_loss(self, model: ETEGRecModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        """Reconstruction and quantisation of the anchors' items, each once, and both alignments."""
        turns = self._turns
        assert turns is not None and model.tokenizer is not None and model.vectors_NI is not None
        sequence = self.sequence(model, batch["item_ids"], batch["lengths"], with_target=True)
        at = self._anchors(batch)
        states_AD = model.state_before(model.hidden(sequence, None), sequence, at.rows, at.places)
        states_AD = jax.lax.stop_gradient(states_AD)
        weights_A = at.kept.astype(jnp.float32)
        found = model.tokenizer(model.vectors_NI[...][at.items])
        parts = {"reconstruction_loss": found.reconstruction_loss_B, "quantization_loss": found.quantization_loss_B}
        count = weights_A.sum()
        metrics = {name: ((part_A * weights_A).sum(), count) for name, part_A in parts.items()}
        own = LossSum((found.loss_B * weights_A).sum(), count, count, metrics)
        from_step = turns.aligned_from * turns.tokenizer_steps // max(turns.recommender_steps, 1)
        return self._with_alignment(own, model, at, states_AD, step >= from_step)

    def _with_alignment(
        self, loss: LossSum, model: ETEGRecModel, at: Anchors, states_AD: jax.Array, on: jax.Array
    ) -> LossSum:
        """The loss with both alignments' means beside its own mean; an item of several anchors counts once."""
        turns, tokenizer = self._turns, model.tokenizer
        assert turns is not None and tokenizer is not None and model.vectors_NI is not None
        assert model.enc_adapter is not None and model.dec_adapter is not None
        states_AD = states_AD.astype(jnp.float32)
        item = tokenizer(model.vectors_NI[...][at.items])
        preferred = tokenizer.quantizer.quantize(model.enc_adapter(states_AD))
        sia = sia_loss(preferred.distances, item.quantized.distances, at.kept, turns.sia_sign)
        psa = psa_loss(model.dec_adapter(states_AD), item.reconstruction_BI, at.kept)
        total = loss.total
        for weight, (part, count) in ((turns.kl_loss, sia), (turns.dec_cl_loss, psa)):
            total += jnp.where(on, weight, 0.0) * part / jnp.maximum(count, 1.0) * loss.weight
        return loss._replace(total=total, metrics={**loss.metrics, "sia_loss": sia, "psa_loss": psa})


def _is_table_of_words(path: tuple[Any, ...], _: Any) -> bool:
    """The Llama's own tables: no code is in them. Text around a history goes through them as they are."""
    return tuple(path)[:2] in (("llama", "embed_VD"), ("llama", "head_VD"))


def _first_name_is(name: str) -> Any:
    return lambda path, _: tuple(path)[:1] == (name,)


def _is_alignment(path: tuple[Any, ...], _: Any) -> bool:
    return bool(path) and path[0] in ("enc_adapter", "dec_adapter")
