"""The configuration of a training run: flags, a YAML file that sets what flags set, and their defaults.

Flags win over the file, the file over defaults. `None` means "chosen from the rest"; what was chosen stands in the
run's config.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from efficientids.errors import UserError

LlamaSizeName = Literal["tiny", "1b", "3b", "7b", "8b", "8b-3.1", "13b", "tinyllama-1.1b"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What to train, on what, and where the result goes."""

    recommender: Literal["efficientids", "sasrec", "item_knn", "popularity"] = "efficientids"
    """The system to train. sasrec is the strong baseline; item_knn and popularity only count."""
    data_dir: Path | None = None
    """A data set folder (see `python -m efficientids prepare`). Default: a generated catalogue of invented films."""
    checkpoint_dir: Path | None = None
    """The run folder R: configuration, metrics, checkpoints; of a new run. Default: runs/RECOMMENDER-TIME."""
    load_checkpoint: str | None = None
    """R, R/STEP or R/checkpoints/STEP of an earlier run: start from its parameters (fresh optimiser, step 0)."""
    estimate_memory_only: bool = False
    """Print exact bytes of parameters, gradients and optimiser state, then stop."""
    json: bool = False
    """With --estimate_memory_only: print JSON."""
    seed: int = 0
    """Of the random start, the data order and dropout."""
    log_every: int = 50
    """Steps a printed line."""
    eval_every: int | None = None
    """Steps between validations, each followed by a checkpoint. Default: once an epoch, at least every 1,000 steps."""
    patience: int = 0
    """Stop after this many validations without a better NDCG@10; 0: never."""
    trackers: str | None = None
    """Experiment trackers to tell, comma-separated: wandb, mlflow, or names that installed plugins offer."""


@dataclasses.dataclass(frozen=True)
class LlamaOptions:
    """The Llama inside."""

    llama_size: LlamaSizeName = "tiny"
    """tiny starts at random; every other size needs weights (HF_TOKEN or --weights) or --random_weights."""
    weights: Path | None = None
    """A local folder with config.json and safetensors or .bin weights; its config.json decides the size."""
    random_weights: bool = False
    """Start a published size at random instead of downloading its weights."""
    freeze_llama: bool = False
    """Train item vectors, adapters and heads only."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation, and of a frozen Llama's parameters; trained ones are float32. auto: bfloat16 on a GPU."""
    gradient_checkpointing: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass recomputes; dots: all but matrix products. auto: full from a width of 1,024, else dots."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How long, how fast, how much at a time."""

    num_steps: int | None = None
    """Optimiser steps. Exclusive with --epochs."""
    epochs: float | None = None
    """Passes over the users. Default: 10, with no --num_steps."""
    batch_size: int | None = None
    """Users with full-length histories in flight at a time, on all devices together; of shorter ones there are more.
    Default: 64 below a width of 1,024, else 8."""
    batch_size_per_device: int | None = None
    """The same, counted on one device. Exclusive with --batch_size."""
    length_buckets: int = 4
    """Shapes of batches: each has half the width and twice the rows of the one before. 1: all rows at full width."""
    pack_sequences: bool = False
    """Put several short histories into each row, kept apart; replaces length buckets. Worth it with text."""
    gradient_accumulation: int = 1
    """Batches an optimiser step."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-3 from scratch, 5e-4 with a frozen pretrained Llama, 5e-5 for fine-tuning."""
    warmup_steps: int | None = None
    """Default: 100 frozen, 500 trainable; at most a tenth of the steps."""
    weight_decay: float = 0.01
    """Decoupled; never on norms and biases."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    dropout: float | None = None
    """On item inputs and residual branches. Default: 0.2 for a random Llama below a width of 1,024, else 0."""
    seq_len: int = 64
    """Positions of the Llama's input: items, and text between them."""
    max_seq_len: int | None = None
    """The newest items of a history to look at. Default: what fits in --seq_len."""
    init_std: float | None = None
    """Deviation of item vectors and adapters at the start. Default: 0.02 for vectors, 1/√fan-in for adapters."""


@dataclasses.dataclass(frozen=True)
class ItemOptions:
    """EfficientIDS: item vectors and the softmax over them."""

    head: Literal["auto", "full", "two_level"] = "auto"
    """One softmax over all items, or clusters first. auto: full below 100,000 items."""
    num_clusters: int | None = None
    """Of the two-level head. Default: ⌈√N⌉, balanced k-means on co-occurrence vectors of the training histories."""
    clustering: Path | None = None
    """A file of given clusters (.npy or .json), one cluster id an item."""
    item_dim: int | None = None
    """Size of an item vector. Default: 384, or the Llama's width where that is smaller."""
    item_rank: int | None = None
    """Rank of the item table; default: full."""
    output_tying: Literal["adapter", "shared_mlp"] = "adapter"
    """adapter: hidden states come down to item vectors; shared_mlp: item vectors go up through the input adapter."""
    item_text: Literal["none", "title"] = "none"
    """Put each item's title behind it in the sequence."""
    title_tokens: int = 16
    """Tokens of a title to keep."""
    tokenizer: Path | None = None
    """tokenizer.json for titles. Default: the one beside the weights."""
    text_loss_weight: float = 0.0
    """Weight of a title token's loss against an item's; 0: items only."""
    item_template: str | None = None
    """Text of an item: '{title}[ by {brand}]', a YAML file, or a shipped template's name. Default: the title alone."""


@dataclasses.dataclass(frozen=True)
class SASRecOptions:
    """SASRec: its shape. --seq_len is the number of items it looks at."""

    width: int = 64
    """Of item vectors and hidden states."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 2
    """Attention heads."""
    temperature: float | None = None
    """Rank by cosines divided by this; default: by plain products."""


@dataclasses.dataclass(frozen=True)
class ItemKNNOptions:
    """Item-kNN: what stood near an item in other histories (formulas: efficientids/recommenders/item_knn.py)."""

    neighbours: int = 100
    """The most similar items kept of each item."""
    pair_window: int = 10
    """Places between two items of a history that still make a pair."""
    distance_power: float = 0.5
    """How fast a pair's weight falls with its distance; 0: not at all."""
    backward: float = 0.3
    """Weight of what came before an item against what came after it."""
    source_power: float = 0.5
    """How far the popularity of the history's item is divided out."""
    target_power: float = 0.1
    """How far the popularity of the candidate is divided out."""
    recency: float = 0.7
    """Weight of a history item against the next newer one."""
    popularity_weight: float = 1e-5
    """Weight of popularity; so small, it only orders items that are nobody's neighbour."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(ItemKNNOptions, SASRecOptions, ItemOptions, TrainingOptions, LlamaOptions, RunOptions):
    """Trains a recommender with a Llama inside. Without a flag: a tiny Llama on a generated catalogue of films."""


def _names(options: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(options))


# Flags by what reads them, so that a flag which the chosen recommender would ignore can be refused.
LLAMA_FLAGS = _names(LlamaOptions)
TRAINING_FLAGS = _names(TrainingOptions)
EFFICIENTIDS_FLAGS = _names(ItemOptions)
SASREC_FLAGS = _names(SASRecOptions)
ITEM_KNN_FLAGS = _names(ItemKNNOptions)


def parse(arguments: Sequence[str], prog: str = "train_llama.py") -> TrainConfig:
    """Flags (with `--config FILE` among them) → configuration; prints help or a usage error and exits as flags do.

    Raises:
        UserError: the file is missing or has unknown keys or ill-typed values; flags that exclude each other.
    """
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config", type=Path)
    known, rest = pre.parse_known_args(arguments)
    from_file = {} if known.config is None else _file_arguments(known.config)
    flags = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in rest if word.startswith("--")}
    for one, other in _EXCLUSIVE:
        # A flag wins over the file's value of its counterpart, too.
        for flag, counterpart in ((one, other), (other, one)):
            if flag in flags and counterpart not in flags:
                from_file.pop(counterpart, None)
    config = tyro.cli(
        TrainConfig,
        # Of two values for one option the last wins.
        args=[*_flat(from_file), *rest],
        prog=prog,
        description=f"{TrainConfig.__doc__}\n\n--config FILE: a YAML file of these flags; flags win.",
        use_underscores=True,
    )
    check(config)
    return config


_EXCLUSIVE = (
    ("num_steps", "epochs"), ("batch_size", "batch_size_per_device"), ("clustering", "num_clusters"),
    ("random_weights", "weights"),
)  # fmt: skip
_POSITIVE = (
    "num_steps", "epochs", "batch_size", "batch_size_per_device", "gradient_accumulation", "learning_rate",
    "log_every", "eval_every", "max_seq_len", "init_std", "num_clusters", "item_dim", "item_rank", "title_tokens",
    "length_buckets", "width", "num_layers", "num_heads", "temperature", "neighbours", "pair_window", "recency",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup_steps", "weight_decay", "grad_clip", "patience", "text_loss_weight", "seed",
    "distance_power", "backward", "source_power", "target_power", "popularity_weight",
)  # fmt: skip


def check(config: TrainConfig) -> None:
    """Refuses combinations that contradict each other and values out of range."""
    for one, other in _EXCLUSIVE:
        if getattr(config, one) and getattr(config, other):
            raise UserError(f"--{one} and --{other} exclude each other; give one")
    for names, accepted, rule in ((_POSITIVE, 1e-300, "above 0"), (_NOT_NEGATIVE, 0, "0 or more")):
        for name in names:
            value = getattr(config, name)
            if value is not None and not accepted <= value < float("inf"):
                raise UserError(f"--{name} {value}: must be {rule}, and finite")
    if config.seq_len < 2:
        raise UserError(f"--seq_len {config.seq_len}: at least 2, one position to read and one to predict")
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise UserError(f"--dropout {config.dropout}: must be in [0, 1)")
    contradictions = (
        (config.head == "full" and (config.clustering is not None or config.num_clusters is not None),
         "--head full has no clusters; leave --clustering and --num_clusters out, or use --head two_level"),
        (config.item_text == "none"
         and (bool(config.text_loss_weight) or config.tokenizer is not None or config.item_template is not None),
         "--text_loss_weight, --tokenizer and --item_template need --item_text title"),
        (config.max_seq_len == 1, "--max_seq_len 1: at least 2, one item to read and one to predict"),
        (config.json and not config.estimate_memory_only,
         "--json goes with --estimate_memory_only; a run's metrics stand in its metrics.jsonl"),
    )  # fmt: skip
    for holds, message in contradictions:
        if holds:
            raise UserError(message)


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values by flag name: what config.yaml holds and `--config` reads."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}


def from_mapping(values: dict[str, Any], source: Path) -> TrainConfig:
    """The inverse of `to_mapping`; `source` names the file in errors."""
    return parse(_flat(_mapping_arguments(values, source)))


def _file_arguments(path: Path) -> dict[str, list[str]]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if values is None:
        raise UserError(f"--config {path}: the file is empty; write `flag: value` lines")
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected `flag: value` lines, found {type(values).__name__}")
    return _mapping_arguments(values, path)


def _mapping_arguments(values: dict[str, Any], source: Path) -> dict[str, list[str]]:
    """Each key's words on a command line."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    arguments: dict[str, list[str]] = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(fields)}"
            raise UserError(f"{source}: unknown key {name!r}{hint}")
        if isinstance(fields[name].default, bool):
            if not isinstance(value, bool):
                raise UserError(f"{source}: {name}: expected true or false, found {value!r}")
            arguments[name] = [f"--{name}" if value else f"--no_{name}"]
        elif isinstance(value, (dict, list)):
            raise UserError(f"{source}: {name}: expected one value, found {json.dumps(value, default=str)}")
        else:
            arguments[name] = [f"--{name}", str(value)]
    _refuse_ill_typed(arguments, values, source)
    return arguments


def _flat(arguments: Mapping[str, list[str]]) -> list[str]:
    return [word for words in arguments.values() for word in words]


def _refuse_ill_typed(arguments: Mapping[str, list[str]], values: Mapping[str, Any], source: Path) -> None:
    # Parsed apart from the flags: tyro's own error would blame a flag that nobody gave.
    if _parses(_flat(arguments)):
        return
    for name, words in arguments.items():
        if not _parses(words):
            raise UserError(f"{source}: {name}: expected {_expected(name)}, found {values[name]!r}")
    raise AssertionError(f"{source}: each value parses alone, but not all together")


def _parses(arguments: list[str]) -> bool:
    unheard = io.StringIO()
    try:
        with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
            tyro.cli(TrainConfig, args=arguments, use_underscores=True)
    except SystemExit:
        return False
    return True


def _expected(name: str) -> str:
    """A field's type in words."""
    hint = typing.get_type_hints(TrainConfig)[name]
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    words = {int: "a whole number", float: "a number", Path: "a path", str: "text", type(None): "null"}
    return " or ".join(words[kind] for kind in typing.get_args(hint) or (hint,))
