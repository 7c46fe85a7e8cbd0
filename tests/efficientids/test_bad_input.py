"""Bad input as a new user meets it: one clear error, exit code 2, nothing lost, and the next try works."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import polars as pl
import pytest

from efficientids import __main__ as application
from efficientids.data.dataset import Dataset
from efficientids.data.layout import Contents
from efficientids.data.writing import write_dataset
from efficientids.evaluation import cli as evaluate_cli
from efficientids.runs import RunFolder
from efficientids.serving import cli as recommend_cli
from efficientids.train import main
from tests.core.checkpoints import tensors_of, write
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import FROZEN, LLAMA, NUM_ITEMS, SMALL_JOB, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

Command = Callable[[Sequence[str]], int]


@dataclasses.dataclass
class Place:
    """A new user's desk: a folder, a data set, weights, and what the last command printed."""

    here: Path
    data: Path
    weights: Path
    capsys: pytest.CaptureFixture[str]

    def error(self, command: Command, *arguments: object) -> str:
        """Runs a command that must fail as the command line does; its message."""
        before = contents(self.here)
        self.capsys.readouterr()
        assert application.run(command, [str(argument) for argument in arguments]) == 2
        printed = self.capsys.readouterr()
        assert printed.err.startswith("error: ") and "Traceback" not in printed.err + printed.out
        after = contents(self.here)
        assert {file: after.get(file) for file in before} == before, "something on disk was lost or changed"
        return printed.err.removeprefix("error: ")

    def train_error(self, *more: object, **changed: Any) -> str:
        """The message of a training that must fail; its run folder is then free for the next try."""
        job = {"data_dir": self.data, "weights": self.weights, "checkpoint_dir": self.here / "run", **SMALL_JOB}
        given = {name: value for name, value in {**job, **changed}.items() if value is not None}
        message = self.error(main, *flags(**given), *more)
        if "checkpoint_dir" not in changed:
            assert not (self.here / "run").exists()
        return message


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def place(tmp_path: Path, tiny_data: Dataset, weights: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    data, own = shutil.copytree(tiny_data.path, tmp_path / "data"), shutil.copytree(weights, tmp_path / "llama")
    return Place(tmp_path, Path(data), Path(own), capsys)


def test_data_that_is_not_there(place: Place) -> None:
    assert "none: no such folder. Make a data set with" in place.train_error(data_dir=place.here / "none")
    (place.here / "empty").mkdir()
    assert "no prepared data set (no manifest.json)" in place.train_error(data_dir=place.here / "empty")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("item_ids.npy", lambda data: data + b"0", "Prepare the data set again"),
        ("item_ids.npy", lambda data: data[:-4] + np.int32(NUM_ITEMS + 5).tobytes(), "is item 35, outside 1..30"),
        ("items.parquet", lambda data: b"", "items.parquet: not a readable parquet file"),
        ("manifest.json", lambda data: b"{", "manifest.json: not JSON"),
    ],
)
def test_damaged_data(place: Place, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    file = place.data / name
    file.write_bytes(change(file.read_bytes()))
    assert message in place.train_error()


def test_weights_that_are_not_there(place: Place) -> None:
    assert "none: no such folder" in place.train_error(weights=place.here / "none")
    (place.here / "empty").mkdir()
    assert "config.json" in place.train_error(weights=place.here / "empty")
    (place.weights / "model.safetensors").unlink()
    assert "no weights there; expected one of model.safetensors" in place.train_error()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "bert"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_of_something_else(place: Place, change: dict[str, Any], message: str) -> None:
    file = place.weights / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    found = place.train_error()
    assert "config.json" in found and message in found


def test_weights_of_another_shape_or_damaged(place: Place) -> None:
    other = dataclasses.replace(LLAMA, num_layers=3)
    (place.weights / "config.json").write_text(json.dumps(other.to_hf()))
    assert "missing: model.layers.2.input_layernorm.weight" in place.train_error()
    write(place.weights, LLAMA, tensors_of(LLAMA))
    file = place.weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "model.safetensors: not a complete safetensors file" in place.train_error()


def test_more_positions_than_a_sliding_window(place: Place) -> None:
    (place.weights / "config.json").write_text(json.dumps(dataclasses.replace(LLAMA, sliding_window=20).to_hf()))
    message = place.train_error(seq_len=21)
    assert "--seq_len 21: the Llama has a sliding_window of 20" in message and "give at most that" in message


def test_weights_of_another_size_than_asked_for(place: Place) -> None:
    message = place.train_error(llama_size="1b")
    assert "--llama_size 1b" in message and "leave --llama_size out" in message


def test_a_size_without_access_names_token_licence_page_and_flag(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place.here / "cache"))
    message = place.train_error("--freeze_llama", llama_size="1b", weights=None)
    assert message.count("\n") == 1
    for part in ("HF_TOKEN", "https://huggingface.co/meta-llama/Llama-3.2-1B", "--weights"):
        assert part in message


def test_after_a_failure_the_same_command_works(place: Place) -> None:
    kept = place.here / "kept.safetensors"
    (place.weights / "model.safetensors").rename(kept)
    assert "no weights there" in place.train_error("--freeze_llama")
    kept.rename(place.weights / "model.safetensors")
    job = flags(data_dir=place.data, weights=place.weights, checkpoint_dir=place.here / "run", **SMALL_JOB)
    assert main([*job, "--freeze_llama"]) == 0
    assert "already holds a run" in place.train_error(checkpoint_dir=place.here / "run")


def test_items_and_clusters_that_do_not_fit(place: Place) -> None:
    assert "none.npy" in place.train_error(clustering=place.here / "none.npy")
    for assignment in (np.zeros(7, int), np.full(NUM_ITEMS, 1.5), np.arange(NUM_ITEMS) * 2):
        np.save(place.here / "bad.npy", assignment)
        assert "bad.npy" in place.train_error(clustering=place.here / "bad.npy") or assignment.max() == 58
    assert "--num_clusters 31: the catalogue has 30 items" in place.train_error(num_clusters=31)
    assert "--num_clusters 31" in place.error(
        main, *flags(data_dir=place.data, num_clusters=31), "--estimate_memory_only"
    )


def test_titles_without_a_tokenizer_or_without_titles(place: Place, tiny_data: Dataset) -> None:
    text = {"item_text": "title", "title_tokens": 2}
    assert "tokenizer.json" in place.train_error(**text)
    assert "--tokenizer" in place.train_error(**text, weights=None)
    items = tiny_data.items.drop("title")
    contents = Contents(
        "untitled", "test", items, tiny_data.users, tiny_data.item_ids, tiny_data.timestamps, tiny_data.offsets,
        tiny_data.manifest["order"], {},
    )  # fmt: skip
    untitled = write_dataset(place.here / "untitled", contents)
    assert "have no titles" in place.train_error(**text, data_dir=untitled.path, tokenizer=place.here / "t.json")


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([[1], [2]], "no user has 2 items to train on"),
        ([[1, 2, 3], [2]], "no user has 2 items to train on"),  # two of three are held out
        ([[1, 2], [3, 4]], "no user has 3 interactions, which leave-one-out needs"),
    ],
)
def test_too_little_data(place: Place, tiny_data: Dataset, histories: list[list[int]], message: str) -> None:
    items = np.concatenate(histories).astype(np.int32)
    users = pl.DataFrame({"user": np.arange(2, dtype=np.int32), "user_id": ["a", "b"]})
    offsets = np.cumsum([0, *map(len, histories)])
    order = tiny_data.manifest["order"]
    contents = Contents("short", "test", tiny_data.items, users, items, np.zeros(len(items), int), offsets, order, {})
    short = write_dataset(place.here / "short", contents)
    assert message in place.train_error(data_dir=short.path)


def test_a_run_folder_that_cannot_be(place: Place) -> None:
    file = place.here / "file"
    file.write_text("mine")
    assert "is a file; give a folder" in place.train_error(checkpoint_dir=file)
    assert "file/below cannot be made" in place.train_error(checkpoint_dir=file / "below")
    (place.here / "notes").mkdir()
    (place.here / "notes" / "mine.txt").write_text("mine")
    assert "is not empty (mine.txt)" in place.train_error(checkpoint_dir=place.here / "notes")
    (place.here / "empty").mkdir()
    (place.here / "link").symlink_to(place.here / "empty")
    assert "none: no such folder" in place.train_error(checkpoint_dir=place.here / "link", data_dir=place.here / "none")
    RunFolder.create(place.here / "link")


def test_an_earlier_run_of_another_model_or_none(place: Place, trained: Trained) -> None:
    earlier = trained(*FROZEN)
    message = place.train_error("--head=two_level", load_checkpoint=earlier)
    assert message.splitlines()[0].endswith("is a checkpoint of another model (its value ≠ this run's):")
    assert "  model.head: full ≠ two_level\n" in message
    assert "is not a run folder" in place.train_error(load_checkpoint=place.here / "none")
    assert "it has 2, 4" in place.train_error(load_checkpoint=earlier / "7")


@pytest.mark.parametrize("command", [evaluate_cli.main, recommend_cli.main])
def test_evaluate_and_recommend_need_a_run_and_its_data(place: Place, trained: Trained, command: Command) -> None:
    output = ["--output", place.here / "recs.parquet"] if command is recommend_cli.main else []
    assert "is not a run folder" in place.error(command, "--run", place.here, *output)
    run = shutil.copytree(trained(*FROZEN), place.here / "run")
    assert "it has 2, 4" in place.error(command, "--run", run, "--step", 3, *output)
    description = json.loads((run / "model.json").read_text())
    description["dataset"]["path"] = str(place.here / "moved")
    (run / "model.json").write_text(json.dumps(description))
    assert "moved, which is gone; give its new place with --data_dir" in place.error(command, "--run", run, *output)
    none = place.here / "none"
    assert "none: no such folder" in place.error(command, "--run", run, "--data_dir", none, *output)
    assert not (place.here / "recs.parquet").exists()


def test_what_counts_runs_in_one_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert "counts in one process; start one" in place.train_error("--recommender=popularity")
