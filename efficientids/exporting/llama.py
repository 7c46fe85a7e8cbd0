"""The Llama of a run as Hugging Face's formats take it: a base, in a file or in the checkpoint, and adapters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from core.config import LlamaConfig
from core.hf_export import Adapters, NotExportable, checkpoint_tensors, merged_tensors, state_tensors
from core.llama import Llama
from core.llama_loader import LlamaLoader
from core.lora import is_adapter
from core.peft_export import peft_config, peft_merged, peft_tensors
from core.quantized import Format
from core.read_back import TOLERANCE, ReadBackError, compare, difference, logits, merged_logits, rounds
from core.weight_writing import Tensor
from efficientids.errors import UserError
from efficientids.exporting.companions import Source, copy_companions, started_from
from efficientids.exporting.writer import Writer
from efficientids.loading import LoadedRun, frozen_folder, open_saved
from efficientids.preflight.room import check_host_memory
from efficientids.systems.base import abstract
from efficientids.systems.llama import base_is_frozen, llama_init

_ADAPTER, _ADAPTER_CONFIG = "adapter_model", "adapter_config.json"


class Check(NamedTuple):
    """The logits after the probe that a checkpoint must give, and how they differ from others (`difference`).

    rounding: from the run's own, by the dtype alone. adapters: the base's from the run's own; None without adapters.
    quantizing: the run's own from those on the quantised base that it trained on; None where that was whole.
    """

    expected: np.ndarray
    rounding: float
    adapters: float | None
    quantizing: float | None


@dataclasses.dataclass(frozen=True)
class RunLlama:
    """The Llama of a run; no more of it is in memory than the run's checkpoint holds.

    Attributes:
        config: its shape.
        added: its adapters; None where it has none.
        folder: of the weight files that the base is, unchanged; None where checkpoints hold the base.
        saved: the base of a checkpoint; None where it is in `folder`.
        came_from: the folder that the base started from, if it is there.
        why_no_adapter: why it cannot be given away as an adapter; None where it can.
        quantize: how the run held the base in `folder`, which is read whole here; None: whole, too.
    """

    config: LlamaConfig
    added: Adapters | None
    folder: Path | None
    saved: nnx.State | None
    came_from: Path | None
    why_no_adapter: str | None
    quantize: Format | None

    def params(self) -> nnx.State:
        """The base, in the dtype of its file or checkpoint."""
        if self.folder is None:
            assert self.saved is not None
            return self.saved
        if jax.default_backend() == "cpu":
            size = sum(tensor.nbytes for tensor in self.base().values())
            # Beside it one layer at a time is widened, and the tables of words are.
            check_host_memory(round(1.2 * size), "the Llama of the run, to compare logits with")
        return LlamaLoader(path=self.folder).load_model()[1]

    def quantizing(self, own: np.ndarray) -> float | None:
        """How far the logits `own` are from those on the base as the run held it; None where that was whole."""
        if self.quantize is None:
            return None
        params = LlamaLoader(path=self.folder).load_model(quantize=self.quantize)[1]
        return difference(own, logits(params, self.config, self.added, self.quantize))

    def base(self) -> dict[str, Tensor]:
        """The base, tensor by tensor."""
        if self.folder is not None:
            return checkpoint_tensors(self.folder, self.config)
        assert self.saved is not None
        return state_tensors(self.saved, self.config)


def open_llama(run: Path, step: int | None) -> tuple[LoadedRun, RunLlama]:
    """A run (`params` as in `open_saved`) and its Llama; a quantised base is read whole again.

    Raises:
        UserError: no Llama is in it, or its base is quantised for good.
    """
    loaded, quantize = open_saved(run, step), None
    if loaded.config.quantize != "none" and loaded.description["frozen_weights"] is not None:
        quantize = llama_init(loaded.config).quantize
        loaded = open_saved(loaded.where, loaded.step, like=dataclasses.replace(loaded.config, quantize="none"))
    model = skeleton(loaded)
    llama = _llama(model)
    if llama is None:
        raise UserError(
            f"{loaded.where} is a run of --recommender {loaded.config.recommender}: no Llama is inside, which is what "
            "hf and peft hold; give --format safetensors"
        )
    folder, added = frozen_folder(loaded), run_adapters(model)
    saved = None if folder is not None else nnx.filter_state(loaded.params["llama"], nnx.Not(is_adapter))
    came_from = folder or started_from(loaded.config)
    why = _why_no_adapter(loaded, added, folder)
    return loaded, RunLlama(llama.config, added, folder, saved, came_from, why, quantize)


def skeleton(loaded: LoadedRun) -> nnx.Module:
    """The model of a run, with shapes in place of what is not in memory."""
    graphdef, state = abstract(loaded.recommender)
    return nnx.merge(graphdef, nnx.merge_state(state, loaded.params))


def run_adapters(model: nnx.Module) -> Adapters | None:
    """The adapters in the Llama of a model; None where it has none, or no Llama."""
    llama = _llama(model)
    return None if llama is None else Adapters.of(llama)


def _llama(model: nnx.Module) -> Llama | None:
    """The pretrained part of a system is its attribute `llama` (`recommenders.base.in_llama`)."""
    found = getattr(model, "llama", None)
    return found if isinstance(found, Llama) else None


def _why_no_adapter(loaded: LoadedRun, added: Adapters | None, folder: Path | None) -> str | None:
    if not base_is_frozen(loaded.config):
        return (
            "all of its Llama trained (--train full): embeddings, norms and whole matrices, and a head if it has one "
            "of its own, which an adapter of PEFT's cannot hold"
        )
    if added is None:
        return "nothing of its Llama trained (--train frozen): there is no adapter"
    if folder is None:
        return (
            "its adapters belong to a base that no weight file holds: it started at random, or all of it trained in an "
            "earlier stage, embeddings too"
        )
    return None


def write_merged(llama: RunLlama, dtype: str | None, writer: Writer) -> tuple[dict[str, str], Check]:
    """Writes a whole checkpoint.

    Returns:
        Its weight files → sha256, and what it must compute.

    Raises:
        NotExportable: the base is held quantised.
        ReadBackError: merged, the adapters do not do what they do beside the weights.
    """
    base, target = llama.base(), None if dtype is None else np.dtype(jnp.dtype(dtype))
    check = _check(llama, target)
    if not rounds(base, llama.config, llama.added, target) and not check.rounding <= TOLERANCE:
        raise ReadBackError(f"merging moves the logits by {check.rounding:.2g} of the largest")
    tensors = merged_tensors(base, llama.config, llama.added, target)
    files = writer.tensors(tensors, "model")
    widest = np.dtype(jnp.result_type(*(tensor.dtype for tensor in tensors.values()))).name
    more = {} if llama.came_from is None else copy_companions(llama.came_from, writer.folder)
    writer.json("config.json", {**llama.config.to_hf(widest), **more})
    return files, check


def _check(llama: RunLlama, dtype: np.dtype[Any] | None) -> Check:
    params = llama.params()
    own = logits(params, llama.config, llama.added)
    adapters = None if llama.added is None else difference(logits(params, llama.config), own)
    expected = merged_logits(params, llama.config, llama.added, dtype)
    return Check(expected, difference(expected, own), adapters, llama.quantizing(own))


def read_merged(folder: Path, config: LlamaConfig, check: Check) -> float:
    """Loads the checkpoint as any checkpoint is loaded, and compares: how far its logits are off.

    Raises:
        ReadBackError, CheckpointError: it is not what was to be written.
    """
    _, params, read = LlamaLoader(path=folder).load_model()
    if read != config:
        raise ReadBackError(f"config.json, read back, is of another Llama: {read}")
    return compare(logits(params, config), check.expected)


def write_adapter(llama: RunLlama, run: Path, writer: Writer) -> tuple[dict[str, str], str, dict[str, Any]]:
    """Writes a PEFT adapter, reads it back, merges it as PEFT does and compares.

    Returns:
        Its weight file → sha256, the base's name, and how far the logits are off: read back (`error`), and from those
        on the base as the run held it (`quantizing`, see `Check`).

    Raises:
        UserError: an adapter cannot hold what trained.
        ReadBackError: the logits are others.
    """
    if llama.why_no_adapter is not None:
        raise UserError(f"{run}: {llama.why_no_adapter}; export the whole Llama with --format hf")
    assert llama.added is not None and llama.folder is not None
    try:
        tensors = peft_tensors(llama.config, llama.added)
    except NotExportable as error:
        raise UserError(f"{run}: {error}; export the whole Llama with --format hf") from error
    files = writer.tensors(tensors, _ADAPTER, one_file=True)  # PEFT reads no shards
    source = Source.of(llama.folder.resolve())
    writer.json(_ADAPTER_CONFIG, peft_config(llama.config, llama.added, source.name, source.revision))
    params = llama.params()
    expected = logits(params, llama.config, llama.added)
    settings = json.loads((writer.folder / _ADAPTER_CONFIG).read_text())
    params = peft_merged(params, llama.config, load_file(writer.folder / f"{_ADAPTER}.safetensors"), settings)
    off = compare(logits(params, llama.config), expected)
    return files, source.name, {"error": off, "quantizing": llama.quantizing(expected)}
