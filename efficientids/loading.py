"""From a run folder back to a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from core import sharding
from core.code_tables import verify
from core.functional import FunctionalModel
from core.lora import is_adapter, merged
from core.platform import quiet_devices
from core.semantic_ids import SemanticIDs
from core.weight_files import CheckpointError, weights_checksum
from efficientids import checkpoints, systems
from efficientids.config import from_mapping
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Recommender, in_base
from efficientids.runs import RunFolder, locate
from efficientids.systems.base import System, abstract, differing_fields
from efficientids.systems.llama import llama_init, load_llama


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model with what it needs to recommend."""

    run: RunFolder
    step: int
    config: TrainConfig
    recommender: Recommender
    graphdef: nnx.GraphDef
    params: nnx.State
    description: dict[str, Any]

    @property
    def where(self) -> Path:
        """The run folder."""
        return self.run.path

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
        (model, complete parameters, configuration): `model.apply(params, input_ids=…, item_ids=…, item_mask=…)` of the
        two systems with a Llama; `open_run(…).recommender.recommend` is the way that all have.

    Raises:
        UserError: no run, no such step, a damaged description, or frozen weights that are gone or changed.
    """
    loaded = open_run(path, step)
    return FunctionalModel(loaded.graphdef), loaded.params, loaded.config


def open_run(
    path: str | Path, step: int | None = None, like: TrainConfig | None = None, mesh: Mesh | None = None
) -> LoadedRun:
    """As `load_run`, with the recommender.

    Args:
        like: whose precision a Llama's parameters take; None: the run's own.
        mesh: where the parameters are to lie, whatever they lay on when they were saved; None: one device.
    """
    loaded = open_saved(path, step, like, mesh)
    folder = frozen_folder(loaded)
    if folder is None:
        return loaded
    llama: nnx.State = nnx.State({"llama": load_llama(folder, llama_init(like or loaded.config), mesh)})
    return dataclasses.replace(loaded, params=nnx.merge_state(loaded.params, llama))


def open_saved(
    path: str | Path, step: int | None = None, like: TrainConfig | None = None, mesh: Mesh | None = None
) -> LoadedRun:
    """As `open_run`, but `params` is what the checkpoint holds: a frozen Llama stays in its file (`frozen_folder`)."""
    quiet_devices()
    run, named = locate(str(path))
    step = run.choose_step(named if step is None else step)
    config = from_mapping(run.read_config(), run.path / "config.yaml")
    described = _description(run)
    frozen = described["frozen_weights"]
    if frozen is None and like is not None and like.quantize != config.quantize:
        raise UserError(
            f"--quantize {like.quantize}: the checkpoints of {run.path} hold the Llama itself, as --quantize "
            f"{config.quantize}; give that"
        )
    try:
        restored = systems.get(described["recommender"]).restored
        recommender = restored(described["spec"], like or config, described["precision"])
    except (KeyError, TypeError, ValueError) as error:
        raise run.damaged(error) from error
    graphdef, state = abstract(recommender)
    saved = state if frozen is None else nnx.filter_state(state, nnx.Not(in_base))
    params = checkpoints.restore(run.checkpoints, step, saved, mesh)
    _check_semantic_ids(run, step, nnx.merge(graphdef, nnx.merge_state(state, params)))
    return LoadedRun(run, step, config, recommender, graphdef, params, described)


def _description(run: RunFolder) -> dict[str, Any]:
    """The content of `model.json`, with everything that is read from it later known to be there."""
    described = run.read_model()
    try:
        texts = [described[name] for name in ("recommender", "precision")]
        texts += [described["dataset"][name] for name in ("path", "items_sha256", "fingerprint")]
        if described["frozen_weights"] is not None:
            texts += [described["frozen_weights"][name] for name in ("path", "sha256")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"expected texts, found {texts}")
    except (KeyError, TypeError) as error:
        raise run.damaged(error) from error
    return described


def _check_semantic_ids(run: RunFolder, step: int, model: nnx.Module) -> None:
    """Refuses a checkpoint whose codes, trie and version are not of one making: it would recommend other items."""
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, SemanticIDs):
            continue
        try:
            verify(module)
        except ValueError as error:
            name = ".".join(map(str, path))
            raise UserError(
                f"{run.checkpoints / str(step)}: {name}: {error}. The checkpoint is damaged; take another (--step)"
            ) from error


def frozen_folder(loaded: LoadedRun) -> Path | None:
    """The folder of the weight file that a run's frozen Llama came from; None where its checkpoints hold the Llama.

    Raises:
        UserError: it is gone, or its checksum is not the recorded one.
    """
    recorded = loaded.description["frozen_weights"]
    if recorded is None:
        return None
    path = Path(recorded["path"])
    if not path.is_dir():
        raise UserError(f"the run's frozen Llama came from {path}, which is gone; put its weight files back there")
    try:
        found = weights_checksum(path)
    except CheckpointError as error:
        raise UserError(f"the run's frozen Llama came from {path}: {error}; put its weight files back there") from error
    if found != recorded["sha256"]:
        raise UserError(f"the weight files in {path} changed since the run was trained; put the original ones back")
    return path


def check_same_items(loaded: LoadedRun, dataset: Dataset) -> None:
    """Refuses a data set whose items are not the run's: its vectors would stand for other items."""
    if dataset.items_sha256 != loaded.description["dataset"]["items_sha256"]:
        raise UserError(
            f"{dataset.path} has other items than the data set of {loaded.run.path}: "
            "the item vectors would stand for other items. Use the data set that the run was trained on"
        )


def adopt(
    loaded: LoadedRun, recommender: Recommender, system: System, seed: int, mesh: Mesh | None = None
) -> nnx.Module:
    """`--load_checkpoint`: the parameters and buffers of an earlier run in a new recommender.

    Adapters of the earlier run are added to the weights where the new one has none; where only the new one has
    adapters, they start from `seed`.

    Raises:
        UserError: the earlier model is another one (fields listed).
    """
    if type(loaded.recommender) is not type(recommender):
        raise UserError(
            f"--load_checkpoint {loaded.where} is a checkpoint of --recommender {loaded.config.recommender}; give that"
        )
    graphdef, target = abstract(recommender)
    one_has_none = _no_adapters(target) != _no_adapters(loaded.params)
    differing = differing_fields(loaded.recommender.spec, recommender.spec)
    free = system.may_change | ({"model.lora"} if one_has_none else set())
    differing = [line for line in differing if line.split(":")[0] not in free]
    if differing:
        listed = "\n  ".join(differing)
        raise UserError(
            f"--load_checkpoint {loaded.where} is a checkpoint of another model (its value ≠ this run's):\n  "
            f"{listed}\nGive the flags of the run that wrote it, which stand in {loaded.where / 'config.yaml'}"
        )
    if not one_has_none:
        return nnx.merge(graphdef, loaded.params)
    if _no_adapters(target):
        try:
            return nnx.merge(graphdef, merged(loaded.model))
        except ValueError as error:
            raise UserError(f"--load_checkpoint {loaded.where}: {error}") from error
    laid = None if mesh is None else sharding.shardings(nnx.filter_state(target, is_adapter), mesh)
    start = jax.jit(lambda: nnx.state(recommender.init(jax.random.key(seed)), is_adapter), out_shardings=laid)
    return nnx.merge(graphdef, loaded.params, start())


def _no_adapters(state: nnx.State) -> bool:
    return not jax.tree.leaves(nnx.filter_state(state, is_adapter))
