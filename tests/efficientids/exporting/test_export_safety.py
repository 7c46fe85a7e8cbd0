"""Exports that fail, are interrupted or may not be: nothing is left; and what comes along with the weights."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import weight_writing
from efficientids.config import parse
from efficientids.errors import UserError
from efficientids.exporting import cli, llama, tables
from efficientids.exporting.companions import Source, copy_companions, started_from
from efficientids.recommenders.base import Ranked
from tests.efficientids.conftest import Trained
from tests.efficientids.test_training_modes import LORA
from tests.efficientids.tiny import FROZEN

pytestmark = pytest.mark.usefixtures("quick_compile")


def run_export(run: Path, output: Path, format: str = "hf", *more: str) -> int:
    return cli.main(["--run", str(run), "--output", str(output), "--format", format, *more])


def spoil(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], Any]) -> None:
    """Lets `act` happen to the folder of a whole checkpoint after it was written."""
    real = llama.write_merged

    def written(opened: Any, dtype: Any, writer: Any) -> Any:
        result = real(opened, dtype, writer)
        act(writer.folder)
        return result

    monkeypatch.setattr("efficientids.exporting.export.write_merged", written)


def interrupt(folder: Path) -> None:
    assert (folder / "model.safetensors").is_file()
    raise KeyboardInterrupt


def full_disk(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_interrupted_or_failed_export_leaves_nothing(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(*FROZEN)
    with monkeypatch.context() as patch:
        spoil(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        spoil(patch, full_disk)
        with pytest.raises(UserError, match=r"--output .* cannot be written .*No space left on device"):
            run_export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())
    # A killed one leaves a hidden folder; the next removes it.
    (tmp_path / ".out.work-export" / "whole").mkdir(parents=True)
    (tmp_path / ".out.work-export" / "whole" / "model.safetensors").write_bytes(b"half")
    assert run_export(run, tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "README.md").is_file()


def wrong_tensor(folder: Path) -> None:
    """A whole, valid checkpoint, but for one tensor."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-64:] = np.full(16, 7, np.float32).tobytes()
    path.write_bytes(data)


def wrong_config(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "rope_theta": 500.0}))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (wrong_tensor, "the logits differ from the model's by .* is the order of summation"),
        (wrong_config, "config.json, read back, is of another Llama"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a complete safetensors file"),
    ],
)
def test_what_does_not_read_back_is_not_delivered(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], Any], message: str
) -> None:
    spoil(monkeypatch, act)
    with pytest.raises(UserError, match=message + ".*Nothing was left at --output"):
        run_export(trained(*FROZEN), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_where_no_logit_looks(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(folder: Path, files: dict[str, str]) -> None:
        path = folder / "recommender.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        weight_writing.check_written(folder, files)

    monkeypatch.setattr("efficientids.exporting.export.check_written", flip)
    with pytest.raises(UserError, match=r"recommender\.safetensors: read back, it has other bytes"):
        run_export(trained(*FROZEN), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tables_that_recommend_otherwise_are_not_delivered() -> None:
    one = Ranked(np.array([[1, 2]], np.int32), np.array([[0.5, 0.25]], np.float32))
    tables.compare_ranked(one, one)
    with pytest.raises(ValueError, match="recommends other items, or with other scores"):
        tables.compare_ranked(one._replace(scores=one.scores + 1e-7), one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max_shard_size", "5 lots"], "--max_shard_size 5 lots: give a size such as 5GB"),
        (["--dtype", "bfloat16", "--format", "peft"], "--dtype bfloat16 goes with --format hf"),
        (["--step", "3"], "has no step 3; it has 2, 4"),
    ],
)
def test_flags_that_mean_nothing(trained: Trained, tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.main(["--run", str(trained(*FROZEN)), "--output", str(tmp_path / "out"), "--format", "hf", *given])
    assert not (tmp_path / "out").exists()


def test_places_that_are_taken(trained: Trained, tmp_path: Path) -> None:
    run = trained(*FROZEN)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x")
    for output, message in (
        ("file", "is a file; give a folder"), ("folder", "is not empty; give a new folder"),
        ("no/where", "no folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_export(run, tmp_path / output)
    assert (tmp_path / "folder" / "mine").read_text() == "x"


def test_a_disk_without_room(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(
        UserError, match="bytes of model files are to be written, and the disk of --output has 100 free"
    ):
        run_export(trained(*FROZEN), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_that_changed_is_refused(trained: Trained, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    run = copy_of(trained(*LORA))
    described = json.loads((run / "model.json").read_text())
    described["frozen_weights"]["sha256"] = "0" * 64
    (run / "model.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="changed since the run was trained"):
        run_export(run, tmp_path / "out", "peft")


def test_tokenizer_terms_and_token_ids_come_along(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir(), folder.mkdir()
    kept = {"tokenizer.json", "tokenizer.model", "generation_config.json", "special_tokens_map.json", "LICENSE.txt"}
    for name in (*kept, "model.safetensors", "notes.md", "modeling_baichuan.py"):
        (source / name).write_text(name)
    fields = {"bos_token_id": 1, "eos_token_id": [2, 3], "hidden_size": 8, "pad_token_id": None}
    (source / "config.json").write_text(json.dumps(fields))
    assert copy_companions(source, folder) == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    assert {path.name for path in folder.iterdir()} == kept
    # Code beside the weights goes where config.json says that it is needed (Baichuan2).
    (source / "config.json").write_text(json.dumps({**fields, "auto_map": {"AutoConfig": "modeling_baichuan.C"}}))
    assert copy_companions(source, folder)["auto_map"] == {"AutoConfig": "modeling_baichuan.C"}
    assert (folder / "modeling_baichuan.py").is_file()
    (source / "modeling_baichuan.py").unlink()
    assert "auto_map" not in copy_companions(source, folder)


def test_where_a_llama_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--meta-llama--Llama-3.2-1B" / "snapshots" / commit
    assert Source.of(snapshot) == ("meta-llama/Llama-3.2-1B", commit)
    assert Source.of(tmp_path) == (str(tmp_path), None)
    assert started_from(parse([])) is None  # tiny starts at random
    assert started_from(parse(["--llama_size=1b", "--random_weights"])) is None
    assert started_from(parse([f"--weights={tmp_path}"])) == tmp_path
    assert started_from(parse([f"--weights={tmp_path / 'gone'}"])) is None
    cached: list[Any] = [str(snapshot / "config.json"), None]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: cached.pop(0))
    assert started_from(parse(["--llama_size=1b"])) == snapshot
    assert started_from(parse(["--llama_size=1b"])) is None
