"""ETEGRec's shapes, schedule and model: the recommender, its tokenizer, and the one code table that both share.

Legend: H history items, N items, I width of an item vector, L levels (the suffix level's last).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from core.alignment import SIASign
from core.beam_search import Normalise
from core.code_sequences import Template
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


class ETEGRecModel(LlamaETEGRecModel):
    """The recommender, the tokenizer, the code table with its trie, and the tokenizer's input: one value.

    Attributes:
        tokenizer: None for codes that were given.
        ids: codes and trie.
        vectors_NI: float32 [N + 1, I], row 0 zeros; None without a tokenizer.
    """

    def __init__(self, spec: ETEGRecSpec, key: jax.Array, **parts: Any) -> None:
        key_tokenizer, key_model = jax.random.split(key)
        tokenizer = None if spec.tokenizer is None else RQVAE(spec.tokenizer, key_tokenizer)
        shared = list(tokenizer.quantizer.codebooks) if spec.tied and tokenizer is not None else []
        super().__init__(spec.model, key_model, shared, **parts)
        self.tokenizer = tokenizer
        self.ids = SemanticIDs(spec.table)
        width = None if spec.tokenizer is None else spec.tokenizer.input_dim
        self.vectors_NI = None if width is None else Buffer(jnp.zeros((spec.num_items + 1, width)))


def code_table(codes_NL: np.ndarray, shape: TableShape) -> SemanticIDs:
    """The table and trie of real codes int [N, L − 1], with their suffixes, in (at least) the given shape.

    Raises:
        ValueError: more items with equal codes than the suffix level has codes.
    """
    return build(with_suffix(codes_NL, shape.level_sizes[-1]), shape.level_sizes, shape)
