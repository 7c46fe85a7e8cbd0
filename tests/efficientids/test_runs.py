"""Run folders: loading them back, refusing damaged ones, frozen weights by reference."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import efficientids
from core.llama_loader import LlamaLoader
from efficientids import checkpoints
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.errors import UserError
from efficientids.loading import open_run
from efficientids.runs import RunFolder
from efficientids.train import main
from tests.core.checkpoints import assert_same, tensors_of
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import FROZEN, LLAMA, NUM_ITEMS, best_step, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

Copy = Callable[[Path], Path]


def frozen_run(trained: Trained) -> Path:
    return trained(*FROZEN)


def params_of(run: str | Path, step: int | None = None) -> nnx.State:
    return efficientids.load_run(run, step)[1]


def test_the_folder_itself_a_step_and_a_checkpoint_are_loaded(trained: Trained) -> None:
    run = frozen_run(trained)
    at_2, at_4 = params_of(run, 2), params_of(run, 4)
    assert (at_2["items"]["table_NE"][...] != at_4["items"]["table_NE"][...]).any()
    assert_same(params_of(str(run / "2")), at_2)
    assert_same(params_of(f"{run}/checkpoints/2/"), at_2)
    assert_same(params_of(run), {2: at_2, 4: at_4}[best_step(run)])


def test_a_run_in_a_folder_with_a_number_for_a_name(trained: Trained, tmp_path: Path) -> None:
    run = Path(shutil.copytree(frozen_run(trained), tmp_path / "1000"))
    assert_same(params_of(run, 2), params_of(frozen_run(trained), 2))
    assert_same(params_of(run / "2"), params_of(run, 2))


def test_loaded_parameters_are_complete_and_recommend(trained: Trained) -> None:
    model, params, config = efficientids.load_run(frozen_run(trained))
    ids = jnp.array([[3, 4]])
    inputs: dict[str, Any] = dict(input_ids=jnp.zeros_like(ids), item_ids=ids, item_mask=jnp.ones_like(ids))
    outputs = jax.jit(lambda p: model.apply(p, **inputs, top_k=NUM_ITEMS, return_logits=True))(params)
    assert sorted(outputs["top_k_items"][0].tolist()) == list(range(1, NUM_ITEMS + 1))
    assert float(jnp.exp(outputs["logits"]).sum()) == pytest.approx(1, abs=1e-5)
    assert config.freeze_llama and config.num_steps == 4 and config.seq_len == 8


def test_a_run_finds_data_that_moved_with_it_or_is_named(
    trained: Trained, copy_of: Copy, tiny_data: Dataset, tmp_path: Path
) -> None:
    run = copy_of(frozen_run(trained))
    shutil.copytree(tiny_data.path, run / "data")
    description = json.loads((run / "model.json").read_text())
    assert description["dataset"]["path"] == str(Path(tiny_data.path).resolve())
    description["dataset"]["path"] = "data"  # as for a data set that the run made itself
    (run / "model.json").write_text(json.dumps(description))
    moved = open_run(run.rename(tmp_path / "moved"))
    assert moved.dataset().path == tmp_path / "moved" / "data"
    assert moved.dataset(Path(tiny_data.path)).path == tiny_data.path
    other = generate(1, num_users=20, num_items=NUM_ITEMS + 1, shortest=5, longest=12).write(tmp_path / "other")
    with pytest.raises(UserError, match="has other items than the data set of"):
        moved.dataset(Path(other.path))


def test_frozen_weights_are_referenced_and_not_saved(trained: Trained, weights: Path) -> None:
    frozen, full = frozen_run(trained), trained()

    def stored(run: Path) -> int:
        return sum(file.stat().st_size for file in (run / "checkpoints" / "4").rglob("*") if file.is_file())

    llama_bytes = sum(tensor.nbytes for tensor in tensors_of(LLAMA).values())
    # The full run also holds two moments of each of the Llama's parameters. (Files are compressed: numbers are rough.)
    assert stored(full) - stored(frozen) > 2 * llama_bytes
    described = json.loads((frozen / "model.json").read_text())["frozen_weights"]
    assert Path(described["path"]) == weights.resolve() and len(described["sha256"]) == 64
    assert json.loads((full / "model.json").read_text())["frozen_weights"] is None
    _, published, _ = LlamaLoader(path=weights).load_model()
    assert_same(nnx.State(params_of(frozen)["llama"]), published)
    assert (params_of(full)["llama"]["norm"]["scale"][...] != published["norm"]["scale"][...]).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "which is gone; put its weight files back"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights there.*put its weight files back"),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "changed since the run was trained"),
    ],
)
def test_frozen_weights_that_are_gone_or_changed_are_refused(
    trained: Trained, weights: Path, copy_of: Copy, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    run, moved = copy_of(frozen_run(trained)), Path(shutil.copytree(weights, tmp_path / "weights"))
    description = json.loads((run / "model.json").read_text())
    description["frozen_weights"]["path"] = str(moved)
    (run / "model.json").write_text(json.dumps(description))
    params_of(run)
    damage(moved)
    with pytest.raises(UserError, match=message):
        params_of(run)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.json", lambda text: text[:-20], r"model\.json cannot be read"),
        ("model.json", lambda text: "[]", r"model\.json holds list, expected a mapping"),
        ("model.json", lambda text: text.replace('"item_dim"', '"item_dims"'), r"model\.json: damaged.*item_dims"),
        ("model.json", lambda text: text.replace('"sha256"', '"sha1"'), r"model\.json: damaged.*sha256"),
        ("model.json", lambda text: text.replace('"items_sha256"', '"items"'), r"model\.json: damaged.*items_sha256"),
        ("model.json", lambda text: text.replace('"hidden_size": 16', '"hidden_size": -16'), "damaged.*hidden_size"),
        ("config.yaml", lambda text: text.replace("seq_len: 8", "seq_len: eight"), r"config\.yaml: seq_len: .*'eight'"),
        ("config.yaml", lambda text: text + "xyzzy: 1\n", r"config\.yaml: unknown key 'xyzzy'"),
        ("config.yaml", lambda text: "seed: [", r"config\.yaml cannot be read"),
    ],
)
def test_a_damaged_description_is_refused(
    trained: Trained, copy_of: Copy, name: str, change: Callable[[str], str], message: str
) -> None:
    run = copy_of(frozen_run(trained))
    text = (run / name).read_text()
    assert change(text) != text
    (run / name).write_text(change(text))
    with pytest.raises(UserError, match=message):
        params_of(run)


def test_what_is_no_run_or_has_no_such_step_is_refused(trained: Trained, copy_of: Copy, tmp_path: Path) -> None:
    run = frozen_run(trained)
    with pytest.raises(UserError, match=r"is not a run folder \(no such folder\)"):
        params_of(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a run folder \(it has no model\.json\)"):
        params_of(tmp_path)
    for missing in (lambda: params_of(run / "3"), lambda: params_of(run, 3)):
        with pytest.raises(UserError, match=r"has no step 3; it has 2, 4"):
            missing()
    empty = copy_of(run)
    shutil.rmtree(empty / "checkpoints")
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        params_of(empty)


def test_a_used_run_folder_is_refused_and_left_alone(trained: Trained, tiny_data: Dataset) -> None:
    run = trained(*FROZEN)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    with pytest.raises(UserError, match=r"already holds a run; .*--load_checkpoint"):
        main(flags(checkpoint_dir=run, data_dir=tiny_data.path, num_steps=1))
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run.starting():
        (run.path / "data").mkdir()
        (run.path / "data" / "items").write_text("made")
        run.metrics.write_text("{}")
        raise KeyboardInterrupt
    assert not run.path.exists()


def test_a_start_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(SystemExit) as error, run.starting():
        (run.path / "data").mkdir()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert error.value.code == 143 and not run.path.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bfloat16_base_becomes_float32_masters(trained: Trained, tmp_path: Path) -> None:
    """From the weight file it is read again, unrounded; from a checkpoint it is widened."""
    run = frozen_run(trained)
    config = open_run(run).config
    asked = {"float32": dataclasses.replace(config, freeze_llama=False), "bfloat16": config}
    asked = {precision: dataclasses.replace(c, precision=precision) for precision, c in asked.items()}
    wide, narrow = (open_run(run, like=asked[name]).params["llama"] for name in ("float32", "bfloat16"))
    assert narrow["embed_VD"][...].dtype == jnp.bfloat16
    assert (wide["embed_VD"][...] != narrow["embed_VD"][...]).any()
    saved: nnx.State = nnx.State({"llama": nnx.State(narrow)})
    with checkpoints.writer(tmp_path / "checkpoints") as writer:
        writer.save(1, saved, {"step": jnp.zeros(())}, {"ndcg@10": 0.0}, {})
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), saved)
    found = checkpoints.restore(tmp_path / "checkpoints", 1, target)
    assert_same(found, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), saved))
