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

import yaml

from core.sharding import MeshShape
from efficientids.errors import UserError
from efficientids.flags import command_line
from efficientids.options import READS, PlanOptions, TrainConfig


def _table() -> str:
    """Which flags not every recommender reads, in words."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    everywhere = frozenset.intersection(*READS.values())
    lines = []
    for recommender, reads in READS.items():
        listed = ", ".join(f"--{name}" for name in names if name in reads - everywhere)
        lines.append(f"{recommender}: {listed or 'none of them'}")
    return "\n\n".join(lines)


_DESCRIPTION = f"""--config FILE: a YAML file of these flags; flags win.

All recommenders read {", ".join(f"--{name}" for name in sorted(frozenset.intersection(*READS.values())))}.
Of the others each reads these, and refuses the rest:

{_table()}"""


def parse(arguments: Sequence[str], prog: str = "train_llama.py", what: str | None = None) -> TrainConfig:
    """Flags (with `--config FILE` among them) → configuration; prints help or a usage error and exits as flags do.

    Args:
        prog: the command's name in its help.
        what: what it does, on top of the help; None: it trains.

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
    # Of two values for one option the last wins.
    description = f"{what or TrainConfig.__doc__}\n\n{_DESCRIPTION}"
    config = command_line(TrainConfig, [*_flat(from_file), *rest], prog=prog, description=description)
    check(config)
    return config


_EXCLUSIVE = (
    ("num_steps", "epochs"), ("batch_size", "batch_size_per_device"), ("clustering", "num_clusters"),
    ("random_weights", "weights"),
)  # fmt: skip
_LAUNCH = ("coordinator", "num_processes", "process_id")
_POSITIVE = (
    "num_steps", "epochs", "batch_size", "batch_size_per_device", "gradient_accumulation", "learning_rate",
    "eval_users", "log_every", "eval_every", "max_seq_len", "init_std", "num_clusters", "item_dim", "item_rank",
    "title_tokens",
    "num_devices", "lora_rank", "lora_alpha", "llama_learning_rate", "length_buckets", "width", "num_layers",
    "num_heads", "temperature", "neighbours", "pair_window", "recency", "num_processes", "suffix_size", "code_dim",
    "pretrain_epochs", "recommender_epochs", "tokenizer_learning_rate", "finetune_learning_rate", "beams",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup_steps", "weight_decay", "grad_clip", "patience", "text_loss_weight", "seed",
    "distance_power", "backward", "source_power", "target_power", "popularity_weight", "tokenizer_epochs",
    "aligned_from", "code_loss", "kl_loss", "dec_cl_loss", "finetune_epochs",
)  # fmt: skip


def check(config: TrainConfig) -> None:
    """Refuses combinations that contradict each other and values out of range."""
    for one, other in _EXCLUSIVE:
        if getattr(config, one) and getattr(config, other):
            raise UserError(f"--{one} and --{other} exclude each other; give one")
    _check_ranges(config)
    _check_devices(config)
    if config.seq_len < 2:
        raise UserError(f"--seq_len {config.seq_len}: at least 2, one position to read and one to predict")
    contradictions = (
        (config.head == "full" and (config.clustering is not None or config.num_clusters is not None),
         "--head full has no clusters; leave --clustering and --num_clusters out, or use --head two_level"),
        (config.item_text == "none" and "item_text" in READS[config.recommender]
         and (bool(config.text_loss_weight) or config.tokenizer is not None or config.item_template is not None),
         "--text_loss_weight, --tokenizer and --item_template need --item_text title"),
        (config.max_seq_len == 1, "--max_seq_len 1: at least 2, one item to read and one to predict"),
    )  # fmt: skip
    for holds, message in contradictions:
        if holds:
            raise UserError(message)
    _check_plan(config)


def _check_plan(config: TrainConfig) -> None:
    """Refuses a plan's flags where nothing is planned."""
    for field in dataclasses.fields(PlanOptions):
        if not config.estimate_memory_only and getattr(config, field.name) != field.default:
            more = "; a run's metrics stand in its metrics.jsonl" if field.name == "json" else ""
            raise UserError(f"--{field.name} goes with --estimate_memory_only{more}")
    if config.plan_by == "run" and (config.num_devices > 1 or config.mesh != "auto"):
        raise UserError("--plan_by run takes its steps on one GPU; leave --num_devices and --mesh out")
    if config.estimate_memory_only and config.force:
        raise UserError("--force starts a run; a plan starts nothing; leave it out")


def _check_ranges(config: TrainConfig) -> None:
    ranges = (
        (_POSITIVE, 1e-300, float("inf"), "above 0, and finite"),
        (_NOT_NEGATIVE, 0, float("inf"), "0 or more, and finite"),
        (("dropout", "lora_dropout"), 0, 1, "in [0, 1)"),
    )
    for names, least, below, rule in ranges:
        for name in names:
            value = getattr(config, name)
            if value is not None and not least <= value < below:
                raise UserError(f"--{name} {value}: must be {rule}")


def _check_devices(config: TrainConfig) -> None:
    try:
        if config.mesh != "auto":
            MeshShape.parse(config.mesh)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    missing = [name for name in _LAUNCH if getattr(config, name) is None]
    if missing and len(missing) < len(_LAUNCH):
        raise UserError(f"--{missing[0]} is missing: {', '.join(f'--{name}' for name in _LAUNCH)} go together")
    if not missing and not 0 <= (config.process_id or 0) < (config.num_processes or 0):
        raise UserError(f"--process_id {config.process_id}: expected 0 … {(config.num_processes or 0) - 1}")


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values by flag name: what config.yaml holds and `--config` reads.

    Without a plan's own flags, which say nothing of a run, and those that the recommender does not read: it would
    refuse them (ETEGRec's `resolve` counts positions in `seq_len`, which is no flag of its own).
    """
    plans = {field.name for field in dataclasses.fields(PlanOptions)}
    kept = READS[config.recommender] - plans
    values = {name: value for name, value in dataclasses.asdict(config).items() if name in kept}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_mapping(values: dict[str, Any], source: Path) -> TrainConfig:
    """The inverse of `to_mapping`, for what the recommender reads; `source` names the file in errors."""
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
            command_line(TrainConfig, arguments)
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
