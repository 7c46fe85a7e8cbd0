"""ETEGRec's shapes, schedule and model: the recommender, its tokenizer, and the one code table that both share.

Legend: H history items, N items, I width of an item vector, L levels (the suffix level's last).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from core.alignment import SIASign
from core.beam_search import Normalise
from core.code_sequences import CodeSequence, Template, lay_out
from core.code_tables import build
from core.config import LlamaConfig
from core.functional import Buffer
from core.lora import LoRAConfig
from core.models.etegrec import ETEGRecConfig, LlamaETEGRecModel
from core.rqvae import RQVAE, RQVAEConfig
from core.semantic_ids import SemanticIDs, TableShape
from core.suffixes import with_suffix
from efficientids.recommenders.base import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class ETEGRecSpec:
    """Everything that decides the shapes of the system; stands in the run's `model.json`.

    Attributes:
        model: of the Llama with its projectors and tables.
        num_items: N.
        max_items: H, the newest items of a history that are looked at.
        table: shapes of the code table and its trie.
        tokenizer: None for codes that were given: nothing to align with, nothing to train in turn.
        tied: the recommender's tables of the real levels are the tokenizer's codebooks, the same parameters.
        beams: of the search; more where more results are asked for.
        normalise: what the code loss and the search's scores are log-probabilities over.
        sinkhorn: the tokenizer's last real level spreads items over its codes (`core.sinkhorn`).
    """

    model: ETEGRecConfig
    num_items: int
    max_items: int
    table: TableShape
    tokenizer: RQVAEConfig | None
    tied: bool = False
    beams: int = 20
    normalise: Normalise = "alphabet"
    sinkhorn: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `model.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ETEGRecSpec:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: fields are missing or unknown.
        """
        model, tokenizer = dict(values["model"]), values["tokenizer"]
        model["llama"] = LlamaConfig.from_json(model["llama"])
        lora, template = model["lora"], model["template"]
        model["lora"] = None if lora is None else LoRAConfig.from_json(lora)
        model["template"] = None if template is None else Template(*(tuple(template[n]) for n in ("prefix", "suffix")))
        model["level_sizes"] = tuple(model["level_sizes"])
        return ETEGRecSpec(**{
            **values,
            "model": ETEGRecConfig(**model),
            "table": TableShape.from_json(values["table"]),
            "tokenizer": None if tokenizer is None else RQVAEConfig.from_json(tokenizer),
        })  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Turns:
    """How tokenizer and recommender are trained; plain data.

    Attributes:
        rounds: turns of each; without a tokenizer's turn (`tokenizer_steps` 0) the recommender's are one run.
        tokenizer_steps, recommender_steps: of one turn.
        aligned_from: recommender's steps (and the tokenizer's share of them) without alignment losses.
        tokenizer: its optimiser.
        code_loss, kl_loss, dec_cl_loss: weights of codes, of sequence-item and of preference-semantic alignment.
        sia_sign: see `core.alignment.sia_loss`.
        targets: "all": every item of a history is learnt from those before it; "last": the official code's.
        finetune_steps: from the best checkpoint, codes alone, with the tokenizer as it is; 0: none.
        finetune: its optimiser; None without.
    """

    rounds: int
    tokenizer_steps: int
    recommender_steps: int
    aligned_from: int
    tokenizer: OptimizerConfig
    code_loss: float = 1.0
    kl_loss: float = 1e-4
    dec_cl_loss: float = 3e-4
    sia_sign: SIASign = "paper"
    targets: Literal["all", "last"] = "all"
    finetune_steps: int = 0
    finetune: OptimizerConfig | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What the model holds before its first step that no random start gives.

    Attributes:
        codes_NL: int [N, L], suffixes included, of items 1 … N.
        tokenizer: the RQ-VAE that gave them; None with codes that came without one.
        vectors_NI: float32 [N + 1, I], its input, row 0 zeros.
    """

    codes_NL: np.ndarray
    tokenizer: RQVAE | None = None
    vectors_NI: np.ndarray | None = None


class SearchedModel(LlamaETEGRecModel):
    """What a search reads. How many items there are is in the padded shapes of `ids` alone: catalogues of equal shapes
    share their programs.

    Attributes:
        ids: codes and trie.
    """

    def __init__(
        self, config: ETEGRecConfig, table: TableShape, key: jax.Array, shared: Sequence[Any] = (), **parts: Any
    ) -> None:
        super().__init__(config, key, shared, **parts)
        self.ids = SemanticIDs(table)

    def sequence(self, item_ids_BH: jax.Array, lengths_B: jax.Array, *, with_target: bool) -> CodeSequence:
        """Histories (int32 [B, H] right-padded, int32 [B]) → the codes that this table has for them, laid out."""
        codes_BHL = self.ids.codes_of(item_ids_BH)
        return lay_out(codes_BHL, lengths_B, self.config.template, with_target=with_target)


class ETEGRecModel(SearchedModel):
    """The recommender, the tokenizer, the code table with its trie, and the tokenizer's input: one value.

    Attributes:
        tokenizer: None for codes that were given.
        vectors_NI: float32 [N + 1, I], row 0 zeros; None without a tokenizer.
    """

    def __init__(self, spec: ETEGRecSpec, key: jax.Array, **parts: Any) -> None:
        key_tokenizer, key_model = jax.random.split(key)
        tokenizer = None if spec.tokenizer is None else RQVAE(spec.tokenizer, key_tokenizer)
        shared = list(tokenizer.quantizer.codebooks) if spec.tied and tokenizer is not None else []
        super().__init__(spec.model, spec.table, key_model, shared, **parts)
        self.spec, self.tokenizer = spec, tokenizer
        width = None if spec.tokenizer is None else spec.tokenizer.input_dim
        self.vectors_NI = None if width is None else Buffer(jnp.zeros((spec.num_items + 1, width)))

    def __call__(
        self,
        input_ids: jax.Array,
        item_ids: jax.Array,
        item_mask: jax.Array,
        *,
        lengths: jax.Array | None = None,
        training: bool = False,
        top_k: int = 10,
        exclude: jax.Array | None = None,
        return_logits: bool = False,
    ) -> dict[str, jax.Array]:
        """Recommends what comes after each row's items: the signature of `LlamaEfficientIDSModel`.

        Args:
            input_ids: int [B, T]; not read: the text around a history is the run's own `--prompt`.
            item_ids: items, int [B, T]; read where `item_mask`, the newest `max_items` of a row.
            item_mask: bool or 0/1 [B, T].
            lengths: int [B], positions of each row that are real; default all.
            training: must be False; the loss is `ETEGRec.plan`'s.
            top_k: k.
            exclude: int [B, X], items never to recommend, padded with 0.
            return_logits: also return `logits`.

        Returns:
            `top_k_items` int32 [B, k] and `top_k_scores` float32 [B, k], log-probabilities, best first, as the beam
            search finds them (`core.beam_search` says what is exact); with `return_logits`, `logits` float32 [B, K_1]
            of the codes of the first level: there are none of items.

        Raises:
            ValueError: `training`, ids outside 1 … N, or a row without items. Under `jax.jit` these are not known.
        """
        if training:
            raise ValueError("training=True: train with train_llama.py; __call__ is inference")
        spec, width = self.spec, item_ids.shape[1]
        mask_BT = jnp.asarray(item_mask, bool)
        if lengths is not None:
            mask_BT &= jnp.arange(width) < lengths[:, None]
        _check(item_ids, mask_BT, spec.num_items)
        # Items to the left, in order; then the newest of them.
        packed_BT = jnp.take_along_axis(item_ids, jnp.argsort(~mask_BT, axis=1, stable=True), axis=1)
        count_B = mask_BT.sum(axis=1, dtype=jnp.int32)
        kept_B = jnp.minimum(count_B, spec.max_items)
        columns_BH = (count_B - kept_B)[:, None] + jnp.arange(min(width, spec.max_items))
        ids_BH = jnp.take_along_axis(packed_BT, jnp.minimum(columns_BH, width - 1), axis=1)
        sequence = self.sequence(ids_BH, kept_B, with_target=False)
        beams = max(top_k, spec.beams)
        scores_Bk, items_Bk = self.top_k(
            sequence, self.ids, top_k, beams=beams, exclude=exclude, normalise=spec.normalise
        )  # fmt: skip
        results = {"top_k_items": items_Bk, "top_k_scores": scores_Bk}
        if return_logits:
            results["logits"] = self.logits(self.state(self.hidden(sequence), sequence), 0)
        return results


def _check(item_ids_BT: jax.Array, mask_BT: jax.Array, num_items: int) -> None:
    """Refuses ids that are no items, and rows without any, where they are known."""
    if isinstance(item_ids_BT, jax.core.Tracer) or isinstance(mask_BT, jax.core.Tracer):
        return
    ids, mask = np.asarray(item_ids_BT), np.asarray(mask_BT)
    read = ids[mask]
    if read.size and (read.min() < 1 or read.max() > num_items):
        raise ValueError(f"item_ids: ids {read.min()} … {read.max()} where item_mask is 1, expected 1 … {num_items}")
    if not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        raise ValueError(f"item_ids: row {row} has no items (item_mask is 0 throughout); nothing to go on from")


def code_table(codes_NL: np.ndarray, shape: TableShape) -> SemanticIDs:
    """The table and trie of real codes int [N, L − 1], with their suffixes, in (at least) the given shape.

    Raises:
        ValueError: more items with equal codes than the suffix level has codes.
    """
    return build(with_suffix(codes_NL, shape.level_sizes[-1]), shape.level_sizes, shape)
