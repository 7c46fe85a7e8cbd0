"""`train_llama.py`: from flags to a trained, evaluated run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from core import sharding
from core.platform import start_devices
from core.quantized import QuantizedParam
from core.weight_files import weights_checksum
from efficientids import loading, processes, systems
from efficientids.config import parse, to_mapping
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import evaluate
from efficientids.evaluation.of_run import evaluate_run
from efficientids.evaluation.samples import sample_recommendations
from efficientids.evaluation.text import as_text
from efficientids.log import RunLog, duration
from efficientids.options import READS, TrainConfig
from efficientids.pages.run_report import ReportPage
from efficientids.pages.samples import make_samples, write_samples
from efficientids.planning.measure import scale_of
from efficientids.planning.mesh import mesh_of_run, resolve_mesh
from efficientids.planning.plan import plan
from efficientids.planning.start import log_peak, predicted_peak
from efficientids.preflight.gpu import check_gpu, check_shared_memory
from efficientids.preflight.room import check_room
from efficientids.recommenders.base import Cycle, Phase, Recommender, in_base, turns
from efficientids.runs import RunFolder
from efficientids.systems.base import Scale, System, describe, refuse_unread
from efficientids.systems.llama import base_is_frozen, weights_folder
from efficientids.tracking.tensorboard import TensorBoard
from efficientids.tracking.trackers import Tracker, chosen_trackers
from efficientids.training import gradient_check
from efficientids.training.trainer import TrainerOptions, Validate, train


def main(arguments: Sequence[str], prog: str = "train_llama.py", what: str | None = None) -> int:
    """Parses flags and does the job; returns the exit code.

    `prog`, `what`: the command's name and description in its help.
    """
    config = parse(arguments, prog, what)
    if config.estimate_memory_only:
        # A GPU that is here is left to whoever uses it, and to the three steps of `--plan_by run`.
        jax.config.update("jax_platforms", "cpu")
    else:
        check_gpu()
        processes.join(config.coordinator, config.num_processes, config.process_id)
    # How a run was launched is in its environment.json, and no part of what it is.
    config = dataclasses.replace(config, coordinator=None, num_processes=None, process_id=None)
    start_devices()
    if jax.process_count() > 1 and "mesh" not in READS[config.recommender]:
        raise UserError(f"--recommender {config.recommender} counts in one process; start one, without srun's tasks")
    system = systems.get(config.recommender)
    refuse_unread(config)
    trackers = chosen_trackers(config.trackers)
    if config.estimate_memory_only:
        return plan(config, system, scale_of(config))
    path = config.checkpoint_dir or Path("runs") / f"{config.recommender}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunFolder(Path(processes.by_first(lambda: str(RunFolder.create(path).path))))
    with run.starting():
        dataset = _dataset(config, run.path)
        scale = Scale.of(dataset)
        asked, why = resolve_mesh(config, system, scale)
        config = system.resolve(asked, scale)
        mesh = mesh_of_run(config)
        if mesh is not None and mesh.devices.flat[0].platform == "gpu":
            check_shared_memory(jax.local_device_count())
        mode, log = system.mode(asked, config), RunLog(run.metrics, config.log_every, speaks=processes.is_first())
        steps = _steps(system.planned(config, scale).plan(), asked, config)
        log.say(_announce(config, system, dataset, mode, why, steps))
        predicted = predicted_peak(asked, system, scale)
        recommender, model, frozen_weights = _start(config, system, dataset, run, log, mesh)
        options = _options(config, frozen_weights, mesh)
        if config.check_gradients:
            log.say(gradient_check.as_text(gradient_check.check_gradients(recommender, model, options)))
            raise SystemExit(0)  # a run that was never meant to start leaves no folder
        if mesh is not None:
            log.say(_left_whole(model, mesh))
        if processes.is_first():
            run.write(to_mapping(config), describe(recommender, config, dataset, frozen_weights, run.path), mode)
    followers: dict[str, Tracker] = {"TensorBoard": TensorBoard(), "report.html": ReportPage(), **trackers}
    with log.followed_by(followers if processes.is_first() else {}, run.path, to_mapping(config)):
        began = time.perf_counter()
        train(recommender, model, options, run, log, _validator(recommender, dataset, config.eval_users))
        log_peak(predicted, log)
        log.say(f"trained in {duration(time.perf_counter() - began)}; run folder {run.path}")
        del model
        _report(run, dataset, log, mesh)
    return 0


def _dataset(config: TrainConfig, run: Path) -> Dataset:
    """The data set asked for, or the generated one, written into the run folder."""
    if config.data_dir is not None:
        return Dataset.open(config.data_dir)
    return Dataset.open(Path(processes.by_first(lambda: str(generate().write(run / "data").path))))


def _steps(plan: Sequence[Phase | Cycle], asked: TrainConfig, config: TrainConfig) -> str:
    """How many steps a run takes in all, by phase where there are several or turns of them."""
    found = turns(plan)
    words = f"{sum(phase.num_steps * repeats for phase, repeats in found):,} steps"
    if len(found) > 1 or any(repeats > 1 for _, repeats in found):
        phases = (f"{phase.name} {f'{repeats} × ' * (repeats > 1)}{phase.num_steps:,}" for phase, repeats in found)
        words += f" ({', '.join(phases)})"
    if asked.num_steps not in (None, config.num_steps):
        words += f"; --num_steps {asked.num_steps} are {config.num_steps} in whole turns; each"
    return words


def _announce(config: TrainConfig, system: System, dataset: Dataset, mode: str | None, why: str, steps: str) -> str:
    lines = [] if mode is None else [mode]
    lines += [
        f"{config.recommender}: {system.headline(config)}",
        f"data: {dataset.manifest['name']}: {dataset.num_users:,} users, {dataset.catalogue_size:,} items, "
        f"{dataset.num_interactions:,} interactions",
    ]
    if config.num_steps is not None:
        lines.append(
            f"training: {steps} of {config.batch_size} × {config.gradient_accumulation} "
            f"{'packed rows' if config.pack_sequences else 'users'}, {config.length_buckets} length bucket(s), "
            f"learning rate {config.learning_rate:g}, seed {config.seed}"
        )
    if jax.device_count() > 1 and why:
        kind, count = jax.devices()[0].device_kind, jax.process_count()
        several = f" of {count} processes" if count > 1 else ""
        lines.append(f"devices: {jax.device_count()} × {kind}{several}; mesh {config.mesh} ({why})")
    return "\n".join(lines)


def _left_whole(model: nnx.Module, mesh: Mesh) -> str:
    """What every device holds a copy of though the mesh divides parameters."""
    found = sharding.left_whole(nnx.state(model, nnx.Any(nnx.Param, QuantizedParam)), mesh)
    if not found:
        return f"parameters: all matrices and tables are divided as the mesh says; {mesh.size} devices"
    listed = ", ".join(f"{entry.path} ({entry.reason})" for entry in found[:3]) + (", …" if len(found) > 3 else "")
    return f"parameters: {sum(entry.bytes for entry in found) / 2**20:.1f} MiB are whole on every device: {listed}"


def _start(
    config: TrainConfig, system: System, dataset: Dataset, run: RunFolder, log: RunLog, mesh: Mesh | None
) -> tuple[Recommender, nnx.Module, dict[str, str] | None]:
    """The recommender, its model before step 0, and the file its frozen Llama is referenced by (None: none)."""
    if config.load_checkpoint is not None:
        earlier = loading.open_run(config.load_checkpoint, like=config, mesh=mesh)
        loading.check_same_items(earlier, dataset)
        recommender = system.recommender(config, dataset, earlier)
        # With adapters added to it, the base is no longer what the file holds.
        same_base = base_is_frozen(config) and earlier.config.train in ("auto", config.train, "frozen")
        frozen_weights = earlier.description["frozen_weights"] if same_base else None
        check_room(recommender, _saved(frozen_weights), _eval_every(config), run.path)
        model = loading.adopt(earlier, recommender, system, config.seed, mesh)
        log.say(f"parameters of {earlier.where} at step {earlier.step}; optimiser and step count start anew")
        return recommender, model, frozen_weights
    pretrained = system.pretrained(config)
    by_reference = pretrained and base_is_frozen(config)
    # From shapes alone: weights may be gigabytes to download.
    check_room(system.planned(config, Scale.of(dataset)), _saved(by_reference), _eval_every(config), run.path)
    if pretrained:
        folder = weights_folder(config)
        log.say(f"weights: {folder}")
    recommender = system.recommender(config, dataset, None, log.record)
    model = system.start(recommender, config, mesh)
    if not by_reference:
        return recommender, model, None
    return recommender, model, {"path": str(folder.resolve()), "sha256": weights_checksum(folder)}


def _saved(by_reference: object) -> Any:
    """The NNX filter of what checkpoints hold: all, but for a frozen Llama that its file stands for."""
    return nnx.Not(in_base) if by_reference else ...


def _eval_every(config: TrainConfig) -> int:
    return config.eval_every or 1  # a baseline that only counts is validated once


def _options(config: TrainConfig, frozen_weights: dict[str, str] | None, mesh: Mesh | None) -> TrainerOptions:
    return TrainerOptions(
        seed=config.seed,
        accumulation=config.gradient_accumulation,
        grad_clip=config.grad_clip,
        log_every=config.log_every,
        eval_every=_eval_every(config),
        patience=config.patience,
        saved=_saved(frozen_weights),
        mesh=mesh,
    )


def _validator(recommender: Recommender, dataset: Dataset, count: int | None) -> Validate:
    """Validation on `count` users, whatever the run's seed; on all where there are not more."""
    users = np.unique(dataset.examples("validation").users)
    drawn = None
    if count is not None and count < len(users):
        drawn = np.sort(np.random.default_rng(0).choice(users, count, replace=False))

    def validate(model: nnx.Module) -> dict[str, float]:
        metrics = evaluate(recommender, model, dataset, "validation", cutoffs=(10,), users=drawn).metrics
        return {name: metrics[name] for name in ("hr@10", "ndcg@10")}

    return validate


def _report(run: RunFolder, dataset: Dataset, log: RunLog, mesh: Mesh | None) -> None:
    """Restores the best checkpoint and says what it is worth: the test metrics, and recommendations by title."""
    best_step = int(processes.by_first(lambda: str(run.choose_step())))
    loaded = loading.open_run(run.path, best_step, mesh=mesh)
    log.say(f"best checkpoint: step {loaded.step}")
    result, more = evaluate_run(loaded, dataset, "test")
    samples = make_samples(loaded.recommender, loaded.model, dataset, step=loaded.step)
    if processes.is_first():
        write_samples(run.path, samples)
    log.record({"event": "test", "step": loaded.step, **result.metrics})
    log.say(as_text(result))
    if "best_possible" in more:
        best = more["best_possible"]
        log.say(
            f"test HR@10 {result.metrics['hr@10']:.4f}; best possible on these users {best['hr@10']:.4f} "
            f"(expected {best['hr@10 expected']:.4f}): {result.metrics['hr@10'] / best['hr@10']:.0%} of the best"
        )
    log.say(sample_recommendations(loaded.recommender, loaded.model, dataset, users=3))
