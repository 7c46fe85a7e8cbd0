"""Hugging Face weights → a Llama on the device, or on a mesh of them, one tensor at a time.

What a checkpoint lacks, or has too much of, is said in one error before anything big is allocated; `core.filling` then
puts each tensor in its place.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from core import sharding
from core.config import LLAMA_SIZES, LlamaConfig
from core.filling import Filling
from core.functional import FunctionalModel
from core.hf_names import EMBEDDING, HEAD, IGNORED, Place, in_files, places
from core.layers import Init
from core.llama import Compute, Llama
from core.platform import quiet_devices
from core.quantized import Format
from core.weight_files import (
    DTYPES,
    CheckpointError,
    Header,
    SplitFile,
    WeightFile,
    WeightsNotFound,
    find_weight_files,
    open_weight_file,
)

_log = logging.getLogger(__name__)

_ACCESS = (
    "set HF_TOKEN to the token of an account that has accepted the licence at {page}, or give a folder by --weights"
)


class CheckpointMismatch(CheckpointError):
    """A checkpoint whose tensors are not those of its config, or not finite numbers."""


class LlamaLoader:
    """Where a Llama's weights are: published under a size of `core.config.LLAMA_SIZES`, or in a local folder.

    Args:
        model_size: such as "1b"; its weights come from the Hugging Face hub or its cache. The token is read from
            HF_TOKEN or the cache, never given here. "tiny" (the default, without a path) has no published weights: it
            starts at random, and a log line says so.
        path: a folder with `config.json` and weights; exclusive with `model_size`.
        revision: branch, tag or commit on the hub; with `model_size` only.
        random_weights: start a published size at random, too.

    Raises:
        ValueError: both size and path, an unknown size, a revision or random weights of a path.
    """

    def __init__(
        self,
        model_size: str | None = None,
        *,
        path: str | Path | None = None,
        revision: str | None = None,
        random_weights: bool = False,
    ) -> None:
        if model_size is not None and path is not None:
            raise ValueError(f"LlamaLoader takes model_size or path, one of them: got {model_size!r} and {path!r}")
        if path is not None and (revision is not None or random_weights):
            raise ValueError(f"revision and random_weights are of a size; the folder {path} has its own weights")
        if path is None and model_size is None:
            model_size = "tiny"
        if model_size is not None and model_size not in LLAMA_SIZES:
            raise ValueError(f"Llama size {model_size!r}: choose one of {', '.join(LLAMA_SIZES)}")
        self.model_size, self.path, self.revision = model_size, path, revision
        self.starts_at_random = random_weights or (model_size is not None and LLAMA_SIZES[model_size].hf_id is None)

    def load_model(
        self,
        *,
        param_dtype: Any = None,
        dtype: Any = jnp.float32,
        remat: str = "none",
        quantize: Format | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[FunctionalModel, nnx.State, LlamaConfig]:
        """Loads the weights onto the default device, or onto a mesh.

        Args:
            param_dtype: of the parameters; None: as the files have it (the widest, where they differ), float32 at
                random.
            dtype: of the computation.
            remat: a name of `core.llama.REMAT_POLICIES`.
            quantize: hold the layers' weights in this format: frozen, in about a half or a quarter of bfloat16's bytes.
            mesh: the devices, each of which gets its part; of several processes, all must call.

        Returns:
            The model (`.apply(params, input_ids=[B, T])` → logits [B, T, V]), its parameters, its config.

        Raises:
            WeightsNotFound: nothing there, or no access to it.
            ConfigError: a `config.json` of something else than a Llama that we can run.
            CheckpointMismatch: missing, extra, misshapen, doubled or ill-typed tensors, all in one message; then NaN or
                infinite values; then a head that differs from the embedding to which the config ties it.
            CheckpointCorrupt: a damaged file.
            CheckpointError: `.bin` weights without torch.
        """
        quiet_devices()
        if self.starts_at_random:
            return self._random(param_dtype, Compute(dtype, remat), quantize, mesh)
        folder = self.folder()
        config = LlamaConfig.from_hf(folder)
        files = find_weight_files(folder)
        headers = _checked_headers(folder, files, config)
        if param_dtype is None:
            stored = {DTYPES[header.dtype] for header in headers.values()}
            param_dtype = functools.reduce(jnp.promote_types, stored)
        init = Init(param_dtype=param_dtype, quantize=quantize)
        model, abstract = abstract_model(config, Compute(dtype, remat), init)
        return model, _fill(folder, files, config, abstract, mesh), config

    def _random(
        self, param_dtype: Any, compute: Compute, quantize: Format | None, mesh: Mesh | None
    ) -> tuple[FunctionalModel, nnx.State, LlamaConfig]:
        assert self.model_size is not None
        _log.warning("Llama %s starts at random: no pretrained weights are loaded", self.model_size)
        config = LLAMA_SIZES[self.model_size].config
        init = Init(param_dtype=jnp.float32 if param_dtype is None else param_dtype, quantize=quantize)
        model, params = random_model(config, jax.random.key(0), compute=compute, init=init, mesh=mesh)
        return model, params, config

    def folder(self) -> Path:
        """The folder of the weights, downloaded if need be.

        Raises:
            WeightsNotFound: no such folder, no access, or a size without published weights.
            CheckpointError: no room on the disk for the download.
        """
        if self.path is not None:
            if not Path(self.path).is_dir():
                page = "https://huggingface.co/<the model's id>"
                raise WeightsNotFound(
                    f"{self.path}: no such folder of weights. Correct --weights; or name a size instead and "
                    + _ACCESS.format(page=page)
                )
            return Path(self.path)
        return self._published(_download)

    def tokenizer_folder(self) -> Path:
        """A folder with the files of the text tokenizer; of a size they alone are downloaded, megabytes.

        Raises:
            WeightsNotFound, CheckpointError: as `folder`.
        """
        return self.folder() if self.path is not None else self._published(_download_tokenizer)

    def _published(self, download: Callable[[str, str | None], Path]) -> Path:
        """What `download` gets of the size's repository and revision."""
        assert self.model_size is not None
        repo = LLAMA_SIZES[self.model_size].hf_id
        if repo is None:
            raise WeightsNotFound(f"Llama size {self.model_size!r} has no published weights: it starts at random")
        try:
            return download(repo, self.revision)
        except CheckpointError:
            raise
        except Exception as error:  # the hub's client raises those of its HTTP library too, which differs by version
            reason = str(error).strip().split("\n")[0]
            raise WeightsNotFound(
                f"Llama size {self.model_size!r}: {repo} cannot be had ({type(error).__name__}: {reason}). Please "
                + _ACCESS.format(page=f"https://huggingface.co/{repo}")
            ) from error


def _check_room(repo: str, fetch: Callable[..., Any]) -> None:
    """Refuses a download that the disk has no room for, before its first byte."""
    from huggingface_hub import constants
    from huggingface_hub.errors import DryRunError

    try:
        wanted = sum(file.file_size for file in fetch(dry_run=True) if file.will_download)
    except DryRunError:
        return  # the hub is out of reach: what is in the cache will do, or `fetch` says what is missing
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    if free < wanted:
        raise CheckpointError(
            f"{repo}: {wanted / 2**30:.1f} GiB are to be downloaded to {cache}, where {free / 2**30:.1f} GiB are free; "
            "free some space, or set HF_HUB_CACHE to a folder on another disk"
        )


def _download(repo: str, revision: str | None) -> Path:
    """The snapshot of a repository, from the cache where it is complete; `.bin` files only where no others exist."""
    beside = ("*.json", "tokenizer.model")
    folder = _snapshot(repo, revision, "*.safetensors", *beside)
    if any(folder.glob("*.safetensors")):
        return folder
    return _snapshot(repo, revision, "pytorch_model*.bin", *beside)


def _download_tokenizer(repo: str, revision: str | None) -> Path:
    """The same without weights: what `tokenizer.json` and the start of a sequence are read from."""
    return _snapshot(repo, revision, "tokenizer.json", "tokenizer_config.json", "config.json")


def _snapshot(repo: str, revision: str | None, *patterns: str) -> Path:
    """The folder of a repository's snapshot, with the files that match."""
    from huggingface_hub import snapshot_download

    # Sub-folders hold the same weights in other formats.
    fetch = functools.partial(
        snapshot_download, repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
    )
    _check_room(repo, fetch)
    return Path(fetch())


def abstract_model(config: LlamaConfig, compute: Compute, init: Init) -> tuple[FunctionalModel, nnx.State]:
    """The model, and its parameters as shapes and dtypes without memory."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, jax.random.key(0), compute, init)))
    return FunctionalModel(graphdef), state


def random_model(
    config: LlamaConfig,
    key: Array,
    *,
    compute: Compute | None = None,
    init: Init | None = None,
    mesh: Mesh | None = None,
) -> tuple[FunctionalModel, nnx.State]:
    """A Llama that starts at random, made where it is to lie: the model and its parameters."""
    compute, init = compute or Compute(), init or Init()
    model, abstract = abstract_model(config, compute, init)
    if mesh is None:
        return model, _random_parameters(config, key, compute, init)
    laid = sharding.shardings(abstract, mesh)
    return model, jax.jit(lambda: _random_parameters(config, key, compute, init), out_shardings=laid)()


@functools.partial(jax.jit, static_argnames=("config", "compute", "init"))
def _random_parameters(config: LlamaConfig, key: Array, compute: Compute, init: Init) -> nnx.State:
    return nnx.split(Llama(config, key, compute, init))[1]


def _checked_headers(folder: Path, files: list[Path], config: LlamaConfig) -> dict[str, Header]:
    """The headers of all tensors that the model needs, after every disagreement with the config is ruled out."""
    wanted, found, problems = places(config), {}, []
    counts: Counter[str] = Counter()
    for file in files:
        headers = _open(file, config).headers
        counts.update(headers.keys())
        found.update(headers)
    allowed = {**wanted, **_tied_head(config)}
    for name in sorted(wanted.keys() - found.keys()):
        problems.append(f"missing: {name} {list(wanted[name].layout.hf_shape)}")
    for name in sorted(found):
        shape, dtype = found[name]
        if name not in allowed:
            if not IGNORED.fullmatch(name):
                problems.append(f"extra: {name} {list(shape)}")
        elif shape != allowed[name].layout.hf_shape:
            problems.append(f"misshapen: {name} is {list(shape)}, expected {list(allowed[name].layout.hf_shape)}")
        elif dtype not in DTYPES:
            problems.append(f"dtype: {name} is {dtype}, expected one of {', '.join(DTYPES)}")
        if counts[name] > 1:
            problems.append(f"doubled: {name} is in {counts[name]} files")
    if problems:
        raise CheckpointMismatch(
            f"{folder}: {len(problems)} tensors are not those of its config.json:\n  " + "\n  ".join(problems)
        )
    return {name: found[name] for name in wanted}


def _open(path: Path, config: LlamaConfig) -> WeightFile:
    """A weight file with its tensors by the names of `places`."""
    return SplitFile(open_weight_file(path), in_files(config))


def _tied_head(config: LlamaConfig) -> Mapping[str, Place]:
    """A tied checkpoint may hold the head all the same; it must then equal the embedding."""
    return {HEAD: places(config)[EMBEDDING]} if config.tie_word_embeddings else {}


def _fill(folder: Path, files: list[Path], config: LlamaConfig, abstract: nnx.State, mesh: Mesh | None) -> nnx.State:
    """Reads every tensor into the parameters that `abstract` describes."""
    wanted, tied, filling = places(config), _tied_head(config), Filling(abstract, mesh)
    broken: list[str] = []
    heads: list[WeightFile] = []
    for path in files:
        file = _open(path, config)
        for name in file.headers:
            if name in tied:
                heads.append(file)
            if name in wanted and not filling.put(file, name, wanted[name]):
                broken.append(f"{name} in {path.name}")
    state = filling.state()
    if broken:
        dtype = dict(nnx.to_flat_state(state))[wanted[EMBEDDING].path].dtype
        raise CheckpointMismatch(f"{folder}: NaN or infinite as {dtype}: {', '.join(broken)}")
    for file in heads:
        if not filling.equals(file, HEAD, tied[HEAD]):
            raise CheckpointMismatch(
                f"{file.path}: {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings true; "
                "set it to false if the head was trained apart"
            )
    return state
