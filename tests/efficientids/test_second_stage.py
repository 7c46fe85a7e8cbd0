"""Starting from an earlier run: the two-stage recipe, and earlier runs that cannot be taken over."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.errors import UserError
from efficientids.loading import open_run
from efficientids.train import main
from tests.core.checkpoints import tensors_of, write
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import FROZEN, LLAMA, NUM_ITEMS, SMALL_JOB, best_step, flags

pytestmark = pytest.mark.usefixtures("quick_compile")


def second_stage(run: str, folder: Path, data: Dataset, weights: Path, *more: str) -> Path:
    job = {**SMALL_JOB, "num_steps": 1, "learning_rate": 1e-5, "llama_learning_rate": 1e-5, "batch_size": 16}
    given = flags(load_checkpoint=run, checkpoint_dir=folder, data_dir=data.path, weights=weights, **job)
    assert main([*given, *more]) == 0
    return folder


@pytest.mark.parametrize(
    "form", ["{run}/2", *(pytest.param(form, marks=pytest.mark.slow) for form in ("{run}", "{run}/checkpoints/2"))]
)
def test_two_stages_frozen_then_full(
    form: str, trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path
) -> None:
    first = trained(*FROZEN)
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
        second_stage(str(trained(*FROZEN)), tmp_path / "new", tiny_data, weights, *more)


def test_an_earlier_run_with_another_llama_is_refused(trained: Trained, tiny_data: Dataset, tmp_path: Path) -> None:
    wider = dataclasses.replace(LLAMA, intermediate_size=32)
    other = write(tmp_path / "llama", wider, tensors_of(wider))
    with pytest.raises(UserError, match=r"model\.llama\.intermediate_size: 24 ≠ 32"):
        second_stage(str(trained(*FROZEN)), tmp_path / "new", tiny_data, other)


def test_another_catalogue_is_refused(trained: Trained, weights: Path, tmp_path: Path) -> None:
    other = generate(1, num_users=20, num_items=NUM_ITEMS + 1, shortest=5, longest=12).write(tmp_path / "data")
    with pytest.raises(UserError, match="has other items than the data set of"):
        second_stage(str(trained(*FROZEN)), tmp_path / "new", other, weights)
