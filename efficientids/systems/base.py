"""The contract of a system, and what all systems share in making one: scale, defaults, batches, the random start."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from core import sharding
from core.packing import PackPlan, pack_histories
from core.sharding import MeshShape
from efficientids.data.batches import Bucket, Shard, length_buckets, steps_per_epoch, training_batches
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.options import READS, TrainConfig
from efficientids.recommenders.base import Batch, OptimizerConfig, Recommender, Training

DEFAULT_EPOCHS = 10.0

Record = Callable[[dict[str, Any]], None]
"""Takes a row of `metrics.jsonl`: plain values, `event` and `step` among them."""


def unrecorded(row: dict[str, Any]) -> None:
    """The `Record` of whoever keeps none."""


class Earlier(Protocol):
    """An earlier run whose parameters are to be taken over (`--load_checkpoint`); `loading.LoadedRun` is one."""

    @property
    def recommender(self) -> Recommender: ...

    @property
    def model(self) -> nnx.Module: ...

    @property
    def config(self) -> TrainConfig: ...

    @property
    def where(self) -> Path: ...


class System(Protocol):
    """One value of `--recommender`.

    Attributes:
        may_change: fields of the spec that a run started with `--load_checkpoint` may have otherwise.
    """

    may_change: frozenset[str]

    def resolve(self, config: TrainConfig, scale: Scale) -> TrainConfig:
        """The configuration with every `None` and `auto` that has a default replaced by it.

        Raises:
            UserError: values that do not go together, or not with the data set.
        """

    def headline(self, config: TrainConfig) -> str:
        """The model of a resolved configuration in a few words."""

    def mode(self, config: TrainConfig, resolved: TrainConfig) -> str | None:
        """What trains, and which flag or default of `config` decided that, in a line; None: there is no choice.

        Args:
            config: as asked for.
            resolved: what `resolve` made of it.
        """

    def recommender(
        self, config: TrainConfig, dataset: Dataset, earlier: Earlier | None, record: Record = unrecorded
    ) -> Recommender:
        """What a resolved configuration describes, ready to train on `dataset`.

        Args:
            record: told of what is trained on the way (a tokenizer), before step 1.

        Raises:
            UserError: the buffers (clusters, titles, …) would not be those that `earlier`'s parameters belong to.
        """

    def start(self, recommender: Recommender, config: TrainConfig, mesh: Mesh | None = None) -> nnx.Module:
        """The model before its first step, made where it is to lie: nothing of it is whole on a device of `mesh`."""

    def pretrained(self, config: TrainConfig) -> bool:
        """Whether its Llama starts from weight files (`systems.llama.weights_folder`); False: all starts at random."""

    def planned(self, config: TrainConfig, scale: Scale) -> Recommender:
        """As `recommender` for a resolved configuration, without data: to be seen through `jax.eval_shape` only."""

    def restored(self, spec: Mapping[str, Any], config: TrainConfig, precision: str) -> Recommender:
        """The recommender of a run's `model.json`, with empty buffers for a checkpoint to fill.

        Raises:
            KeyError, TypeError, ValueError: `spec` lacks fields or has unknown ones.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """What the defaults need to know of a data set. Without one, planning assumes MovieLens 1M, 5-core.

    `train_lengths`: how many interactions of each user train, int [U].
    """

    num_items: int = 3416
    train_lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.full(6040, 163))
    dataset: Dataset | None = None

    @staticmethod
    def of(dataset: Dataset) -> Scale:
        """The scale of a prepared data set.

        Raises:
            UserError: nobody to train on, or nobody to evaluate on: better now than after the first steps.
        """
        if not (dataset.train_lengths >= 2).any():
            raise UserError(f"{dataset.path}: no user has 2 items to train on; prepare a data set with more")
        if not len(dataset.examples("validation").users):
            raise UserError(
                f"{dataset.path}: no user has a validation target (no user has 3 interactions, which leave-one-out "
                "needs, or the split has no row to validate on); prepare a data set with more"
            )
        return Scale(dataset.catalogue_size, np.asarray(dataset.train_lengths), dataset)


def mesh_shape(config: TrainConfig) -> MeshShape:
    """The mesh of a configuration; one device where it is still `auto` (`planning.mesh` resolves it)."""
    return MeshShape() if config.mesh == "auto" else MeshShape.parse(config.mesh)


def resolve_batch(config: TrainConfig, scale: Scale, default: int) -> TrainConfig:
    """The data set and the batch size: on all devices together, the default raised to what divides among them.

    Raises:
        UserError: a batch size that does not divide.
    """
    shape = mesh_shape(config)
    parts = shape.batch_shards
    batch = config.batch_size or (config.batch_size_per_device or 0) * parts or -(-default // parts) * parts
    if batch % parts:
        raise UserError(
            f"--batch_size {batch}: does not divide among the {parts} devices of --mesh {shape} that take rows (data × "
            f"fsdp); give a multiple of {parts}, or --batch_size_per_device"
        )
    path = None if scale.dataset is None else Path(scale.dataset.path)
    return dataclasses.replace(config, data_dir=path, batch_size=batch, batch_size_per_device=None)


def check_tensor(config: TrainConfig, **sizes: int) -> None:
    """Refuses a tensor axis that does not divide each of `sizes`, numbers of heads and the like by their names."""
    tensor = mesh_shape(config).tensor
    odd = [f"{size} {name.replace('_', ' ')}" for name, size in sizes.items() if size % tensor]
    if odd:
        raise UserError(f"--mesh {config.mesh}: tensor={tensor} does not divide {', '.join(odd)}; use fsdp instead")


def resolve_training(config: TrainConfig, scale: Scale, buckets: Sequence[Bucket], *, max_warmup: int) -> TrainConfig:
    """Length of training in `buckets`, from the system's own defaults where flags leave it open."""
    epoch = steps_per_epoch(scale.train_lengths, buckets)
    num_steps = config.num_steps or max(1, math.ceil((config.epochs or DEFAULT_EPOCHS) * epoch))
    warmup = min(max_warmup, num_steps // 10) if config.warmup_steps is None else config.warmup_steps
    return dataclasses.replace(
        config, num_steps=num_steps, epochs=None, warmup_steps=warmup,
        eval_every=config.eval_every or max(1, min(epoch, 1000)),
    )  # fmt: skip


def buckets_of(config: TrainConfig, max_items: int, packing: Packing | None = None) -> tuple[Bucket, ...]:
    """The length buckets of a configuration whose batch size is known; with packing one, of as many as it packs."""
    assert config.batch_size is not None
    if packing is not None:
        return (Bucket(max_items, packing.plan.histories),)
    return length_buckets(config.batch_size * config.gradient_accumulation, max_items, config.length_buckets)


def training(
    config: TrainConfig,
    max_items: int,
    dataset: Dataset | None,
    *,
    window_items: int | None = None,
    packing: Packing | None = None,
    **optimizer: Any,
) -> Training:
    """How a resolved configuration trains on `dataset`; None: shapes alone, for a plan.

    `packing`: several histories a row.
    """
    assert config.num_steps is not None and config.learning_rate is not None and config.warmup_steps is not None
    buckets = buckets_of(config, max_items, packing)
    part = Shard(*mesh_shape(config).part_of(jax.process_index(), jax.process_count()))

    def packed(batch: Batch) -> Batch:
        # Every process packs the whole batch and keeps its rows: packed apart, they would be other rows.
        assert packing is not None
        return {name: np.split(rows, part.count)[part.index] for name, rows in packing.pack(batch).items()}

    def batches(seed: int, start_step: int) -> Iterator[Batch]:
        if dataset is None:
            raise ValueError("a plan has shapes, no data")
        return training_batches(
            dataset, buckets, seed=seed, start_step=start_step, window_items=window_items,
            shard=Shard() if packing else part, transform=packed if packing else None,
        )  # fmt: skip

    epoch = 1 if dataset is None else steps_per_epoch(dataset.train_lengths, buckets)
    settings = OptimizerConfig(config.learning_rate, config.warmup_steps, config.weight_decay, **optimizer)
    own = config.llama_learning_rate
    llama_settings = None if own is None else dataclasses.replace(settings, learning_rate=own)
    specs = [history_spec(*bucket) for bucket in buckets] if packing is None else [packing.batch_spec()]
    return Training(config.num_steps, epoch, specs, settings, batches, llama_settings)


def history_spec(width: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch with one history a row."""
    return {
        "item_ids": jax.ShapeDtypeStruct((rows, width), np.int32),
        "lengths": jax.ShapeDtypeStruct((rows,), np.int32),
    }


class Packing(NamedTuple):
    """Several histories a row (see `core.packing`); widths_N int [N + 1]: positions of each item with its text."""

    plan: PackPlan
    widths_N: np.ndarray

    def pack(self, batch: Batch) -> Batch:
        """A batch of histories in rows."""
        packed = pack_histories(batch["item_ids"], batch["lengths"], self.widths_N, self.plan)
        return {"item_ids": packed.item_ids, "segments": packed.segments, "lengths": packed.lengths}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a packed batch."""
        spec = history_spec(self.plan.items, self.plan.rows)
        return {**spec, "segments": spec["item_ids"]}


def start_at_random(recommender: Recommender, config: TrainConfig, mesh: Mesh | None = None) -> nnx.Module:
    """All parameters at their random start, the same on any mesh."""
    key = jax.random.key(config.seed)
    graphdef, state = abstract(recommender)
    laid = None if mesh is None else sharding.shardings(state, mesh)
    # Out of the program comes the state alone: parameters that parts of a module share would come out twice.
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(recommender.init(key)), out_shardings=laid)())


def abstract(recommender: Recommender) -> tuple[nnx.GraphDef, nnx.State]:
    """A recommender's graph definition, and its state as shapes and dtypes."""
    return nnx.split(nnx.eval_shape(recommender.init, jax.random.key(0)))


def refuse_unread(config: TrainConfig) -> None:
    """Refuses flags that the chosen recommender would not look at (`options.READS`)."""
    for field in dataclasses.fields(config):
        if field.name not in READS[config.recommender] and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name} has no meaning with --recommender {config.recommender}; leave it out")


def describe(
    recommender: Recommender, config: TrainConfig, dataset: Dataset, weights: dict[str, str] | None, run: Path
) -> dict[str, Any]:
    """What `model.json` says: enough to rebuild the model and to find its data set and its weight file.

    Args:
        weights: path and sha256 of the frozen Llama's weight file; None where checkpoints hold every parameter.
        run: the run folder; a data set inside it is named relative to it, so that the folder can be moved.
    """
    data, home = Path(dataset.path).resolve(), run.resolve()
    return {
        "recommender": config.recommender,
        "spec": recommender.spec.to_json(),
        "precision": precision_of(config),
        "dataset": {
            "path": str(data.relative_to(home) if data.is_relative_to(home) else data),
            "fingerprint": dataset.fingerprint,
            "items_sha256": dataset.items_sha256,
        },
        "frozen_weights": weights,
    }


def precision_of(config: TrainConfig) -> str:
    """What a resolved configuration computes in; recommenders without a choice compute in float32."""
    return config.precision if "precision" in READS[config.recommender] else "float32"


def differing_fields(one: Any, other: Any, prefix: str = "") -> list[str]:
    """`name: a ≠ b` for each field in which two dataclasses differ."""
    lines: list[str] = []
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            lines += differing_fields(a, b, f"{prefix}{field.name}.")
        elif a != b:
            lines.append(f"{prefix}{field.name}: {a} ≠ {b}")
    return lines
