"""ETEGRec as a recommender: tokenizer and recommender trained in turn, semantic IDs generated (arXiv 2409.05546).

Codes of histories and of targets are looked up on the device, in the one code table that the model holds: nothing that
is trained on, searched or saved can be of another version than the rest.

Legend: B rows, H history items, N items, I width of an item vector, L levels (the suffix level's last).
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

from core.beam_search import Normalise
from core.code_tables import build
from core.layers import Init
from core.llama import Compute
from core.lora import is_adapter
from efficientids.recommenders.base import Cycle, Ended, Histories, Phase, Ranked, Training, in_llama
from efficientids.recommenders.etegrec_losses import Losses
from efficientids.recommenders.etegrec_model import Contents, ETEGRecModel, ETEGRecSpec, SearchedModel, Turns
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

    @property
    def positions(self) -> int:
        """Positions of the longest history that is searched."""
        template = self.spec.model.template
        around = 1 if template is None else len(template.prefix) + len(template.suffix)
        return around + self.max_items * len(self.spec.model.level_sizes)

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
        losses, own = Losses(self.spec, turns), nnx.All(nnx.Not(in_llama), nnx.Not(in_tokenizer))
        adapted = is_adapter if self.spec.model.lora is not None else nnx.All(in_llama, nnx.Not(_is_table_of_words))
        llama = None if training.llama_optimizer is None else adapted
        recommender = dataclasses.replace(
            training.phase("recommender", own, losses.recommender, llama), num_steps=turns.recommender_steps
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
                training.phase("tokenizer", parameters, losses.tokenizer), num_steps=turns.tokenizer_steps,
                groups=[(parameters, turns.tokenizer)], on_end=self.reindex, validated=False,
            )  # fmt: skip
            phases = [tokenizer, recommender]
        plan: list[Phase | Cycle] = [Cycle(phases, turns.rounds)]
        if turns.finetune_steps:
            plan.append(self._finetuning(training, turns, llama, losses))
        return plan

    def _switched_off(self, turns: Turns) -> list[tuple[Any, str]]:
        """What the weights of the losses leave without a gradient in the recommender's turns."""
        weights = {
            "enc_adapter": ("--kl_loss", turns.kl_loss),
            "dec_adapter": ("--dec_cl_loss", turns.dec_cl_loss),
            "codebook_logits": ("--code_loss", turns.code_loss),
        }
        return [(_first_name_is(name), f"zero: {flag} 0") for name, (flag, weight) in weights.items() if not weight]

    def _finetuning(self, training: Training, turns: Turns, llama: Any, losses: Losses) -> Phase:
        assert turns.finetune is not None
        # With the tokenizer goes what it shares: its codes are final.
        own = nnx.All(nnx.Not(in_llama), nnx.Not(in_tokenizer), nnx.Not(self._is_shared_table), nnx.Not(_is_alignment))
        groups = [(own, turns.finetune)]
        if llama is not None:
            assert training.llama_optimizer is not None
            share = turns.finetune.learning_rate / training.optimizer.learning_rate
            rate = training.llama_optimizer.learning_rate * min(1.0, share)
            groups.append((llama, dataclasses.replace(turns.finetune, learning_rate=rate)))
        phase = training.phase("finetune", own, losses.codes)
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
        program = functools.partial(search, beams=beams, normalise=self.spec.normalise)
        assert isinstance(model, ETEGRecModel)
        return ranked(
            program, self.searched(model), histories, k, exclude, max_items=self.max_items,
            num_items=self.spec.num_items, row_bytes=model.search_bytes(self.positions, beams),
        )  # fmt: skip

    def searched(self, model: ETEGRecModel) -> SearchedModel:
        """The part of a model that a search reads, with the model's own arrays."""
        own = {name: part for name, part in nnx.state(model).items() if name not in ("tokenizer", "vectors_NI")}
        found: SearchedModel = nnx.merge(self._searched, nnx.State(own))
        return found

    @functools.cached_property
    def _searched(self) -> Any:
        """The graph of `SearchedModel`, equal for systems that differ in no shape."""

        def make() -> SearchedModel:
            config, key = self.spec.model, jax.random.key(0)
            return SearchedModel(config, self.spec.table, key, compute=self._compute, init=self._init)

        return nnx.graphdef(nnx.eval_shape(make))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("k", "beams", "normalise"))
def search(
    graphdef: Any, state: nnx.State, ids: jax.Array, lengths: jax.Array, exclude: jax.Array, *,
    k: int, beams: int, normalise: Normalise,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The program of `ETEGRec.recommend`, over a `SearchedModel`: no function of a run, so that runs share it."""
    model = nnx.merge(graphdef, state)
    sequence = model.sequence(ids, lengths, with_target=False)
    scores, items = model.top_k(sequence, model.ids, k, beams=beams, exclude=exclude, normalise=normalise)
    real_B1 = (lengths > 0)[:, None]
    return jnp.where(real_B1, scores, -jnp.inf), jnp.where(real_B1, items, 0)


def _is_table_of_words(path: tuple[Any, ...], _: Any) -> bool:
    """The Llama's own tables: no code is in them. Text around a history goes through them as they are."""
    return tuple(path)[:2] in (("llama", "embed_VD"), ("llama", "head_VD"))


def _first_name_is(name: str) -> Any:
    return lambda path, _: tuple(path)[:1] == (name,)


def _is_alignment(path: tuple[Any, ...], _: Any) -> bool:
    return bool(path) and path[0] in ("enc_adapter", "dec_adapter")
