"""`train_llama.py`: from flags to a trained, evaluated run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from core.platform import start_devices
from core.weight_files import weights_checksum
from efficientids import loading, systems
from efficientids.config import parse, to_mapping
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.evaluation.evaluate import evaluate
from efficientids.evaluation.of_run import evaluate_run
from efficientids.evaluation.samples import sample_recommendations
from efficientids.evaluation.text import as_text
from efficientids.log import RunLog, duration
from efficientids.options import TrainConfig
from efficientids.pages.run_report import ReportPage
from efficientids.pages.samples import make_samples, write_samples
from efficientids.planning.measure import scale_of
from efficientids.planning.plan import plan
from efficientids.planning.start import log_peak, predicted_peak
from efficientids.preflight.gpu import check_gpu
from efficientids.preflight.room import check_room
from efficientids.recommenders.base import Recommender, in_base
from efficientids.runs import RunFolder
from efficientids.systems.base import Scale, System, describe, refuse_unread
from efficientids.systems.llama import base_is_frozen
from efficientids.tracking.tensorboard import TensorBoard
from efficientids.tracking.trackers import Tracker, chosen_trackers
from efficientids.training.trainer import TrainerOptions, Validate, train


def main(arguments: Sequence[str]) -> int:
    """Parses flags and does the job; returns the exit code."""
    config = parse(arguments)
    if config.estimate_memory_only:
        # A GPU that is here is left to whoever uses it, and to the three steps of `--plan_by run`.
        jax.config.update("jax_platforms", "cpu")
    else:
        check_gpu()
    start_devices()
    system = systems.get(config.recommender)
    refuse_unread(config)
    trackers = chosen_trackers(config.trackers)
    if config.estimate_memory_only:
        return plan(config, system, scale_of(config))
    path = config.checkpoint_dir or Path("runs") / f"{config.recommender}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunFolder.create(path)
    with run.starting():
        dataset = _dataset(config, run.path)
        scale = Scale.of(dataset)
        asked, config = config, system.resolve(config, scale)
        mode = system.mode(asked, config)
        log = RunLog(run.metrics, config.log_every)
        log.say(_announce(config, system, dataset, mode))
        predicted = predicted_peak(asked, system, scale)
        recommender, model, frozen_weights = _start(config, system, dataset, run, log)
        run.write(to_mapping(config), describe(recommender, config, dataset, frozen_weights, run.path), mode)
    followers: dict[str, Tracker] = {"TensorBoard": TensorBoard(), "report.html": ReportPage(), **trackers}
    with log.followed_by(followers, run.path, to_mapping(config)):
        began = time.perf_counter()
        train(recommender, model, _options(config, frozen_weights), run, log, _validator(recommender, dataset))
        log_peak(predicted, log)
        log.say(f"trained in {duration(time.perf_counter() - began)}; run folder {run.path}")
        del model
        _report(run, dataset, log)
    return 0


def _dataset(config: TrainConfig, run: Path) -> Dataset:
    """The data set asked for, or the generated one, written into the run folder."""
    if config.data_dir is not None:
        return Dataset.open(config.data_dir)
    return generate().write(run / "data")


def _announce(config: TrainConfig, system: System, dataset: Dataset, mode: str | None) -> str:
    lines = [] if mode is None else [mode]
    lines += [
        f"{config.recommender}: {system.headline(config)}",
        f"data: {dataset.manifest['name']}: {dataset.num_users:,} users, {dataset.catalogue_size:,} items, "
        f"{dataset.num_interactions:,} interactions",
    ]
    if config.num_steps is not None:
        lines.append(
            f"training: {config.num_steps:,} steps of {config.batch_size} × {config.gradient_accumulation} "
            f"{'packed rows' if config.pack_sequences else 'users'}, {config.length_buckets} length bucket(s), "
            f"learning rate {config.learning_rate:g}, seed {config.seed}"
        )
    if jax.device_count() > 1:
        lines.append(f"one of {jax.device_count()} devices is used")
    return "\n".join(lines)


def _start(
    config: TrainConfig, system: System, dataset: Dataset, run: RunFolder, log: RunLog
) -> tuple[Recommender, nnx.Module, dict[str, str] | None]:
    """The recommender, its model before step 0, and the file its frozen Llama is referenced by (None: none)."""
    if config.load_checkpoint is not None:
        earlier = loading.open_run(config.load_checkpoint, like=config)
        loading.check_same_items(earlier, dataset)
        recommender = system.recommender(config, dataset, earlier)
        # With adapters added to it, the base is no longer what the file holds.
        same_base = base_is_frozen(config) and earlier.config.train in ("auto", config.train, "frozen")
        frozen_weights = earlier.description["frozen_weights"] if same_base else None
        check_room(recommender, _saved(frozen_weights), _eval_every(config), run.path)
        model = loading.adopt(earlier, recommender, system, config.seed)
        log.say(f"parameters of {earlier.where} at step {earlier.step}; optimiser and step count start anew")
        return recommender, model, frozen_weights
    folder = system.weights(config)
    if folder is not None:
        log.say(f"weights: {folder}")
    recommender = system.recommender(config, dataset, None)
    by_reference = folder is not None and base_is_frozen(config)
    check_room(recommender, _saved(by_reference), _eval_every(config), run.path)
    model = system.start(recommender, config)
    if folder is None or not by_reference:
        return recommender, model, None
    return recommender, model, {"path": str(folder.resolve()), "sha256": weights_checksum(folder)}


def _saved(by_reference: object) -> Any:
    """The NNX filter of what checkpoints hold: all, but for a frozen Llama that its file stands for."""
    return nnx.Not(in_base) if by_reference else ...


def _eval_every(config: TrainConfig) -> int:
    return config.eval_every or 1  # a baseline that only counts is validated once


def _options(config: TrainConfig, frozen_weights: dict[str, str] | None) -> TrainerOptions:
    return TrainerOptions(
        seed=config.seed,
        accumulation=config.gradient_accumulation,
        grad_clip=config.grad_clip,
        log_every=config.log_every,
        eval_every=_eval_every(config),
        patience=config.patience,
        saved=_saved(frozen_weights),
    )


def _validator(recommender: Recommender, dataset: Dataset) -> Validate:
    def validate(model: nnx.Module) -> dict[str, float]:
        metrics = evaluate(recommender, model, dataset, "validation", cutoffs=(10,)).metrics
        return {name: metrics[name] for name in ("hr@10", "ndcg@10")}

    return validate


def _report(run: RunFolder, dataset: Dataset, log: RunLog) -> None:
    """Restores the best checkpoint and says what it is worth: the test metrics, and recommendations by title."""
    loaded = loading.open_run(run.path)
    log.say(f"best checkpoint: step {loaded.step}")
    result, more = evaluate_run(loaded, dataset, "test")
    write_samples(run.path, make_samples(loaded.recommender, loaded.model, dataset, step=loaded.step))
    log.record({"event": "test", "step": loaded.step, **result.metrics})
    log.say(as_text(result))
    if "best_possible" in more:
        best = more["best_possible"]
        log.say(
            f"test HR@10 {result.metrics['hr@10']:.4f}; best possible on these users {best['hr@10']:.4f} "
            f"(expected {best['hr@10 expected']:.4f}): {result.metrics['hr@10'] / best['hr@10']:.0%} of the best"
        )
    log.say(sample_recommendations(loaded.recommender, loaded.model, dataset, users=3))
