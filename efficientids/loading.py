"""From a run folder back to a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from core.clustering import Clusters
from core.functional import FunctionalModel
from core.platform import quiet_devices
from core.weight_files import CheckpointError, weights_checksum
from efficientids import build, checkpoints
from efficientids.config import TrainConfig, from_mapping
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.recommenders.base import in_llama
from efficientids.recommenders.efficientids import EfficientIDS, EfficientIDSSpec
from efficientids.runs import RunFolder, locate


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model with what it needs to recommend."""

    run: RunFolder
    step: int
    config: TrainConfig
    system: EfficientIDS
    graphdef: nnx.GraphDef
    params: nnx.State
    description: dict[str, Any]

    @property
    def model(self) -> nnx.Module:
        return nnx.merge(self.graphdef, self.params)

    def dataset(self, data_dir: Path | None = None) -> Dataset:
        """The data set that the run trained on, or the one in `data_dir` with the same items.

        Raises:
            UserError: it is not there, or its items are not those of the run.
        """
        recorded = self.run.path / self.description["dataset"]["path"]  # an absolute path stands for itself
        if data_dir is None and not recorded.is_dir():
            raise UserError(f"the run's data set was {recorded}, which is gone; give its new place with --data_dir")
        dataset = Dataset.open(data_dir or recorded)
        check_same_items(self, dataset)
        return dataset


def load_run(path: str | Path, step: int | None = None) -> tuple[FunctionalModel, nnx.State, TrainConfig]:
    """A trained model for inference.

    Args:
        path: the run folder R, R/STEP or R/checkpoints/STEP.
        step: which checkpoint; None: the one the path names, else the best by validation NDCG@10.

    Returns:
        (model, complete parameters, configuration): `model.apply(params, input_ids=…, item_ids=…, item_mask=…)`.

    Raises:
        UserError: no run, no such step, a damaged description, or frozen weights that are gone or changed.
    """
    loaded = open_run(path, step)
    return FunctionalModel(loaded.graphdef), loaded.params, loaded.config


def open_run(path: str | Path, step: int | None = None, llama_dtype: Any = None) -> LoadedRun:
    """As `load_run`, with the recommender. `llama_dtype`: of the Llama's parameters, default as the run computed."""
    quiet_devices()
    run, named = locate(str(path))
    step = run.choose_step(named if step is None else step)
    config = from_mapping(run.read_config(), run.path / "config.yaml")
    spec, described = _description(run)
    frozen = described["frozen_weights"]
    dtype = llama_dtype or build.llama_param_dtype(config)
    system, graphdef, state = build.abstract(spec, described["precision"], dtype)
    if frozen is None:
        params = checkpoints.restore(run.checkpoints, step, state)
    else:
        own = nnx.filter_state(state, nnx.Not(in_llama))
        params = nnx.merge_state(checkpoints.restore(run.checkpoints, step, own), _frozen(frozen, dtype))
    return LoadedRun(run, step, config, system, graphdef, params, described)


def _description(run: RunFolder) -> tuple[EfficientIDSSpec, dict[str, Any]]:
    """The content of `model.json`, with everything that is read from it later known to be there."""
    described = run.read_model()
    try:
        spec = EfficientIDSSpec.from_json(described["spec"])
        texts = [described["precision"], *(described["dataset"][name] for name in ("path", "items_sha256"))]
        if described["frozen_weights"] is not None:
            texts += [described["frozen_weights"][name] for name in ("path", "sha256")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"expected texts, found {texts}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.path / 'model.json'}: damaged, or written by another version ({error!r})") from error
    return spec, described


def _frozen(recorded: dict[str, str], dtype: Any) -> nnx.State:
    """The frozen Llama's parameters from its weight file, whose checksum must be the recorded one."""
    path = Path(recorded["path"])
    if not path.is_dir():
        raise UserError(f"the run's frozen Llama came from {path}, which is gone; put its weight files back there")
    try:
        found = weights_checksum(path)
    except CheckpointError as error:
        raise UserError(f"the run's frozen Llama came from {path}: {error}; put its weight files back there") from error
    if found != recorded["sha256"]:
        raise UserError(f"the weight files in {path} changed since the run was trained; put the original ones back")
    return nnx.State({"llama": build.load_llama(path, dtype)})


def check_same_items(loaded: LoadedRun, dataset: Dataset) -> None:
    """Refuses a data set whose items are not the run's: its vectors would stand for other items."""
    if build.items_sha256(dataset) != loaded.description["dataset"]["items_sha256"]:
        raise UserError(
            f"{dataset.path} has other items than the data set of {loaded.run.path}: "
            "the item vectors would stand for other items. Use the data set that the run was trained on"
        )


def clusters_of(loaded: LoadedRun) -> Clusters | None:
    """The clusters that a run's parameters belong to; None with the full head."""
    buffers = getattr(loaded.model, "clusters", None)
    return None if buffers is None else Clusters(**{name: buffer[...] for name, buffer in buffers.items()})


def adopt(loaded: LoadedRun, system: EfficientIDS, config: TrainConfig) -> nnx.Module:
    """`--load_checkpoint`: the parameters and buffers of an earlier run in a new recommender.

    Raises:
        UserError: the earlier model is another one (fields listed), or was trained with other clusters or titles.
    """
    # How long sequences are and how text is weighed may change; what has parameters or buffers may not.
    free = {"seq_len", "max_seq_len", "text_loss_weight", "model.dropout", "model.init_std"}
    differing = build.differing_fields(loaded.system.spec, system.spec)
    differing = [line for line in differing if line.split(":")[0] not in free]
    if differing:
        listed = "\n  ".join(differing)
        raise UserError(
            f"--load_checkpoint {loaded.run.path} is a checkpoint of another model (its value ≠ this run's):\n  "
            f"{listed}\nGive the flags of the run that wrote it (--llama_size, --weights, --head, --item_dim, …)"
        )
    _check_same_buffers(loaded, system, config)
    graphdef, _ = nnx.split(nnx.eval_shape(system.init, jax.random.key(0)))
    return nnx.merge(graphdef, loaded.params)


def _check_same_buffers(loaded: LoadedRun, system: EfficientIDS, config: TrainConfig) -> None:
    clusters = clusters_of(loaded)
    if config.clustering is not None and clusters is not None:
        given = build.given_clusters(config.clustering, clusters.num_items)
        if not np.array_equal(given.cluster_of_item_N1, clusters.cluster_of_item_N1):
            raise UserError(
                f"--clustering {config.clustering} is not the clustering that {loaded.run.path} was trained with; "
                "leave it out to keep the run's"
            )
    titles = getattr(loaded.model, "titles_NK", None)
    if titles is not None and not np.array_equal(titles[...], np.asarray(system.titles)):
        raise UserError(
            f"the titles' tokens differ from those that {loaded.run.path} was trained with; give the same --tokenizer "
            "and the same data set"
        )
