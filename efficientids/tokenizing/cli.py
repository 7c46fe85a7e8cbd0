"""`python -m efficientids tokenize`: items → semantic IDs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from core.platform import start_devices
from core.residual_quantizer import ResidualGrad
from efficientids.data.dataset import Dataset
from efficientids.data.preparation.workplace import whole_folder
from efficientids.errors import UserError
from efficientids.flags import command_line
from efficientids.log import duration
from efficientids.tokenizing.extending import extended
from efficientids.tokenizing.imported import import_codes
from efficientids.tokenizing.making import make_tokenizer
from efficientids.tokenizing.report import to_html
from efficientids.tokenizing.settings import TokenizerSettings
from efficientids.tokenizing.tokenizer import METRICS, PAGE, Tokenizer, fill, open_tokenizer
from efficientids.tokenizing.vectors import COOCCURRENCE_DIM, from_histories, joined, read_vectors

_SETTINGS = tuple(field.name for field in dataclasses.fields(TokenizerSettings))
# What a way of making codes looks at; any other flag is refused.
_READS = {
    "--method rqvae": {"vectors", *_SETTINGS},
    "--method kmeans": {"vectors", "method", "levels", "suffix_size", "seed", "sinkhorn"},
    "--import_codes": {"import_codes", "item_id_offset", "levels", "suffix_size"},
    "--tokenizer": {"tokenizer", "vectors"},
}
_ALWAYS = {"data_dir", "output", "json"}


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Gives every item of a data set its semantic ID: codes of a few levels, and a suffix that tells equal ones apart.

    Made in a hidden folder beside --output and put there when whole.
    """

    data_dir: Path
    """The data set folder that `prepare` made."""
    output: Path
    """The folder to make; new or empty."""
    vectors: Path | None = None
    """Item vectors (.npy) that `embed-items` made, or others. Default: 256 columns from which items are consumed near
    which."""
    method: Literal["rqvae", "kmeans"] | None = None
    """rqvae (the default): an autoencoder with residual codebooks. kmeans: k-means level by level, without training."""
    levels: str | None = None
    """Codes of each real level, such as 256,256,256 (the default; of imported codes: as many as the file uses)."""
    suffix_size: int | None = None
    """Codes of the suffix level: so many items may share their real codes (default 256; of imported codes: as many as
    are needed, rounded up to a power of two)."""
    hidden: str | None = None
    """Widths of the encoder between vectors and latents, such as 512,256 (the default); the decoder's are mirrored."""
    latent_dim: int | None = None
    """Width of latents and codes (default 128)."""
    residual_grad: ResidualGrad | None = None
    """straight_through (the default, the published code's): deeper levels give the encoder no gradient. passthrough:
    they do."""
    epochs: int | None = None
    """Of the RQ-VAE (default 100)."""
    batch_size: int | None = None
    """Items a step (default 1024)."""
    learning_rate: float | None = None
    """Of AdamW at its peak (default 0.001); a cosine takes it to a tenth."""
    weight_decay: float | None = None
    """Of AdamW (default 0.0001)."""
    grad_clip: float | None = None
    """The gradient's largest norm (default 1.0)."""
    seed: int | None = None
    """Of everything (default 0)."""
    sinkhorn: bool = False
    """Spread items that agree so far over the codes of the last real level: fewer collisions, at some distance."""
    import_codes: Path | None = None
    """Take given codes: JSON {item id: ["<a_12>", "<b_0>", …]}, as LETTER and MiniOneRec publish them."""
    item_id_offset: int | None = None
    """Added to the ids of --import_codes to get the data set's (chosen where one counts from 0, the other from 1)."""
    tokenizer: Path | None = None
    """A tokenizer folder: items that it knows keep their codes, new ones get theirs from --vectors, nothing trains."""
    json: bool = False
    """Print the summary as JSON, and nothing else on standard output."""


def main(arguments: Sequence[str]) -> int:
    """Tokenizes; returns the exit code."""
    config = command_line(TokenizeConfig, arguments, prog="efficientids tokenize")
    way = _way(config)
    settings = _settings(config) if way.startswith("--method") else None
    start_devices()
    dataset = Dataset.open(config.data_dir)
    began = time.perf_counter()

    def say(text: str) -> None:
        print(text, file=sys.stderr if config.json else sys.stdout, flush=True)

    try:
        with whole_folder(config.output, "tokenizer") as folder:
            rows: list[dict[str, Any]] = []

            def record(row: dict[str, Any]) -> None:
                rows.append(row)
                with (folder / METRICS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")

            tokenizer = _tokenizer(config, settings, dataset, say, record)
            described = fill(folder, tokenizer, dataset)
            (folder / PAGE).write_text(to_html(described, rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {config.output} cannot be written ({error}); nothing was left there") from error
    seconds = time.perf_counter() - began
    if config.json:
        told = {name: described[name] for name in ("method", "level_sizes", "version", "num_items", "metrics")}
        print(json.dumps({**told, "output": str(config.output), "seconds": seconds}))
        return 0
    print(f"{_in_words(described)}\nin {duration(seconds)}: {config.output}")
    return 0


def _tokenizer(
    config: TokenizeConfig,
    settings: TokenizerSettings | None,
    dataset: Dataset,
    say: Callable[[str], None],
    record: Callable[[dict[str, Any]], None],
) -> Tokenizer:
    if config.import_codes is not None:
        levels = None if config.levels is None else _numbers("levels", config.levels)
        return import_codes(config.import_codes, dataset, levels, config.suffix_size, config.item_id_offset, say)
    if config.tokenizer is not None:
        known = open_tokenizer(config.tokenizer, None, "--tokenizer")
        if config.vectors is None:
            raise UserError(f"--tokenizer {config.tokenizer}: new items get their codes from --vectors; give those")
        return extended(known, dataset, read_vectors(config.vectors, dataset), say)
    assert settings is not None
    if config.vectors is not None:
        vectors = read_vectors(config.vectors, dataset)
    else:
        say(f"no --vectors: {COOCCURRENCE_DIM} columns from which items are consumed near which")
        vectors = joined([("cooccurrence", from_histories(dataset, COOCCURRENCE_DIM, settings.seed))])
    return make_tokenizer(vectors, settings, say, record)


def _way(config: TokenizeConfig) -> str:
    """Which of `_READS` makes the codes.

    Raises:
        UserError: a flag that has no meaning there.
    """
    given = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default} - _ALWAYS
    way = next((f"--{name}" for name in ("import_codes", "tokenizer") if name in given), None)
    way = way or f"--method {config.method or 'rqvae'}"
    unread = sorted(given - _READS[way])
    if unread:
        raise UserError(f"--{unread[0]} has no meaning with {way}; leave one of them out")
    return way


def _settings(config: TokenizeConfig) -> TokenizerSettings:
    given = {name: getattr(config, name) for name in _SETTINGS if getattr(config, name) is not None}
    for name in ("levels", "hidden"):
        if name in given:
            given[name] = _numbers(name, given[name])
    return TokenizerSettings(**given)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"--{name} {text}: give whole numbers parted by commas, such as 256,256") from error


def _in_words(described: dict[str, Any]) -> str:
    metrics, sizes = described["metrics"], described["level_sizes"]
    shown = {name: "/".join(form.format(value) for value in metrics[name]) for name, form in _FORMS.items()}
    return (
        f"{described['method']}: {described['num_items']:,} items, levels of {'/'.join(map(str, sizes[:-1]))} codes, "
        f"a suffix of {sizes[-1]}, version {described['version']}\n"
        f"codes used {shown['used']}, perplexity {shown['perplexity']}, collisions {metrics['collisions'][-1]:.2%} "
        f"({metrics['distinct']:,} different, at most {metrics['largest_bucket']} items share one)"
    )


_FORMS = {"used": "{:.0%}", "perplexity": "{:.0f}"}
