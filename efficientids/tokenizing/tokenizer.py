"""A tokenizer: every item's codes, and what gives codes to new items. In memory, and as a folder T.

    tokenizer.json           method, alphabets, version, settings, final metrics, sha256 of the other files
    codes.npy                int32 [N + 1, L], the suffix level last; row 0 zeros
    items.parquet            item (1 … N), item_id: whose codes they are
    vectors.npy              float32 [N + 1, I], what the tokenizer was made from, standardised; not of imported codes
    parameters.safetensors   the RQ-VAE's parameters, or the codebooks of k-means, by name; not of imported codes
    metrics.jsonl            a line an epoch of the RQ-VAE
    report.html

Legend: N items (1 … N; 0 is padding), M further items, I columns of item vectors, L levels with the suffix.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from core.code_tables import build, version_of
from core.functional import filled, named
from core.residual_quantizer import ResidualQuantizer
from core.rqvae import RQVAE, RQVAEConfig
from core.semantic_ids import version_name
from core.weight_writing import Tensor, write_tensors
from efficientids.data.dataset import Dataset
from efficientids.data.layout import sha256_of
from efficientids.data.manifest import map_array, read_table
from efficientids.errors import UserError
from efficientids.tokenizing.vectors import ItemVectors, Standard

Method = Literal["rqvae", "kmeans", "imported"]
FORMAT, FORMAT_VERSION = "efficientids-tokenizer", 1
DESCRIPTION, CODES, ITEMS, VECTORS = "tokenizer.json", "codes.npy", "items.parquet", "vectors.npy"
PARAMETERS, METRICS, PAGE = "parameters.safetensors", "metrics.jsonl", "report.html"
_STANDARD = ("input.mean_I", "input.scale_I")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Codes of a catalogue and what made them.

    Attributes:
        path: its folder; None: it is in memory alone.
        method: how codes were made.
        codes_NL: int32 [N + 1, L], level-local; row 0 zeros.
        level_sizes: codes of each level, the suffix level's last.
        rqvae: the shape of the RQ-VAE; None of other methods.
        parameters: by name, `Tokenizer.rqvae_model`'s, or "codebooks.0" … of k-means; None of imported codes.
        standard: how item vectors become what the parameters take; None of imported codes.
        vectors_NI: float32 [N + 1, I], standardised; None of imported codes.
        settings: as asked for, plain values.
        metrics: of the codes: `core.code_use` by level and the like, plain values.
    """

    path: Path | None
    method: Method
    codes_NL: np.ndarray
    level_sizes: tuple[int, ...]
    rqvae: RQVAEConfig | None = None
    parameters: Mapping[str, np.ndarray] | None = None
    standard: Standard | None = None
    vectors_NI: np.ndarray | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def version(self) -> str:
        """16 hexadecimal digits, equal for equal codes and alphabets (`core.semantic_ids`)."""
        return version_name(version_of(self.codes_NL[1:], self.level_sizes))

    def rqvae_model(self) -> RQVAE:
        """The RQ-VAE with its parameters.

        Raises:
            ValueError: another method's, or parameters that are not those of `rqvae`.
        """
        if self.rqvae is None or self.parameters is None:
            raise ValueError(f"a tokenizer of method {self.method} has no RQ-VAE; make one with --method rqvae")
        config = self.rqvae
        abstract = nnx.split(nnx.eval_shape(lambda: RQVAE(config, jax.random.key(0))))
        model = filled(*abstract, self.parameters.items())
        assert isinstance(model, RQVAE)
        return model

    def real_codes(self, vectors: ItemVectors) -> np.ndarray:
        """The codes of M items by their vectors [M + 1, I] alone, int32 [M, L − 1]: nearest ones, without a suffix.

        Raises:
            UserError: imported codes, which no vector leads to; or vectors of another kind.
        """
        if self.standard is None or self.parameters is None:
            raise UserError(
                f"{self.path or 'the tokenizer'}: its codes were imported, so nothing gives codes to new items; import "
                "theirs with --import_codes, or tokenize from item vectors"
            )
        x_MI = jnp.asarray(self.standard.apply(vectors)[1:])
        if self.rqvae is not None:
            graphdef, state = nnx.split(self.rqvae_model())
            return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s).codes(x))(state, x_MI))
        codebooks = [self.parameters[f"codebooks.{level}"] for level in range(len(self.level_sizes) - 1)]
        return np.asarray(ResidualQuantizer(codebooks).codes(x_MI))


def parameters_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """A model's variables by name, on the host."""
    return {name: np.asarray(leaf[...]) for name, leaf in named(nnx.state(model)).items()}


def with_padding(codes_NL: np.ndarray) -> np.ndarray:
    """Codes of items 1 … N [N, L] → [N + 1, L] with zeros in row 0."""
    return np.concatenate([np.zeros((1, codes_NL.shape[1]), np.int32), codes_NL.astype(np.int32)])


def fill(folder: Path, tokenizer: Tokenizer, dataset: Dataset) -> dict[str, Any]:
    """Writes `DESCRIPTION` and the files that it names into a folder that is there; returns what it says.

    Raises:
        UserError: codes that no tokenizer may have (`checked_codes`).
        OSError: the disk is full, …
    """
    checked_codes("the tokenizer's codes", tokenizer, dataset)
    np.save(folder / CODES, tokenizer.codes_NL, allow_pickle=False)
    dataset.items.select("item", "item_id").write_parquet(folder / ITEMS)
    files = [CODES, ITEMS]
    if tokenizer.vectors_NI is not None:
        np.save(folder / VECTORS, tokenizer.vectors_NI, allow_pickle=False)
        files.append(VECTORS)
    if tokenizer.parameters is not None and tokenizer.standard is not None:
        own = zip(_STANDARD, (tokenizer.standard.mean_I, tokenizer.standard.scale_I), strict=True)
        tensors = {name: Tensor.of(array) for name, array in {**tokenizer.parameters, **dict(own)}.items()}
        files += write_tensors(folder, tensors, stem=PARAMETERS.removesuffix(".safetensors"))
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": tokenizer.method,
        "level_sizes": list(tokenizer.level_sizes),
        "version": tokenizer.version,
        "num_items": len(tokenizer.codes_NL) - 1,
        "dataset": dataset.manifest["name"],
        "items_sha256": dataset.items_sha256,
        "rqvae": None if tokenizer.rqvae is None else dataclasses.asdict(tokenizer.rqvae),
        "source_widths": None if tokenizer.standard is None else list(tokenizer.standard.widths),
        "settings": dict(tokenizer.settings),
        "metrics": dict(tokenizer.metrics),
        "files": {name: sha256_of(folder / name) for name in files},
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def open_tokenizer(path: str | Path, dataset: Dataset | None, flag: str = "--semantic_ids") -> Tokenizer:
    """Opens and checks the folder T.

    Args:
        dataset: whose items the codes must be; None: whichever.
        flag: names the folder in errors.

    Raises:
        UserError: no tokenizer, files that are missing or changed, codes outside their alphabets, an item without
            codes, two with equal ones, codes of another version than the description's, or of other items.
    """
    path = Path(path)
    described = _description(path, flag)
    try:
        sizes = tuple(int(size) for size in described["level_sizes"])
        method, files, widths = described["method"], dict(described["files"]), described["source_widths"]
        if method not in get_args(Method) or (method == "rqvae") != (described["rqvae"] is not None):
            raise ValueError(f"method {method!r}, rqvae {described['rqvae']}")
        shape = described["rqvae"]
        rqvae = None if shape is None else RQVAEConfig.from_json(shape)
        version, items = described["version"], described["items_sha256"]
        settings, metrics = dict(described["settings"]), dict(described["metrics"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / DESCRIPTION}: damaged, or of another version ({error!r}); make it again") from error
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise UserError(f"{path / missing[0]}: missing, though {DESCRIPTION} lists it; make the tokenizer again")
    tokenizer = Tokenizer(path, method, map_array(path / CODES), sizes, settings=settings, metrics=metrics)
    checked_codes(f"{path / CODES}", tokenizer, dataset if items == getattr(dataset, "items_sha256", None) else None)
    if tokenizer.version != version:
        raise UserError(
            f"{path / CODES}: codes of version {tokenizer.version}, {DESCRIPTION} says {version}: one of them was "
            "changed; make the tokenizer again"
        )
    changed = [name for name, sha256 in files.items() if sha256_of(path / name) != sha256]
    if changed:
        raise UserError(f"{path / changed[0]}: its sha256 is not what {DESCRIPTION} says; make the tokenizer again")
    if dataset is not None and items != dataset.items_sha256:
        raise UserError(
            f"{flag} {path}: codes of other items ({described.get('num_items')} of {described.get('dataset')}) than "
            f"those of {dataset.path}; tokenize this data set, with --tokenizer {path} to keep the codes of items that "
            "both have"
        )
    return tokenizer if method == "imported" else _with_parameters(tokenizer, rqvae, tuple(widths))


def checked_codes(what: str, tokenizer: Tokenizer, dataset: Dataset | None) -> None:
    """Refuses a code table that cannot be used; `what` names it in the error.

    Raises:
        UserError: see `core.code_tables.build`; or not one row for each item of `dataset` and the padding.
    """
    codes, sizes = tokenizer.codes_NL, tokenizer.level_sizes
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or codes.dtype != np.int32 or not len(codes) or codes[0].any():
        raise UserError(
            f"{what}: {codes.dtype} of shape {list(codes.shape)}; expected int32 [N + 1, {len(sizes)}] with zeros in "
            "row 0; tokenize again"
        )
    if dataset is not None and len(codes) != dataset.catalogue_size + 1:
        raise UserError(
            f"{what}: {len(codes):,} rows, but {dataset.path} has {dataset.catalogue_size:,} items; tokenize again"
        )
    try:
        build(codes[1:], sizes)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def external_ids(tokenizer: Tokenizer) -> list[str]:
    """The external ids of items 1 … N of a tokenizer that has a folder."""
    assert tokenizer.path is not None
    return read_table(tokenizer.path / ITEMS)["item_id"].cast(pl.String).to_list()


def _description(path: Path, flag: str) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not file.is_file():
        raise UserError(f"{flag} {path}: no tokenizer (no {DESCRIPTION}); make one: python -m efficientids tokenize")
    try:
        described = json.loads(file.read_bytes())
        if (described["format"], described["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {described['format']!r}, version {described['format_version']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no description of a tokenizer that this program reads ({error!r})") from error
    return described


def _with_parameters(tokenizer: Tokenizer, rqvae: RQVAEConfig | None, widths: tuple[int, ...]) -> Tokenizer:
    """The opened tokenizer with its vectors and parameters.

    Raises:
        UserError: they do not fit each other.
    """
    assert tokenizer.path is not None
    damaged = f"{tokenizer.path / PARAMETERS}: not what {DESCRIPTION} describes ({{}}); make the tokenizer again"
    try:
        parameters = load_file(tokenizer.path / PARAMETERS)
        mean_I, scale_I = (parameters.pop(name) for name in _STANDARD)
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(damaged.format(repr(error))) from error
    vectors_NI = map_array(tokenizer.path / VECTORS)
    if vectors_NI.shape != (len(tokenizer.codes_NL), sum(widths)):
        raise UserError(
            f"{tokenizer.path / VECTORS}: shape {list(vectors_NI.shape)}, expected "
            f"{[len(tokenizer.codes_NL), sum(widths)]}; make the tokenizer again"
        )
    opened = dataclasses.replace(
        tokenizer, rqvae=rqvae, parameters=parameters, vectors_NI=vectors_NI, standard=Standard(mean_I, scale_I, widths)
    )
    if rqvae is not None:
        try:
            opened.rqvae_model()
        except ValueError as error:
            raise UserError(damaged.format(error)) from error
    return opened
