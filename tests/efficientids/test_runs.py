"""Run folders: loading them back, refusing damaged ones, frozen weights by reference, starting from an earlier run."""

from __future__ import annotations

import dataclasses
import json
import shutil
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
from efficientids.train import main
from tests.core.checkpoints import assert_same, tensors_of, write
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import LLAMA, NUM_ITEMS, SMALL_JOB, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

Copy = Callable[[Path], Path]


def frozen_run(trained: Trained) -> Path:
    return trained("--freeze_llama")


def best_step(run: Path) -> int:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["event"] == "validation"]
    # Of equals Orbax takes the later one.
    return max(validations, key=lambda line: (line["ndcg@10"], line["step"]))["step"]


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
    run = trained("--freeze_llama")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    with pytest.raises(UserError, match=r"already holds a run; .*--load_checkpoint"):
        main(flags(checkpoint_dir=run, data_dir=tiny_data.path, num_steps=1))
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def second_stage(run: str, folder: Path, data: Dataset, weights: Path, *more: str) -> Path:
    job = {**SMALL_JOB, "num_steps": 1, "learning_rate": 1e-5, "batch_size": 16}
    given = flags(load_checkpoint=run, checkpoint_dir=folder, data_dir=data.path, weights=weights, **job)
    assert main([*given, *more]) == 0
    return folder


@pytest.mark.parametrize("form", ["{run}", "{run}/2", "{run}/checkpoints/2"])
def test_two_stages_frozen_then_full(
    form: str, trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path
) -> None:
    first = frozen_run(trained)
    named = form.format(run=first)
    # One step (so at the end of the schedule, a tenth of 1e-5): what it started from shows.
    second = second_stage(named, tmp_path / "stage2", tiny_data, weights)
    start, loaded = open_run(named), open_run(second)
    assert start.step == (best_step(first) if form == "{run}" else 2)
    assert loaded.step == 1 and loaded.description["frozen_weights"] is None
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), start.params, loaded.params)
    moved = {path: float(value[...]) for path, value in nnx.to_flat_state(differences)}
    assert max(moved.values()) < 3e-6
    # Adam's first step has the rate's size wherever there is a gradient, in the Llama too: the optimiser is fresh.
    assert moved["llama", "norm", "scale"] == pytest.approx(1e-6, rel=0.2)
    assert moved["items", "table_NE"] == pytest.approx(1e-6, rel=0.2)


def test_a_bfloat16_base_becomes_float32_masters(trained: Trained, tmp_path: Path) -> None:
    """From the weight file it is read again, unrounded; from a checkpoint it is widened."""
    run = frozen_run(trained)
    wide, narrow = (open_run(run, llama_dtype=dtype).params["llama"] for dtype in (jnp.float32, jnp.bfloat16))
    assert narrow["embed_VD"][...].dtype == jnp.bfloat16
    assert (wide["embed_VD"][...] != narrow["embed_VD"][...]).any()
    saved = nnx.State({"llama": nnx.State(narrow)})
    with checkpoints.writer(tmp_path / "checkpoints") as writer:
        writer.save(1, saved, {"step": jnp.zeros(())}, {"ndcg@10": 0.0}, {})
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), saved)
    found = checkpoints.restore(tmp_path / "checkpoints", 1, target)
    assert_same(found, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), saved))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--head=two_level"], r"another model.*\n  model\.head: full ≠ two_level\n  num_clusters: 0 ≠ 6"),
        (["--item_dim=4"], r"model\.item_dim: 16 ≠ 4"),
        (["--item_rank=2"], r"model\.item_rank: None ≠ 2"),
        (["--output_tying=shared_mlp"], r"model\.output_tying: adapter ≠ shared_mlp"),
    ],
)
def test_an_earlier_run_of_another_model_is_refused(
    trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        second_stage(str(frozen_run(trained)), tmp_path / "new", tiny_data, weights, *more)


def test_an_earlier_run_with_another_llama_is_refused(trained: Trained, tiny_data: Dataset, tmp_path: Path) -> None:
    wider = dataclasses.replace(LLAMA, intermediate_size=32)
    other = write(tmp_path / "llama", wider, tensors_of(wider))
    with pytest.raises(UserError, match=r"model\.llama\.intermediate_size: 24 ≠ 32"):
        second_stage(str(frozen_run(trained)), tmp_path / "new", tiny_data, other)


def test_another_catalogue_is_refused(trained: Trained, weights: Path, tmp_path: Path) -> None:
    other = generate(1, num_users=20, num_items=NUM_ITEMS, shortest=5, longest=12).write(tmp_path / "data")
    with pytest.raises(UserError, match="another item table"):
        second_stage(str(frozen_run(trained)), tmp_path / "new", other, weights)
