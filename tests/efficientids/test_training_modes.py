"""Frozen, LoRA, full: which is chosen and why, what each trains and saves, and from one to another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.llama_loader import LlamaLoader
from core.lora import is_adapter, merged
from efficientids import systems
from efficientids.config import parse
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.loading import open_run
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Histories, in_base
from efficientids.systems.base import Scale
from efficientids.train import main
from tests.core.checkpoints import assert_same
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import FROZEN, SMALL_JOB, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

LORA = ("--lora_rank=4", "--lora_targets=q,v,down", "--lora_dropout=0.1")
QLORA = (*LORA, "--quantize=nf4")


def resolved(line: str) -> tuple[TrainConfig, str]:
    asked = parse(line.split())
    system = systems.get(asked.recommender)
    config = system.resolve(asked, Scale())
    return config, str(system.mode(asked, config))


@pytest.mark.parametrize(
    ("line", "mode", "why"),
    [
        ("", "full", "0.16 million parameters, fewer than 5 billion"),
        ("--llama_size 3b", "full", "3.2 billion"),
        ("--llama_size 7b", "lora", "6.7 billion"),
        ("--llama_size 7b --train full", "full", "--train full"),
        ("--llama_size 7b --freeze_llama", "frozen", "--freeze_llama"),
        ("--llama_size 1b --train frozen", "frozen", "--train frozen"),
        ("--llama_size 1b --lora_rank 8", "lora", "--lora_rank is given"),
        ("--llama_size 13b --quantize nf4", "lora", "13.0 billion"),
    ],
)
def test_what_trains_and_why(line: str, mode: str, why: str) -> None:
    config, text = resolved(line)
    assert config.train == mode and config.freeze_llama == (mode == "frozen")
    assert text.startswith(f"--train {mode}: ") and f"({why}" in text


def test_what_the_mode_decides() -> None:
    big, text = resolved("--llama_size 7b")
    assert (big.lora_rank, big.lora_alpha, big.lora_targets, big.lora_dropout) == (64, 128, "q,k,v,o", 0)
    assert (big.learning_rate, big.llama_learning_rate) == (5e-4, 2e-4)
    assert "LoRA on q,k,v,o, r 64, alpha 128" in text
    assert resolved("--lora_rank 8")[0].lora_alpha == 16
    assert resolved("--llama_size 1b")[0].llama_learning_rate == 5e-5
    assert resolved("--learning_rate 0.01")[0].llama_learning_rate == 0.01  # from scratch
    assert resolved("--llama_size 1b --freeze_llama")[0].llama_learning_rate is None
    assert resolved("--llama_size 1b --llama_learning_rate 3e-5")[0].llama_learning_rate == 3e-5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--freeze_llama --train lora", "--freeze_llama and --train lora exclude each other"),
        ("--freeze_llama --lora_rank 4", r"--lora_rank needs --train lora; .* frozen \(--freeze_llama\)"),
        ("--lora_targets q", r"--lora_targets needs --train lora; this run is --train full \(0.16 million"),
        ("--quantize nf4", "--quantize nf4: quantised weights cannot be trained"),
        ("--freeze_llama --llama_learning_rate 1e-4", "--llama_learning_rate 0.0001: nothing of a frozen Llama"),
        ("--lora_rank 4 --lora_targets q,z", "LoRA targets 'q,z': give some of q,k,v,o,gate,up,down"),
        ("--lora_rank 4 --lora_targets=", "LoRA targets '': give some of"),
        ("--lora_rank 0", "--lora_rank 0: must be above 0"),
        ("--lora_rank 4 --lora_dropout 1", r"--lora_dropout 1.0: must be in \[0, 1\)"),
        ("--recommender sasrec --lora_rank 4", "--lora_rank has no meaning with --recommender sasrec"),
    ],
)
def test_contradictions_are_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([*line.split(), f"--checkpoint_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize("given", [LORA, pytest.param(QLORA, marks=pytest.mark.slow)])
def test_a_lora_run_saves_adapters_and_no_base(
    trained: Trained, weights: Path, given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(*given)
    loaded = open_run(run, step=4)
    # The base is what the weight file holds; adapters have moved: B from zero.
    _, base, _ = LlamaLoader(path=weights).load_model(
        param_dtype=jnp.float32, quantize="nf4" if given is QLORA else None
    )
    assert_same(nnx.filter_state(loaded.params, in_base), nnx.State({"llama": base}))
    adapters = nnx.filter_state(loaded.params, is_adapter)
    assert len(jax.tree.leaves(adapters)) == 6
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(adapters))
    # By Orbax's own list: everything but the base.
    listed = json.loads((run / "checkpoints" / "4" / "params" / "_METADATA").read_text())["tree_metadata"].values()
    saved = {
        ".".join(key["key"] for key in entry["key_metadata"]): tuple(entry["value_metadata"]["write_shape"])
        for entry in listed
    }
    own = nnx.to_flat_state(nnx.filter_state(loaded.params, nnx.Not(in_base)))
    assert saved == {".".join(map(str, path)): leaf.shape for path, leaf in own}
    config = (run / "config.yaml").read_text()
    assert config.startswith("# --train lora: LoRA on q,v,down, r 4, alpha 8") and "--lora_rank is given" in config
    again = open_run(run, step=4)
    histories = Histories(np.array([[1, 2, 3], [4, 5, 0]], np.int32), np.array([3, 2], np.int32))
    one, other = (r.recommender.recommend(r.model, histories, 5, None) for r in (loaded, again))
    np.testing.assert_array_equal(one.item_ids, other.item_ids)


def test_the_mode_is_the_first_line_printed(
    tiny_data: Dataset, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(data_dir=tiny_data.path, weights=weights, checkpoint_dir=tmp_path / "run", **SMALL_JOB)
    assert main([*given, *LORA, "--num_steps=1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "--train lora: LoRA on q,v,down, r 4, alpha 8 (--lora_rank is given)" in first


def next_stage(run: Path, folder: Path, data: Dataset, weights: Path, *more: str) -> Any:
    """One step at a rate so small that what it started from shows."""
    job = {**SMALL_JOB, "num_steps": 1, "learning_rate": 1e-9, "llama_learning_rate": 1e-9}
    if "--train=frozen" in more:
        del job["llama_learning_rate"]
    given = flags(load_checkpoint=run, checkpoint_dir=folder, data_dir=data.path, weights=weights, **job)
    assert main([*given, *more]) == 0
    return open_run(folder)


def close(one: nnx.State, other: nnx.State) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_from_frozen_to_lora(trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path) -> None:
    start = open_run(trained(*FROZEN))
    after = next_stage(trained(*FROZEN), tmp_path / "run", tiny_data, weights, *LORA)
    close(nnx.filter_state(after.params, nnx.Not(is_adapter)), start.params)
    assert after.description["frozen_weights"] == start.description["frozen_weights"]
    assert len(jax.tree.leaves(nnx.filter_state(after.params, is_adapter))) == 6


@pytest.mark.parametrize("mode", ["full", pytest.param("frozen", marks=pytest.mark.slow)])
def test_from_lora_on_adapters_are_added_to_the_weights(
    trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path, mode: str
) -> None:
    start = open_run(trained(*LORA))
    after = next_stage(trained(*LORA), tmp_path / "run", tiny_data, weights, f"--train={mode}")
    close(after.params, merged(start.model))
    assert after.description["frozen_weights"] is None  # the weights are no longer the file's


def test_stages_that_cannot_follow_are_refused(
    trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path
) -> None:
    def refused(run: Path, message: str, *more: str) -> None:
        with pytest.raises(UserError, match=message):
            next_stage(run, tmp_path / "new", tiny_data, weights, *more)

    refused(trained(*LORA), r"model\.lora\.rank: 4 ≠ 8", "--lora_rank=8", *LORA[1:])
    refused(trained(), "--quantize nf4: the checkpoints of .* hold the Llama itself", *QLORA)


@pytest.mark.slow
def test_a_quantised_run_is_merged_from_its_weight_file(
    trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path
) -> None:
    """The next stage asks for no quantisation, so the base is read whole again and the adapters are added to that."""
    after = next_stage(trained(*QLORA), tmp_path / "run", tiny_data, weights, "--train=full")
    whole = open_run(trained(*QLORA), like=dataclasses.replace(after.config, train="lora"))
    close(after.params, merged(whole.model))
