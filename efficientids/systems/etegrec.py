"""`--recommender etegrec`: from a configuration, a data set and semantic IDs to ETEGRec and its model at the start."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from core.chunked import CHUNK_ELEMENTS
from core.code_tables import largest_shape
from core.config import LlamaConfig
from core.models.etegrec import ETEGRecConfig
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import OptimizerConfig, Recommender
from efficientids.recommenders.etegrec import ETEGRec
from efficientids.recommenders.etegrec_model import ETEGRecModel, ETEGRecSpec, Turns
from efficientids.systems import base
from efficientids.systems.base import Earlier, Record, Scale, unrecorded
from efficientids.systems.llama import (
    attention_in_words,
    checked_compute,
    described,
    llama_config,
    llama_init,
    lora_config,
    mode_text,
    resolve_mode,
    restored_compute,
    starts_at_random,
    training_mode,
)  # fmt: skip
from efficientids.systems.llama_defaults import check_positions, from_scratch, start, with_llama_defaults
from efficientids.systems.semantic_ids import (
    CodeShapes,
    check_same_codes,
    code_shapes,
    contents,
    prompt_template,
    refuse_idle,
    resolve_levels,
)  # fmt: skip

MAX_ITEMS = 20
_ALIGNED_FROM = 10.0


class ETEGRecSystem:
    """See `efficientids.systems.base.System`."""

    may_change = frozenset({"max_items", "beams", "normalise", "sinkhorn", "model.dropout", "model.init_std"})

    def resolve(self, config: TrainConfig, scale: Scale) -> TrainConfig:
        """See `System.resolve`."""
        llama, items = llama_config(config), config.max_seq_len or MAX_ITEMS
        config = resolve_levels(config, scale.num_items)
        codes = code_shapes(config)
        refuse_idle(config, codes)
        template = prompt_template(config, llama)
        around = 1 if template is None else len(template.prefix) + len(template.suffix)
        positions = around + (items + 1) * len(codes.level_sizes)
        check_positions(
            llama, positions, f"{items} items of {len(codes.level_sizes)} codes (--max_seq_len) and the next"
        )
        config = dataclasses.replace(
            with_llama_defaults(config, scale, llama),
            max_seq_len=items,
            seq_len=positions,
            init_std=config.init_std or 0.02,
        )
        config = resolve_mode(config, llama, from_scratch=from_scratch(config))
        buckets = base.buckets_of(config, _row(config))
        epoch = base.steps_per_epoch(scale.train_lengths, buckets)
        config = base.resolve_training(config, scale, buckets, max_warmup=500)
        assert config.num_steps is not None
        turn = _turn(config, codes, epoch)
        epochs = config.num_steps / epoch
        aligned_from = min(_ALIGNED_FROM, epochs / 4) if config.aligned_from is None else config.aligned_from
        return dataclasses.replace(
            config,
            num_steps=turn * max(1, round(config.num_steps / turn)),
            aligned_from=None if codes.rqvae is None else aligned_from,
            finetune_epochs=epochs / 5 if config.finetune_epochs is None else config.finetune_epochs,
        )

    def mode(self, config: TrainConfig, resolved: TrainConfig) -> str:
        """See `System.mode`."""
        return mode_text(resolved, training_mode(config, llama_config(config))[1])

    def headline(self, config: TrainConfig) -> str:
        """See `System.headline`."""
        llama, sizes = llama_config(config), code_shapes(config).level_sizes
        levels = " × ".join(map(str, sizes))
        words = f"{described(config, llama)}, codes {levels}, {config.max_seq_len} items and the next in "
        words += f"{config.seq_len} positions"
        return words + attention_in_words(config, llama)

    def recommender(
        self, config: TrainConfig, dataset: Dataset, earlier: Earlier | None, record: Record = unrecorded
    ) -> ETEGRec:
        """See `System.recommender`."""
        llama, scale = llama_config(config), Scale.of(dataset)
        if earlier is not None:
            check_same_codes(config, dataset, earlier)
        codes = code_shapes(config)
        return ETEGRec(
            spec(config, llama, dataset.catalogue_size, codes),
            compute=checked_compute(config, llama),
            init=llama_init(config),
            training=base.training(config, _row(config), dataset),
            turns=_turns(config, scale, codes),
            contents=contents(config, dataset, record) if earlier is None else None,
        )

    def pretrained(self, config: TrainConfig) -> bool:
        """See `System.pretrained`."""
        return not starts_at_random(config)

    def start(self, recommender: Recommender, config: TrainConfig, mesh: Mesh | None = None) -> nnx.Module:
        """At random, or with the pretrained Llama in its place; with the tokenizer and the codes that it gave."""
        assert isinstance(recommender, ETEGRec)
        model = start(recommender, config, recommender.spec.model.llama, mesh)
        assert isinstance(model, ETEGRecModel)
        try:
            return recommender.filled(model)
        except ValueError as error:
            made = (
                "the pretrained tokenizer" if config.semantic_ids is None else f"--semantic_ids {config.semantic_ids}"
            )
            raise UserError(f"{made}: {error}") from error

    def planned(self, config: TrainConfig, scale: Scale) -> ETEGRec:
        """See `System.planned`."""
        llama, codes = llama_config(config), code_shapes(config)
        return ETEGRec(
            spec(config, llama, scale.num_items, codes),
            compute=checked_compute(config, llama, chunk_elements=CHUNK_ELEMENTS, platform="gpu"),
            init=llama_init(config),
            training=base.training(config, _row(config), None),
            turns=_turns(config, scale, codes),
        )

    def restored(self, spec: Mapping[str, Any], config: TrainConfig, precision: str) -> ETEGRec:
        """See `System.restored`."""
        known = ETEGRecSpec.from_json(dict(spec))
        return ETEGRec(known, compute=restored_compute(config, precision), init=llama_init(config))


SYSTEMS: dict[str, base.System] = {"etegrec": ETEGRecSystem()}


def spec(config: TrainConfig, llama: LlamaConfig, num_items: int, codes: CodeShapes) -> ETEGRecSpec:
    """The shapes of a resolved configuration."""
    assert config.dropout is not None and config.init_std is not None
    tokenizer = codes.rqvae
    if config.tie_to_tokenizer and tokenizer is None:
        raise UserError("--tie_to_tokenizer: these semantic IDs come without a tokenizer to share codebooks with")
    return ETEGRecSpec(
        model=ETEGRecConfig(
            llama=llama,
            level_sizes=codes.level_sizes,
            code_dim=config.code_dim,
            latent_dim=None if tokenizer is None else tokenizer.latent_dim,
            item_dim=None if tokenizer is None else tokenizer.input_dim,
            template=prompt_template(config, llama),
            init_std=config.init_std,
            dropout=config.dropout,
            lora=lora_config(config),
        ),
        num_items=num_items,
        max_items=_items(config),
        # Whatever codes items get later, their table has these shapes: nothing compiles anew, and checkpoints fit.
        table=largest_shape(codes.level_sizes, num_items),
        tokenizer=tokenizer,
        tied=config.tie_to_tokenizer,
        beams=config.beams,
        normalise=config.normalise,
        sinkhorn=codes.sinkhorn,
    )


def _row(config: TrainConfig) -> int:
    """Items of a training row: a whole history and the target behind it, at positions as a search has them."""
    return _items(config) + 1


def _items(config: TrainConfig) -> int:
    assert config.max_seq_len is not None
    return config.max_seq_len


def _turn(config: TrainConfig, codes: CodeShapes, epoch: int) -> int:
    """Steps of the recommender's turn: all of its steps, if they are fewer or nothing is done between turns."""
    assert config.num_steps is not None
    # Tied tables move with the codebooks: items get the codes of the moved ones after each turn.
    if not _alternates(config, codes) and not config.tie_to_tokenizer:
        return config.num_steps
    return max(1, min(config.num_steps, math.ceil(config.recommender_epochs * epoch)))


def _alternates(config: TrainConfig, codes: CodeShapes) -> bool:
    return codes.rqvae is not None and config.tokenizer_epochs > 0


def _turns(config: TrainConfig, scale: Scale, codes: CodeShapes) -> Turns:
    assert config.num_steps is not None and config.learning_rate is not None and config.warmup_steps is not None
    assert config.finetune_epochs is not None
    epoch = base.steps_per_epoch(scale.train_lengths, base.buckets_of(config, _row(config)))
    turn = _turn(config, codes, epoch)
    finetune = math.ceil(config.finetune_epochs * epoch)

    def optimizer(learning_rate: float, steps: int) -> OptimizerConfig:
        return OptimizerConfig(learning_rate, min(config.warmup_steps or 0, steps // 10), config.weight_decay)

    rounds = max(1, config.num_steps // turn)
    tokenizer_steps = math.ceil(config.tokenizer_epochs * epoch) if _alternates(config, codes) else 0
    return Turns(
        rounds=rounds,
        tokenizer_steps=tokenizer_steps,
        recommender_steps=turn,
        aligned_from=math.ceil((config.aligned_from or 0.0) * epoch),
        tokenizer=optimizer(config.tokenizer_learning_rate, rounds * tokenizer_steps),
        code_loss=config.code_loss,
        kl_loss=config.kl_loss,
        dec_cl_loss=config.dec_cl_loss,
        sia_sign=config.sia_sign,
        targets=config.targets,
        finetune_steps=finetune,
        finetune=optimizer(config.finetune_learning_rate, finetune) if finetune else None,
    )
