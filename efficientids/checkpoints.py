"""Checkpoints of a run, with Orbax: R/checkpoints/STEP holds `params`, `optimizer` and `info`.

A checkpoint holds every buffer and every parameter, except frozen ones that came from a weight file: those are
referenced by path and checksum in the run's `model.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.options import MultiprocessingOptions

from core import sharding
from efficientids.errors import UserError

# The validation metric that decides which checkpoint is best.
BEST_METRIC = "ndcg@10"
_LATEST = 3
KEPT_AT_ONCE = _LATEST + 2
"""Checkpoints on disk at a time at most: the latest, the best, and one that is being written."""


def _validation(metrics: dict[str, Any] | None) -> float:
    return float((metrics or {}).get(BEST_METRIC, float("-inf")))


def _manager(folder: Path, read_only: bool, alone: bool = False) -> ocp.CheckpointManager:
    """A manager; of several processes all must make and use it together, but for one that this process uses `alone`."""
    # Orbax narrates every save at INFO, and warns that a read-only manager is read-only.
    logging.getLogger("absl").setLevel(logging.ERROR if read_only else logging.WARNING)
    # `max_to_keep=3` with `best_fn` would keep the three best and delete the latest: hence the policies.
    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(_LATEST),
            policies.BestN(get_metric_fn=_validation, n=1, keep_checkpoints_without_metrics=False),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=_validation, preservation_policy=keep, read_only=read_only, create=not read_only,
        multiprocessing_options=_alone() if alone and jax.process_count() > 1 else MultiprocessingOptions(),
    )  # fmt: skip
    handlers = {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.PyTreeCheckpointHandler(),
        "info": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers)


def _alone() -> MultiprocessingOptions:
    here = jax.process_index()
    return MultiprocessingOptions(here, {here}, barrier_sync_key_prefix=f"process-{here}")


class Writer:
    """Saves checkpoints of one run; `close` waits until the last is on disk.

    Where a job has several processes, all of them call `save` and `close`: each writes its parts of the arrays, into a
    folder that all must see.
    """

    def __init__(self, folder: Path) -> None:
        self._manager = _manager(folder, read_only=False)

    def save(self, step: int, params: nnx.State, optimizer: Any, metrics: dict[str, float], info: dict) -> None:
        """Copies the arrays to the host and writes in the background.

        Args:
            step: optimiser steps done; names the checkpoint's folder.
            params: every variable to save (see the module's text).
            optimizer: the optimiser states of the current phase; empty where nothing was trained.
            metrics: validation metrics as fractions; `ndcg@10` decides which checkpoint is best.
            info: small JSON facts: phase, step in the phase.
        """
        items = {"params": ocp.args.StandardSave(nnx.to_pure_dict(params)), "info": ocp.args.JsonSave(info)}
        if jax.tree.leaves(optimizer):  # Orbax refuses to save nothing
            items["optimizer"] = ocp.args.PyTreeSave(optimizer)
        if not self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics):
            raise RuntimeError(f"Orbax did not save step {step}: is there a checkpoint of this step already?")

    def best(self, like: nnx.State, mesh: Mesh | None) -> tuple[int, nnx.State]:
        """The step that validated best so far, and what was saved of it, in the shapes of `like` and on `mesh`."""
        self._manager.wait_until_finished()
        step = self._manager.best_step()
        assert step is not None, "no checkpoint with a validation yet"
        return step, restore(Path(self._manager.directory), step, jax.eval_shape(lambda state: state, like), mesh)

    def close(self) -> None:
        """Waits for the write under way and raises its error, if it had one."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        finally:
            self._manager.close()


@contextmanager
def writer(folder: Path) -> Iterator[Writer]:
    """A `Writer` that is closed on every way out: a process that ends without it loses its last checkpoint."""
    opened = Writer(folder)
    try:
        yield opened
    finally:
        opened.close()


def steps(folder: Path) -> tuple[list[int], int | None]:
    """The steps that have a finished checkpoint in `folder`, ascending, and the one with the best validation metric.

    A folder named like a step but without parameters is none.
    """
    if not folder.is_dir():
        return [], None
    with _reading(folder, alone=True) as manager:
        found = sorted(step for step in manager.all_steps() if (folder / str(step) / "params").is_dir())
        best = manager.best_step()
        return found, best if best in found else None


def restore(folder: Path, step: int, target: nnx.State, mesh: Mesh | None = None) -> nnx.State:
    """Reads the parameters and buffers of `step`, each device its part.

    Args:
        folder: R/checkpoints.
        step: which.
        target: abstract state (`jax.ShapeDtypeStruct` leaves) of what was saved.
        mesh: where they are to lie, whatever mesh wrote them; None: one device.

    Raises:
        UserError: the checkpoint is of another model (the first differing names and shapes are listed), or damaged.
    """
    where = folder / str(step)
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        laid = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), target)
    else:
        laid = sharding.place(target, mesh)
    try:
        with _reading(folder) as manager:
            args = ocp.args.Composite(params=ocp.args.StandardRestore(nnx.to_pure_dict(laid)))
            _check_same_model(where, manager, step, target)
            saved = manager.restore(step, args=args)["params"]
    except (KeyError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        others = ", ".join(str(other) for other in steps(folder)[0] if other != step) or "none"
        raise UserError(f"{where} is damaged ({reason}); other steps of this run: {others}") from error
    nnx.replace_by_pure_dict(target, saved)
    return target


@contextmanager
def _reading(folder: Path, alone: bool = False) -> Iterator[ocp.CheckpointManager]:
    manager = _manager(folder, read_only=True, alone=alone)
    try:
        yield manager
    finally:
        manager.close()


def _check_same_model(where: Path, manager: ocp.CheckpointManager, step: int, target: nnx.State) -> None:
    metadata = manager.item_metadata(step)["params"]
    tree = getattr(metadata, "tree", metadata)
    found = {_name(path): tuple(leaf.shape) for path, leaf in _leaves(tree)}
    wanted = {_name(path): tuple(leaf.shape) for path, leaf in _leaves(nnx.to_pure_dict(target))}
    lines = [f"  {name}: missing in the checkpoint" for name in wanted if name not in found]
    lines += [f"  {name}: not in this model" for name in found if name not in wanted]
    lines += [
        f"  {name}: {found[name]} in the checkpoint, {shape} in this model"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if lines:
        more = f"\n  … and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(
            f"{where} is a checkpoint of another model:\n" + "\n".join(lines[:8]) + more +
            "\nUse the flags (and the data set) of the run that wrote it, or another checkpoint."
        )  # fmt: skip


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))[0]


def _name(path: Any) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
