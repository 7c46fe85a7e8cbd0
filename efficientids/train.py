"""`train_llama.py`: from flags to a trained, evaluated run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from core.config import LlamaConfig
from core.platform import quiet_devices
from core.weight_files import weights_checksum
from efficientids import build, loading
from efficientids.config import TrainConfig, parse, to_mapping
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.data.process import Oracle, has_oracle
from efficientids.evaluation.evaluate import as_text, evaluate
from efficientids.evaluation.samples import sample_recommendations
from efficientids.log import RunLog, duration
from efficientids.planning.memory import estimate
from efficientids.recommenders.base import in_llama
from efficientids.recommenders.efficientids import EfficientIDS
from efficientids.resolve import Scale, llama_config, resolve, starts_at_random
from efficientids.runs import RunFolder
from efficientids.training.trainer import TrainerOptions, train


def main(arguments: Sequence[str]) -> int:
    """Parses flags and does the job; returns the exit code."""
    config = parse(arguments)
    quiet_devices()
    llama = llama_config(config)
    if config.estimate_memory_only:
        return _estimate(config, llama)
    path = config.checkpoint_dir or Path("runs") / f"{config.recommender}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunFolder.create(path)
    with run.starting():
        dataset = _dataset(config, run.path)
        config = resolve(config, llama, Scale.of(dataset))
        log = RunLog(run.metrics, config.log_every)
        log.say(_announce(config, llama, dataset))
        system, model, frozen_weights = _start(config, llama, dataset, log)
        run.write(to_mapping(config), build.describe(system, config, dataset, frozen_weights, run.path))
    began = time.perf_counter()
    train(system, model, _options(config, frozen_weights), run, log, _validator(system, config, dataset))
    log.say(f"trained in {duration(time.perf_counter() - began)}; run folder {run.path}")
    del model
    _report(run, dataset, log)
    return 0


def _dataset(config: TrainConfig, run: Path) -> Dataset:
    """The data set asked for, or the generated one, written into the run folder."""
    if config.data_dir is not None:
        return Dataset.open(config.data_dir)
    return generate().write(run / "data")


def _announce(config: TrainConfig, llama: LlamaConfig, dataset: Dataset) -> str:
    start = "from --load_checkpoint" if config.load_checkpoint else (
        "at random (no published weights)" if config.llama_size == "tiny" and config.weights is None
        else "at random (--random_weights)" if config.random_weights else "pretrained"
    )  # fmt: skip
    size = config.weights.name if config.weights else config.llama_size
    return (
        f"{config.recommender}: Llama {size} (width {llama.hidden_size}, {llama.num_layers} layers, {start}, "
        f"{'frozen' if config.freeze_llama else 'trainable'}, {config.precision}), {config.head} head\n"
        f"data: {dataset.manifest['name']}: {dataset.num_users:,} users, {dataset.catalogue_size:,} items, "
        f"{dataset.num_interactions:,} interactions\n"
        f"training: {config.num_steps:,} steps of {config.batch_size} × {config.gradient_accumulation} users, "
        f"{config.seq_len} positions, learning rate {config.learning_rate:g}, seed {config.seed}"
        + (f"\none of {jax.device_count()} devices is used" if jax.device_count() > 1 else "")
    )


def _start(
    config: TrainConfig, llama: LlamaConfig, dataset: Dataset, log: RunLog
) -> tuple[EfficientIDS, nnx.Module, dict[str, str] | None]:
    """The system, its model before step 0, and the file that its frozen Llama is referenced by (None: none)."""
    if config.load_checkpoint is not None:
        earlier = loading.open_run(config.load_checkpoint, llama_dtype=build.llama_param_dtype(config))
        loading.check_same_items(earlier, dataset)
        system = build.recommender(config, llama, dataset, loading.clusters_of(earlier))
        model = loading.adopt(earlier, system, config)
        log.say(f"parameters of {earlier.run.path} at step {earlier.step}; optimiser and step count start anew")
        return system, model, earlier.description["frozen_weights"] if config.freeze_llama else None
    if starts_at_random(config):
        system = build.recommender(config, llama, dataset)
        return system, build.start(system, config), None
    folder = build.weights_folder(config)
    log.say(f"weights: {folder}")
    system = build.recommender(config, llama, dataset)
    model = build.start(system, config)
    if not config.freeze_llama:
        return system, model, None
    return system, model, {"path": str(folder.resolve()), "sha256": weights_checksum(folder)}


def _options(config: TrainConfig, frozen_weights: dict[str, str] | None) -> TrainerOptions:
    assert config.eval_every is not None
    return TrainerOptions(
        seed=config.seed,
        accumulation=config.gradient_accumulation,
        grad_clip=config.grad_clip,
        log_every=config.log_every,
        eval_every=config.eval_every,
        patience=config.patience,
        saved=nnx.Not(in_llama) if frozen_weights else ...,
    )


def _validator(system: EfficientIDS, config: TrainConfig, dataset: Dataset) -> Any:
    assert config.max_seq_len is not None
    max_items = config.max_seq_len

    def validate(model: nnx.Module) -> dict[str, float]:
        metrics = evaluate(system, model, dataset, "validation", max_items=max_items, cutoffs=(10,))["metrics"]
        return {name: metrics[name] for name in ("hr@10", "ndcg@10")}

    return validate


def _report(run: RunFolder, dataset: Dataset, log: RunLog) -> None:
    """Restores the best checkpoint and says what it is worth: the test metrics, and recommendations by title."""
    loaded = loading.open_run(run.path)
    max_items = loaded.system.spec.max_seq_len
    log.say(f"best checkpoint: step {loaded.step}")
    history = loaded.system.spec.history
    result = evaluate(loaded.system, loaded.model, dataset, "test", max_items=max_items, history=history)
    log.record({"event": "test", "step": loaded.step, **result["metrics"]})
    log.say(as_text(result))
    if has_oracle(dataset):
        best = Oracle.open(dataset).best_hit_rate("test", 10)
        share = result["metrics"]["hr@10"] / best.realised
        log.say(
            f"test HR@10 {result['metrics']['hr@10']:.4f}; best possible on these users {best.realised:.4f} "
            f"(expected {best.expected:.4f}): {share:.0%} of the best"
        )
    log.say(sample_recommendations(loaded.system, loaded.model, dataset, users=3, max_items=max_items))


def _estimate(config: TrainConfig, llama: LlamaConfig) -> int:
    # Without a data set: MovieLens 1M's size, as the output says.
    scale = Scale() if config.data_dir is None else Scale.of(Dataset.open(config.data_dir))
    estimated = estimate(config, llama, scale)
    print(json.dumps(estimated.to_json(), indent=2) if config.json else estimated.as_text())
    return 0
