"""Flags, the YAML file that sets what flags set, and what the rest decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from efficientids import systems
from efficientids.config import from_mapping, parse, to_mapping
from efficientids.errors import UserError
from efficientids.options import READS, TrainConfig
from efficientids.systems.base import Scale, refuse_unread

# The seed's flags, then those that the project adds: what stands on the command line, and what it means.
FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("--llama_size 1b", {"llama_size": "1b"}),
    ("--freeze_llama", {"freeze_llama": True}),
    ("--data_dir some/data", {"data_dir": Path("some/data")}),
    ("--checkpoint_dir ./stage1", {"checkpoint_dir": Path("stage1")}),
    ("--num_steps 5000", {"num_steps": 5000}),
    ("--batch_size 16", {"batch_size": 16}),
    ("--seq_len 32", {"seq_len": 32}),
    ("--learning_rate 1e-4", {"learning_rate": 1e-4}),
    ("--warmup_steps 500", {"warmup_steps": 500}),
    ("--grad_clip 0.5", {"grad_clip": 0.5}),
    ("--log_every 100", {"log_every": 100}),
    ("--load_checkpoint ./stage1_frozen/1000", {"load_checkpoint": "./stage1_frozen/1000"}),
    ("--estimate_memory_only", {"estimate_memory_only": True}),
    ("--recommender efficientids", {"recommender": "efficientids"}),
    ("--epochs 2.5", {"epochs": 2.5}),
    ("--gradient_accumulation 4", {"gradient_accumulation": 4}),
    ("--batch_size_per_device 2", {"batch_size_per_device": 2}),
    ("--precision bfloat16", {"precision": "bfloat16"}),
    ("--gradient_checkpointing full", {"gradient_checkpointing": "full"}),
    ("--max_seq_len 20", {"max_seq_len": 20}),
    ("--init_std 0.01", {"init_std": 0.01}),
    ("--weights w", {"weights": Path("w")}),
    ("--random_weights", {"random_weights": True}),
    ("--num_clusters 9", {"num_clusters": 9}),
    ("--clustering c.npy", {"clustering": Path("c.npy")}),
    ("--head two_level", {"head": "two_level"}),
    ("--item_dim 64", {"item_dim": 64}),
    ("--item_rank 8", {"item_rank": 8}),
    ("--output_tying shared_mlp", {"output_tying": "shared_mlp"}),
    ("--item_text title --text_loss_weight 0.1", {"item_text": "title", "text_loss_weight": 0.1}),
    ("--item_text title --tokenizer t.json", {"item_text": "title", "tokenizer": Path("t.json")}),
    ("--seed 7", {"seed": 7}),
    ("--eval_every 10 --patience 3", {"eval_every": 10, "patience": 3}),
    ("--estimate_memory_only --json", {"estimate_memory_only": True, "json": True}),
    (
        "--estimate_memory_only --device h100 --num_devices 8",
        {"estimate_memory_only": True, "device": "h100", "num_devices": 8},
    ),
    (
        "--estimate_memory_only --quick --plan_by estimate",
        {"estimate_memory_only": True, "quick": True, "plan_by": "estimate"},
    ),
    ("--force", {"force": True}),
]


def test_without_a_flag_everything_is_default() -> None:
    config = parse([])
    assert config == TrainConfig()
    # The seed's own defaults.
    assert (config.seq_len, config.log_every, config.grad_clip) == (64, 50, 1.0)
    assert (config.llama_size, config.recommender, config.freeze_llama) == ("tiny", "efficientids", False)


@pytest.mark.parametrize(("line", "meaning"), FLAGS, ids=[line for line, _ in FLAGS])
def test_a_flag_and_the_same_in_a_file(line: str, meaning: dict[str, Any], tmp_path: Path) -> None:
    expected = dataclasses.replace(TrainConfig(), **meaning)
    assert parse(line.split()) == expected
    values = {name: str(value) if isinstance(value, Path) else value for name, value in meaning.items()}
    assert parse(["--config", str(yaml_file(tmp_path, values))]) == expected


def yaml_file(folder: Path, values: dict[str, Any] | str) -> Path:
    file = folder / "train.yaml"
    text = values if isinstance(values, str) else "".join(f"{name}: {_yaml(v)}\n" for name, v in values.items())
    file.write_text(text)
    return file


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("order", ["--config {file} --seed 3", "--seed 3 --config {file}", "--seed 3 --config={file}"])
def test_flags_win_over_the_file_wherever_they_stand(order: str, tmp_path: Path) -> None:
    file = yaml_file(tmp_path, {"seed": 1, "num_steps": 10, "freeze_llama": True})
    config = parse([*order.format(file=file).split(), "--no_freeze_llama"])
    assert (config.seed, config.num_steps, config.freeze_llama) == (3, 10, False)


def test_a_flag_wins_over_its_counterpart_in_the_file(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, {"epochs": 2, "batch_size": 16})
    config = parse(["--config", str(file), "--num_steps", "9", "--batch_size_per_device=4"])
    assert (config.num_steps, config.epochs, config.batch_size, config.batch_size_per_device) == (9, None, None, 4)
    with pytest.raises(UserError, match="--num_steps and --epochs exclude"):
        parse(["--config", str(file), "--num_steps", "9", "--epochs", "3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1\n", "unknown key 'learnig_rate'; did you mean learning_rate"),
        ("xyzzy: 1\n", "unknown key 'xyzzy'; known keys: .*llama_size"),
        ("7: 1\n", "unknown key 7"),
        ("num_steps: many\n", "num_steps: expected a whole number or null, found 'many'"),
        ("seed: 1.5\n", "seed: expected a whole number, found 1.5"),
        ("seed: null\n", "seed: expected a whole number, found None"),
        ("num_steps: true\n", "num_steps: expected a whole number or null, found True"),
        ("seq_len: 8\nlearning_rate: fast\n", "learning_rate: expected a number or null, found 'fast'"),
        ("freeze_llama: 1\n", "freeze_llama: expected true or false, found 1"),
        ("head: both\n", "head: expected one of auto, full, two_level, found 'both'"),
        ("num_steps: [1, 2]\n", r"num_steps: expected one value, found \[1, 2\]"),
        ("- seed\n", "expected `flag: value` lines, found list"),
        ("", "the file is empty"),
        ("seed: [", "cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_key_and_value(
    text: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"train\.yaml.*{message}"):
        parse(["--config", str(yaml_file(tmp_path, text))])
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config .*none\.yaml cannot be read"):
        parse(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("arguments", ["--learnig_rate 1", "--num_steps many", "--head both", "stray"])
def test_bad_flags_end_with_code_2(arguments: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments.split())
    assert ended.value.code == 2
    printed = capfd.readouterr()
    assert arguments.split()[0].lstrip("-").split("_")[0] in printed.err + printed.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num_steps 1 --epochs 1", "--num_steps and --epochs exclude each other"),
        ("--batch_size 1 --batch_size_per_device 1", "--batch_size and --batch_size_per_device exclude"),
        ("--clustering f --num_clusters 3", "--clustering and --num_clusters exclude"),
        ("--random_weights --weights w", "--random_weights and --weights exclude"),
        ("--head full --num_clusters 3", "--head full has no clusters"),
        ("--text_loss_weight 0.1", "need --item_text title"),
        ("--tokenizer t.json", "need --item_text title"),
        ("--json", "--json goes with --estimate_memory_only"),
        ("--device h100", "--device goes with --estimate_memory_only"),
        ("--quick", "--quick goes with --estimate_memory_only"),
        ("--estimate_memory_only --num_devices 0", "--num_devices 0: must be above 0"),
        ("--num_steps 0", "--num_steps 0: must be above 0"),
        ("--learning_rate 0", "--learning_rate 0.0: must be above 0"),
        ("--learning_rate nan", "--learning_rate nan: must be above 0, and finite"),
        ("--learning_rate inf", "--learning_rate inf: must be above 0, and finite"),
        ("--grad_clip=-1", "--grad_clip -1.0: must be 0 or more"),
        ("--gradient_accumulation 0", "--gradient_accumulation 0: must be above 0"),
        ("--log_every 0", "--log_every 0"),
        ("--eval_every 0", "--eval_every 0"),
        ("--seed=-1", "--seed -1: must be 0 or more"),
        ("--dropout 1", r"--dropout 1.0: must be in \[0, 1\)"),
        ("--seq_len 1", "--seq_len 1: at least 2"),
        ("--max_seq_len 1", "--max_seq_len 1: at least 2"),
    ],
)
def test_contradictions_and_ranges(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(line.split())


def resolved(line: str, scale: Scale | None = None) -> TrainConfig:
    config = parse(line.split())
    return systems.get(config.recommender).resolve(config, scale or Scale())


def test_what_the_rest_decides() -> None:
    frozen = resolved("--llama_size 1b --freeze_llama --num_steps 5000")
    assert (frozen.batch_size, frozen.warmup_steps, frozen.learning_rate, frozen.dropout) == (8, 100, 5e-4, 0)
    tuned = resolved("--llama_size 1b --num_steps 10000")
    assert (tuned.warmup_steps, tuned.learning_rate, tuned.gradient_checkpointing) == (500, 5e-4, "full")
    scratch = resolved("--num_steps 100")
    assert (scratch.batch_size, scratch.warmup_steps, scratch.learning_rate, scratch.dropout) == (32, 10, 1e-3, 0.2)
    assert (scratch.head, scratch.item_dim, scratch.max_seq_len, scratch.num_clusters) == ("full", 64, 64, None)
    assert resolved("--llama_size 1b").item_dim == 384
    assert resolved("", Scale(num_items=100_000)).num_clusters == 317  # ⌈√N⌉
    assert resolved("--num_clusters 5").head == resolved("--clustering f").head == "two_level"
    # Without a data set 6,040 long histories in steps of 4 × 10 users: 151 steps an epoch.
    long = resolved("--epochs 2 --batch_size 10 --gradient_accumulation 4")
    assert (long.num_steps, long.epochs, long.eval_every) == (302, None, 151)
    assert resolved("--batch_size_per_device 10").batch_size == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--seq_len 3000", "--seq_len 3000: the Llama has max_position_embeddings 2048"),
        ("--max_seq_len 65", "--max_seq_len 65: .*--seq_len is 64"),
        ("--item_text title", "needs a tokenizer"),
        ("--item_text title --tokenizer t --seq_len 34", "--seq_len 34: BOS and two items .* need 35 positions"),
        ("--num_clusters 3417", "--num_clusters 3417: the catalogue has 3416 items"),
        ("--item_dim 8 --item_rank 9", "--item_rank 9: item vectors have 8 dimensions"),
    ],
)
def test_what_the_llama_cannot_take(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(line)


def test_a_resolved_configuration_goes_through_its_file(tmp_path: Path) -> None:
    given = "--num_clusters 5 --freeze_llama --learning_rate 3e-7 --data_dir d --load_checkpoint r/7 --init_std 0.01"
    config = resolved(given, Scale())
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
    assert parse(["--config", str(file)]) == config
    assert from_mapping(yaml.safe_load(file.read_text()), file) == config
    with pytest.raises(UserError, match=r"config\.yaml: seq_len: expected a whole number, found 'x'"):
        from_mapping({**to_mapping(config), "seq_len": "x"}, file)


@pytest.mark.parametrize("name", READS)
def test_the_written_configuration_of_every_system_is_read_again(name: Any, tmp_path: Path) -> None:
    """Nothing in it is refused, and nothing resolves to something else."""
    system, file = systems.get(name), tmp_path / "config.yaml"
    config = system.resolve(TrainConfig(recommender=name), Scale())
    file.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
    again = parse(["--config", str(file)])
    refuse_unread(again)
    assert system.resolve(again, Scale()) == config
