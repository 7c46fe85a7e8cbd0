"""`python -m efficientids embed-items`: a data set's items → vectors in a .npy file."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.llama_loader import LlamaLoader
from core.platform import start_devices
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.flags import command_line
from efficientids.loading import check_same_items, open_run
from efficientids.log import duration, progress
from efficientids.tokenizing.texts import Pooling, text_vectors
from efficientids.tokenizing.vectors import COOCCURRENCE_DIM, from_histories, joined, read_vectors, write_vectors

_OF_TEXT = ("tokenizer", "item_template", "max_tokens", "pooling", "batch_size")


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """Vectors of a data set's items, for `tokenize`: one file, with what it holds said in a .json beside it.

    Several sources stand side by side in this order: a run, texts, given vectors. Of each source an item's vector gets
    length 1; an item about which it knows nothing has zeros there. Without any source: vectors from which items are
    consumed near which.
    """

    data_dir: Path
    """The data set folder that `prepare` made."""
    output: Path
    """The .npy file to write."""
    run: Path | None = None
    """A trained run whose model has item vectors (sasrec, efficientids): R, R/STEP or R/checkpoints/STEP."""
    step: int | None = None
    """Which checkpoint of --run. Default: the best by validation NDCG@10."""
    weights: Path | None = None
    """A folder with a pretrained Llama, which reads the items' texts."""
    llama_size: str | None = None
    """Or its size: 1b, 3b, 7b, 8b, 13b, … from Hugging Face (HF_TOKEN)."""
    tokenizer: Path | None = None
    """tokenizer.json of the Llama (default: the one beside the weights)."""
    item_template: str | None = None
    """Which columns make an item's text, as in training (default: title)."""
    max_tokens: int | None = None
    """Tokens of a text that are read (default 64)."""
    pooling: Pooling | None = None
    """mean (the default): of the hidden states at the text's tokens. slot: the state at its last token."""
    batch_size: int | None = None
    """Texts at a time (default 32)."""
    vectors: Path | None = None
    """Further vectors (.npy): those of an earlier `embed-items`, or [N, width] in the order of items.parquet."""
    dim: int | None = None
    """Columns of the vectors from histories, where no source is given (default 256)."""
    seed: int | None = None
    """Of those."""
    overwrite: bool = False
    """Replace --output."""
    json: bool = False
    """Print the summary as JSON, and nothing else on standard output."""


def main(arguments: Sequence[str]) -> int:
    """Embeds; returns the exit code."""
    config = command_line(EmbedConfig, arguments, prog="efficientids embed-items")
    _check(config)
    start_devices()
    dataset = Dataset.open(config.data_dir)
    began = time.perf_counter()
    found = joined(_sources(config, dataset))
    write_vectors(config.output, found, dataset)
    unknown = int((~found.vectors_NI[1:].any(axis=1)).sum())
    seconds = time.perf_counter() - began
    if config.json:
        facts = {"items": found.num_items, "width": found.vectors_NI.shape[1], "sources": dict(found.sources)}
        print(json.dumps({**facts, "unknown_items": unknown, "output": str(config.output), "seconds": seconds}))
        return 0
    sources = ", ".join(f"{name} ({width} columns)" for name, width in found.sources)
    print(
        f"{found.num_items:,} items, {sources}; {unknown:,} items about which nothing is known, in "
        f"{duration(seconds)}: {config.output}"
    )
    return 0


def _sources(config: EmbedConfig, dataset: Dataset) -> list[tuple[str, np.ndarray]]:
    """Name and vectors [N + 1, columns] of each source."""
    parts = []
    if config.run is not None:
        parts.append(("run", run_vectors(config.run, config.step, dataset)))
    if config.weights is not None or config.llama_size is not None:
        given = {name: getattr(config, name) for name in _OF_TEXT if getattr(config, name) is not None}
        if "item_template" in given:
            given["template"] = given.pop("item_template")
        try:
            loader = LlamaLoader(config.llama_size, path=config.weights)
        except ValueError as error:
            raise UserError(f"--llama_size, --weights: {error}") from error
        parts.append(
            ("text", text_vectors(dataset, loader, **given, progress=progress("embedded", "texts", sys.stderr)))
        )
    if config.vectors is not None:
        parts.append(("given", read_vectors(config.vectors, dataset).vectors_NI))
    return parts or [("cooccurrence", from_histories(dataset, config.dim or COOCCURRENCE_DIM, config.seed or 0))]


def run_vectors(run: Path, step: int | None, dataset: Dataset) -> np.ndarray:
    """The item vectors of a trained run, float32 [N + 1, D]; row 0 zeros.

    Raises:
        UserError: no run, one of other items, or a model without a table of item vectors (`item_vectors`).
    """
    loaded = open_run(run, step)
    check_same_items(loaded, dataset)
    table = getattr(loaded.model, "item_vectors", None)
    if table is None:
        raise UserError(
            f"--run {run}: a {loaded.config.recommender} has no item vectors; give a run of sasrec or efficientids"
        )
    vectors_ND = np.asarray(table(), np.float32).copy()
    vectors_ND[0] = 0
    return vectors_ND


def _check(config: EmbedConfig) -> None:
    """Refuses flags that have no meaning together, and places that cannot be written."""
    of_text = config.weights is not None or config.llama_size is not None
    alone = not of_text and config.run is None and config.vectors is None
    needs = [("step", config.run is not None, "--run"), *((name, of_text, "--weights") for name in _OF_TEXT)]
    needs += [(name, alone, "no other source") for name in ("dim", "seed")]
    for name, allowed, what in needs:
        if getattr(config, name) is not None and not allowed:
            raise UserError(f"--{name} has a meaning only with {what}; leave it out")
    for name in ("max_tokens", "batch_size", "dim"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    if config.output.suffix != ".npy":
        raise UserError(f"--output {config.output}: give a file that ends in .npy")
    if config.output.exists() and not config.overwrite:
        raise UserError(f"--output {config.output} exists; give another file, or --overwrite")
    if not config.output.resolve().parent.is_dir():
        raise UserError(f"--output {config.output}: no folder {config.output.parent}")
