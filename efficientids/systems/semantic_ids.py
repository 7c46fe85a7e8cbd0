"""What ETEGRec is given beside its parameters: semantic IDs with the tokenizer that made them, and text around them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.code_sequences import Template
from core.config import LlamaConfig
from core.rqvae import RQVAEConfig
from core.semantic_ids import version_name
from efficientids import processes
from efficientids.data.dataset import Dataset
from efficientids.data.texts.tokens import check_vocabulary, start_token
from efficientids.data.texts.tokens import open_tokenizer as text_tokenizer
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.etegrec_model import Contents, ETEGRecSpec
from efficientids.recommenders.shapes import power_of_two
from efficientids.runs import locate
from efficientids.systems.base import Earlier, Record, unrecorded
from efficientids.systems.llama import published_tokenizer, text_tokenizer_file
from efficientids.tokenizing.making import make_tokenizer
from efficientids.tokenizing.settings import TokenizerSettings
from efficientids.tokenizing.tokenizer import Tokenizer, open_tokenizer
from efficientids.tokenizing.vectors import COOCCURRENCE_DIM, from_histories, joined

_HISTORY = "{history}"
_OF_MAKING = ("levels", "suffix_size", "residual_grad", "pretrain_epochs")
_OF_TURNS = (
    "kl_loss", "dec_cl_loss", "sia_sign", "aligned_from", "tokenizer_epochs", "recommender_epochs",
    "tokenizer_learning_rate",
)  # fmt: skip
_LEVELS, _CODES, _ITEMS_A_CODE = 3, 256, 4


class CodeShapes(NamedTuple):
    """What is known of semantic IDs before there are any.

    level_sizes: codes of each level, the suffix level's last. rqvae: the tokenizer's shape; None of codes that came
    without an RQ-VAE. sinkhorn: its last real level spreads items over its codes.
    """

    level_sizes: tuple[int, ...]
    rqvae: RQVAEConfig | None
    sinkhorn: bool = False


def resolve_levels(config: TrainConfig, num_items: int) -> TrainConfig:
    """`levels`, settled; None where codes are there already, from --semantic_ids or --load_checkpoint.

    The published 256 codes a level, but no more than k-means can start from `_ITEMS_A_CODE` items each: with one item
    a code there would be nothing in common to share codes for.
    """
    if config.levels is not None or config.semantic_ids is not None or config.load_checkpoint is not None:
        return config
    codes = max(2, min(_CODES, power_of_two(num_items // _ITEMS_A_CODE + 1) // 2))
    return dataclasses.replace(config, levels=",".join([str(codes)] * _LEVELS))


def code_shapes(config: TrainConfig) -> CodeShapes:
    """Those of --semantic_ids, of the run that --load_checkpoint goes on from, or of the tokenizer that will be
    pretrained (`resolve_levels` comes first).

    Raises:
        UserError: no such tokenizer or run, or one whose codes are of another width than --code_dim.
    """
    if config.semantic_ids is None and config.load_checkpoint is not None:
        return _earlier_codes(config.load_checkpoint)
    if config.semantic_ids is None:
        settings = _settings(config)
        return CodeShapes((*settings.levels, settings.suffix_size), settings.rqvae(COOCCURRENCE_DIM))
    given = _opened(config.semantic_ids, None)
    if given.rqvae is not None and given.rqvae.latent_dim != config.code_dim:
        raise UserError(
            f"--code_dim {config.code_dim}: the codebooks of --semantic_ids {config.semantic_ids} have width "
            f"{given.rqvae.latent_dim}; give that"
        )
    return CodeShapes(given.level_sizes, given.rqvae, bool(given.settings.get("sinkhorn", False)))


def _earlier_codes(checkpoint: str) -> CodeShapes:
    """Those of the run that a checkpoint is of: `resolve` and plans need them before any parameter is read."""
    run, _ = locate(checkpoint)
    described = run.read_model()
    try:
        name, spec = described["recommender"], described["spec"]
        if name != "etegrec":
            raise UserError(f"--load_checkpoint {run.path} is a checkpoint of --recommender {name}; give that")
        known = ETEGRecSpec.from_json(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise run.damaged(error) from error
    return CodeShapes(known.model.level_sizes, known.tokenizer, known.sinkhorn)


def refuse_idle(config: TrainConfig, codes: CodeShapes) -> None:
    """Refuses flags that nothing would read, by where the codes come from and what came with them.

    With --load_checkpoint the earlier run's own flags may be given again.

    Raises:
        UserError: names the flag and what to do.
    """
    if config.semantic_ids is not None:
        _refuse(config, _OF_MAKING, f"--semantic_ids {config.semantic_ids} has its codes", "; or tokenize again")
    elif config.load_checkpoint is not None:
        run, _ = locate(config.load_checkpoint)
        _refuse(config, _OF_MAKING, f"the codes are those of {run.path}", "", run.read_config())
    if codes.rqvae is None:
        _refuse(config, _OF_TURNS, "these semantic IDs come without an RQ-VAE to train or to align with",
                ", or take IDs of `tokenize --method rqvae`")  # fmt: skip


def _refuse(
    config: TrainConfig, names: Sequence[str], why: str, remedy: str, known: Mapping[str, Any] | None = None
) -> None:
    for name in names:
        value, default = getattr(config, name), getattr(TrainConfig, name)
        if value not in (default, (known or {}).get(name, default)):
            raise UserError(f"--{name} {value} would do nothing: {why}; leave it out{remedy}")


def contents(config: TrainConfig, dataset: Dataset, record: Record = unrecorded) -> Contents:
    """Codes and tokenizer of --semantic_ids; without it, of a tokenizer pretrained on co-occurrence vectors.

    Its epochs are recorded as events "pretraining" of step 0.

    Raises:
        UserError: what `open_tokenizer` and `make_tokenizer` refuse.
    """
    if config.semantic_ids is not None:
        found = _opened(config.semantic_ids, dataset)
        widths = () if found.standard is None else found.standard.widths
        source = f" of item vectors with {' + '.join(map(str, widths))} columns" if widths else ""
        source = f"--semantic_ids {config.semantic_ids}, {found.method}{source}"
    else:
        source = f"an RQ-VAE of {COOCCURRENCE_DIM} columns from which items are consumed near which"
        _say(f"no --semantic_ids: {source}")
        vectors = joined([("cooccurrence", from_histories(dataset, COOCCURRENCE_DIM, config.seed))])
        found = make_tokenizer(
            vectors, _settings(config), _say, lambda row: record({**row, "event": "pretraining", "step": 0})
        )
        # One tokenizer for all: nothing says that two machines round alike.
        codes_NL, parameters, vectors_NI = processes.of_first((found.codes_NL, found.parameters, found.vectors_NI))
        found = dataclasses.replace(found, codes_NL=codes_NL, parameters=parameters, vectors_NI=vectors_NI)
    _say(f"codes of version {found.version}: {source}")
    rqvae = None if found.rqvae is None else found.rqvae_model()
    return Contents(np.asarray(found.codes_NL[1:]), rqvae, None if rqvae is None else found.vectors_NI)


def check_same_codes(config: TrainConfig, dataset: Dataset, earlier: Earlier) -> None:
    """Says which codes `earlier`'s parameters were trained on, and refuses --semantic_ids of another version.

    Those that the earlier run itself began with may be named, as its config.yaml does; its turns moved their codes.

    Raises:
        UserError: names both versions.
    """
    trained_on = version_name(earlier.model.ids.version[...])  # type: ignore[attr-defined]
    if config.semantic_ids in (None, earlier.config.semantic_ids):
        _say(f"codes of version {trained_on}: the checkpoint's")
        return
    given = _opened(config.semantic_ids, dataset).version
    if given != trained_on:
        raise UserError(
            f"--semantic_ids {config.semantic_ids} are of version {given}, and the parameters of {earlier.where} were "
            f"trained on codes of version {trained_on}; leave --semantic_ids out: the checkpoint holds its own"
        )


def prompt_template(config: TrainConfig, llama: LlamaConfig) -> Template | None:
    """The --prompt as tokens; None without one.

    Raises:
        UserError: it does not say where the history stands, there is no tokenizer to read it with, or one without it.
    """
    if config.prompt is None:
        if config.tokenizer is not None:
            raise UserError(f"--tokenizer {config.tokenizer} would do nothing: it reads a --prompt; leave it out")
        return None
    if config.prompt.count(_HISTORY) != 1:
        raise UserError(f"--prompt {config.prompt!r}: say once where the history stands, with {_HISTORY}")
    file = text_tokenizer_file(config, "--prompt") or published_tokenizer(config)
    prefix, suffix = _tokens(file, *config.prompt.split(_HISTORY))
    check_vocabulary(file, max(*prefix, *suffix, 0), llama.vocab_size)
    return Template(prefix, suffix)


@functools.cache
def _tokens(file: Path, before: str, after: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    encoder = text_tokenizer(file)
    texts = (text.strip() for text in (before, after))
    prefix, suffix = (encoder.encode(text, add_special_tokens=False).ids if text else [] for text in texts)
    return (start_token(encoder, file), *prefix), tuple(suffix)


@functools.cache
def _opened(path: Path, dataset: Dataset | None) -> Tokenizer:
    return open_tokenizer(path, dataset)


def _settings(config: TrainConfig) -> TokenizerSettings:
    assert config.levels is not None
    try:
        levels = tuple(int(size) for size in config.levels.split(","))
    except ValueError as error:
        raise UserError(f"--levels {config.levels}: give numbers, comma-separated, as in 256,256,256") from error
    return TokenizerSettings(
        levels=levels, suffix_size=config.suffix_size, latent_dim=config.code_dim, residual_grad=config.residual_grad,
        epochs=config.pretrain_epochs, seed=config.seed,
    )  # fmt: skip


def _say(line: str) -> None:
    if processes.is_first():
        print(f"tokenizer: {line}", flush=True)
