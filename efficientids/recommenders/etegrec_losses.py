"""What ETEGRec's phases minimise: codes, the tokenizer's own losses, and both alignments (arXiv 2409.05546).

Legend: B rows, H history items, A anchors, T positions, D the Llama's width, I width of an item vector, L levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from core.alignment import Anchors, anchors, psa_loss, sia_loss
from core.code_sequences import CodeSequence
from efficientids.recommenders.base import Batch, LossSum
from efficientids.recommenders.etegrec_model import ETEGRecModel, ETEGRecSpec, Turns


class Losses:
    """The losses of a system of these shapes, trained by this schedule: `codes`, `recommender` and `tokenizer`, each a
    `Phase.loss`. Batches hold `item_ids` int32 [B, H], right-padded, and `lengths` int32 [B]; sums are float32."""

    def __init__(self, spec: ETEGRecSpec, turns: Turns) -> None:
        self._spec, self._turns = spec, turns

    def codes(self, model: ETEGRecModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        """Fine-tuning's: Σ −log p(code) over all codes of all items that are asked for."""
        return self._codes_and_hidden(model, self._asked(batch, key), key)[0]

    def recommender(self, model: ETEGRecModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        """That of the recommender's turns: codes, and from `aligned_from` on both alignments."""
        turns = self._turns
        batch = self._asked(batch, key)
        codes, hidden_BTD, sequence = self._codes_and_hidden(model, batch, key)
        codes = codes._replace(metrics={**codes.metrics, "code_loss": (codes.total, codes.weight)})
        codes = codes._replace(total=turns.code_loss * codes.total)
        if model.tokenizer is None:
            return codes
        at = self._anchors(batch)
        states_AD = model.state_before(hidden_BTD, sequence, at.rows, at.places)
        return self._with_alignment(codes, model, at, states_AD, step >= turns.aligned_from)

    def tokenizer(self, model: ETEGRecModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        """Reconstruction and quantisation of the items that follow others, each once, and both alignments."""
        turns = self._turns
        assert model.tokenizer is not None and model.vectors_NI is not None
        items = anchors(batch["item_ids"], batch["lengths"], last_alone=False)
        batch = self._asked(batch, key)
        sequence = model.sequence(batch["item_ids"], batch["lengths"], with_target=True)
        at = self._anchors(batch)
        states_AD = model.state_before(model.hidden(sequence, None), sequence, at.rows, at.places)
        states_AD = jax.lax.stop_gradient(states_AD)
        weights_A = items.kept.astype(jnp.float32)
        found = model.tokenizer(model.vectors_NI[...][items.items])
        parts = {"reconstruction_loss": found.reconstruction_loss_B, "quantization_loss": found.quantization_loss_B}
        count = weights_A.sum()
        metrics = {name: ((part_A * weights_A).sum(), count) for name, part_A in parts.items()}
        own = LossSum((found.loss_B * weights_A).sum(), count, count, metrics)
        from_step = turns.aligned_from * turns.tokenizer_steps // max(turns.recommender_steps, 1)
        return self._with_alignment(own, model, at, states_AD, step >= from_step)

    def _asked(self, batch: Batch, key: jax.Array) -> Batch:
        """The batch; where targets alone are learnt, one beginning of each history, which ends with its target. The
        released code makes a row of every one; here another is drawn at every step, each as likely."""
        if self._turns.targets == "all":
            return batch
        lengths_B = jnp.asarray(batch["lengths"])
        place_B = jax.random.uniform(jax.random.fold_in(key, 1), lengths_B.shape) * (lengths_B - 1)
        drawn_B = jnp.minimum(2 + place_B.astype(jnp.int32), lengths_B)
        return {**batch, "lengths": drawn_B}

    def _codes_and_hidden(
        self, model: ETEGRecModel, batch: Batch, key: jax.Array | None
    ) -> tuple[LossSum, jax.Array, CodeSequence]:
        """The code loss, and the hidden states [B, T, D] of the sequences that it is of."""
        ids_BH, lengths_B = batch["item_ids"], batch["lengths"]
        sequence = model.sequence(ids_BH, lengths_B, with_target=True)
        hidden_BTD = model.hidden(sequence, key)
        place_H = jnp.arange(ids_BH.shape[1])
        first_B = jnp.ones_like(lengths_B) if self._turns.targets == "all" else jnp.maximum(lengths_B - 1, 1)
        # The first item has no history: what it is like is no part of what is asked.
        weights_BH = ((place_H >= first_B[:, None]) & (place_H < lengths_B[:, None])).astype(jnp.float32)
        live = model.ids.siblings(ids_BH) if self._spec.normalise == "children" else None
        found = model.loss(hidden_BTD, sequence, weights_BH, live)
        names = [f"code{level + 1}_loss" for level in range(len(self._spec.model.level_sizes))]
        metrics = dict(zip(names, zip(found.totals_L, found.weights_L, strict=True), strict=True))
        loss = LossSum(found.totals_L.sum(), found.weights_L.sum(), weights_BH.sum(), metrics)
        return loss, hidden_BTD, sequence

    def _anchors(self, batch: Batch) -> Anchors:
        """Where tokenizer and recommender are aligned: at every supervised item, each item once.

        Behind a template's suffix stands the last one alone, and there the states are read.
        """
        template = self._spec.model.template
        last_alone = self._turns.targets == "last" or (template is not None and bool(template.suffix))
        return anchors(batch["item_ids"], batch["lengths"], last_alone=last_alone)

    def _with_alignment(
        self, loss: LossSum, model: ETEGRecModel, at: Anchors, states_AD: jax.Array, on: jax.Array
    ) -> LossSum:
        """The loss with both alignments' means beside its own mean; an item of several anchors counts once."""
        turns, tokenizer = self._turns, model.tokenizer
        assert tokenizer is not None and model.vectors_NI is not None
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
