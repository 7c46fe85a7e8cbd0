"""The main job end to end on tiny data: training in every form, its memory estimate, its command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import yaml
from flax import nnx

import efficientids
from core.functional import Buffer
from efficientids import loading, systems
from efficientids.config import parse
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.loading import open_run
from efficientids.planning.memory import abstract_program
from efficientids.recommenders.base import in_llama
from efficientids.systems.base import Scale
from efficientids.train import main
from efficientids.training.step import build_program
from tests.conftest import ROOT
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import FROZEN, LLAMA, NUM_ITEMS, SMALL_JOB, events, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

TWO_LEVEL = ("--head=two_level", "--output_tying=shared_mlp", "--gradient_accumulation=2")


def check_run(run: Path) -> nnx.State:
    """What every finished run has; its parameters."""
    assert [line["step"] for line in events(run, "validation")] == [2, 4]
    (last,) = events(run, "step")
    assert 0 < last["loss"] < math.inf and 0 < last["grad_norm"] < math.inf and last["items_per_s"] > 0
    (test,) = events(run, "test")
    assert 0 <= test["ndcg@10"] <= test["hr@10"] <= test["hr@20"] <= 1
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["num_steps"] == 4 and config["warmup_steps"] == 0 and config["precision"] == "float32"
    assert "jax" in json.loads((run / "environment.json").read_text())["versions"]
    params = efficientids.load_run(run, 4)[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    return params


def test_frozen_llama(trained: Trained) -> None:
    check_run(trained(*FROZEN))


def test_two_level_head_with_shared_mlp_and_accumulation(trained: Trained) -> None:
    params = check_run(trained(*TWO_LEVEL))
    clusters = params["clusters"]
    assert clusters["members_CM"][...].shape == (6, 5)
    assert sorted(clusters["members_CM"][...].ravel().tolist()) == list(range(1, NUM_ITEMS + 1))
    assert "output_adapter" not in params


def test_a_second_stage_keeps_the_clusters_of_the_first(
    trained: Trained, tiny_data: Dataset, weights: Path, tmp_path: Path
) -> None:
    earlier = open_run(trained(*TWO_LEVEL))
    # Another seed would cluster otherwise: the vectors belong to the clusters that they were trained with.
    config = dataclasses.replace(earlier.config, seed=5)
    system = systems.get("efficientids")
    adopted = loading.adopt(earlier, system.recommender(config, tiny_data, earlier), system, seed=0)
    members = adopted.clusters["members_CM"][...]
    assert (members == earlier.params["clusters"]["members_CM"][...]).all()
    np.save(tmp_path / "given.npy", np.arange(NUM_ITEMS) % 6)
    stage = flags(load_checkpoint=earlier.run.path, data_dir=tiny_data.path, weights=weights, **SMALL_JOB)
    with pytest.raises(UserError, match=r"is not the clustering that .* was trained with"):
        main([*stage, *flags(clustering=tmp_path / "given.npy", checkpoint_dir=tmp_path / "new"), *TWO_LEVEL])


def tokenizer(folder: Path, titles: list[str]) -> tokenizers.Tokenizer:
    """A word tokenizer for the Llama's vocabulary, written to `folder`."""
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = tokenizers.trainers.WordLevelTrainer(vocab_size=LLAMA.vocab_size, special_tokens=["<unk>", "<s>"])
    encoder.train_from_iterator(titles, special)
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return encoder


def test_titles_with_a_text_loss_given_clusters_and_low_rank_items(
    trained: Trained, tiny_data: Dataset, tmp_path: Path
) -> None:
    titles, given = tiny_data.items["title"].to_list(), np.arange(NUM_ITEMS) % 4
    encoder = tokenizer(tmp_path, titles)
    np.save(tmp_path / "given.npy", given)
    text = flags(item_text="title", text_loss_weight=0.5, title_tokens=3, tokenizer=tmp_path / "tokenizer.json")
    run = trained(*text, "--seq_len=20", "--item_rank=3", f"--clustering={tmp_path / 'given.npy'}")
    params = check_run(run)
    expected = [(encoder.encode(title).ids + [-1] * 3)[:3] for title in titles]
    assert params["titles_NK"][...].tolist() == [[-1] * 3, *expected]
    assert open_run(run).recommender.spec.bos == encoder.token_to_id("<s>")
    (line,) = events(run, "step")
    assert min(line["text_loss"], line["item_loss"]) < line["loss"] < max(line["text_loss"], line["item_loss"])
    assert params["clusters"]["cluster_of_item_N1"][...].tolist() == [-1, *given.tolist()]
    assert params["items"]["table_NE"][...].shape == (NUM_ITEMS + 1, 3)
    assert params["items"]["factor_RE"][...].shape == (3, 16)


def test_the_same_flags_give_the_same_run(trained: Trained) -> None:
    first, again, other = trained(*FROZEN), trained(*FROZEN, "--seed=0"), trained(*FROZEN, "--seed=1")
    kept = ("step", "loss", "grad_norm", "ndcg@10")
    rows = [[{k: line.get(k) for k in kept} for e in ("step", "validation") for line in events(run, e)]
            for run in (first, again, other)]  # fmt: skip
    assert rows[0] == rows[1] != rows[2]
    one, two = (jax.tree.leaves(efficientids.load_run(run, 4)[1]) for run in (first, again))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def estimated(capsys: pytest.CaptureFixture[str], *given: str) -> dict[str, Any]:
    assert main([*given, "--estimate_memory_only", "--plan_by=estimate", "--quick", "--json", "--device=b200"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert estimate["total"] == sum(estimate["parts"].values())
    estimate["exact"] = estimate["total"] - estimate["parts"].pop("activations, estimated")
    return estimate


def test_estimate_of_a_7b_llama_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    base, n, e, d = 6_738_415_616, 3417, 384, 4096
    items = n * e + n + (e * d + d) + (d * d + d) + (d * e + e)
    unread = 2 * 32_000 * d  # without text neither the embedding nor the head is read
    trained = base - unread + items
    full = estimated(capsys, "--llama_size=7b", "--train=full")
    assert full["parameters"] == base + items and full["trained_parameters"] == trained
    assert full["parts"] == {
        "Llama, trained": 4 * (base - unread), "Llama, frozen": 4 * unread, "LoRA": 0,
        "items, adapters, heads": 4 * items, "buffers": 0, "gradients": 4 * trained, "optimiser": 8 * trained + 16,
    }  # fmt: skip
    frozen = estimated(capsys, "--llama_size=7b", "--freeze_llama")
    assert frozen["parameters"] == base + items and frozen["trained_parameters"] == items
    assert frozen["exact"] == 2 * base + (4 + 4 + 8) * items + 8
    assert main(["--llama_size=7b", "--freeze_llama", "--estimate_memory_only", "--plan_by=estimate", "--quick"]) == 0
    assert f"{2 * base:,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("more", [TWO_LEVEL, FROZEN])
def test_estimate_equals_the_bytes_of_the_real_arrays(
    more: tuple[str, ...], trained: Trained, weights: Path, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = open_run(trained(*more))
    capsys.readouterr()
    given = (*more, *flags(weights=weights, data_dir=tiny_data.path, precision="float32", num_steps=4))
    parts = estimated(capsys, *given)["parts"]
    system, scale = systems.get("efficientids"), Scale(num_items=NUM_ITEMS)
    program = build_program(
        loaded.model, abstract_program(loaded.config, system, scale)[1], accumulation=1, grad_clip=1.0
    )

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    llama, rest = nnx.split_state(loaded.params, in_llama, ...)
    assert parts["Llama, trained"] + parts["Llama, frozen"] == size(llama)
    assert parts["Llama, frozen"] == size(nnx.filter_state(program.frozen, in_llama))
    assert parts["items, adapters, heads"] == size(nnx.filter_state(rest, nnx.Param))
    assert parts["buffers"] == size(nnx.filter_state(rest, Buffer)) == size(program.frozen) - parts["Llama, frozen"]
    assert parts["gradients"] == size(program.state.params)
    assert parts["optimiser"] == size(program.state.opt_states)


def test_estimate_with_given_clusters(tmp_path: Path, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "given.npy", np.minimum(np.arange(NUM_ITEMS), 2))  # sizes 1, 1 and 28
    given = flags(data_dir=tiny_data.path, clustering=tmp_path / "given.npy")
    # int32: cluster and slot of 31 ids, 3 × 28 members, 3 sizes.
    assert estimated(capsys, *given)["parts"]["buffers"] == 4 * (2 * (NUM_ITEMS + 1) + 3 * 28 + 3)


def test_the_command_line_says_nothing_of_devices_that_are_not_there(
    trained: Trained, tiny_data: Dataset, weights: Path, programs: Path, tmp_path: Path
) -> None:
    """The CUDA plugin is installed to compile for GPUs; a machine without one must hear nothing of it."""
    trained(*FROZEN)  # its programs are then compiled
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(programs)}
    job = flags(data_dir=tiny_data.path, weights=weights, checkpoint_dir=tmp_path / "run", **SMALL_JOB)
    command = [sys.executable, str(ROOT / "train_llama.py"), *job, *FROZEN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in ("pretrained, float32", "best checkpoint: step ", "best possible on these users"):
        assert words in done.stdout
    assert done.stdout.count("\nuser user-") == 3
    for word in ("cuda", "plugin", "traceback", "warning"):
        assert word not in done.stderr.lower(), done.stderr
    assert parse(["--config", str(tmp_path / "run" / "config.yaml")]).num_steps == SMALL_JOB["num_steps"]


@pytest.mark.slow
def test_packed_sequences_with_titles(trained: Trained, tiny_data: Dataset, tmp_path: Path) -> None:
    """Fewer rows than users: the packed batch asks for several histories a row, and trains as any other."""
    tokenizer(tmp_path, tiny_data.items["title"].to_list())
    text = flags(item_text="title", title_tokens=2, tokenizer=tmp_path / "tokenizer.json", seq_len=64, max_seq_len=8)
    run = trained(*text, "--pack_sequences", "--batch_size=4")
    check_run(run)
    config = open_run(run).config
    assert config.pack_sequences and config.length_buckets == 1
    system = systems.get("efficientids")
    (phase,) = system.recommender(config, tiny_data, None).plan()
    batch = next(phase.batches(0, 0))
    assert {name: array.shape for name, array in batch.items()} == {
        name: spec.shape for name, spec in phase.batch_specs[0].items()
    }
    assert batch["segments"].max(axis=1).sum() > 4  # more users than rows
