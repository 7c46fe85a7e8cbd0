"""The main job end to end on tiny data: train in every form, evaluate, recommend, estimate memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest
import tokenizers
import yaml
from flax import nnx

import efficientids
from core.functional import Buffer
from efficientids.config import parse
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation import cli as evaluate_cli
from efficientids.loading import open_run
from efficientids.planning.memory import abstract_program
from efficientids.recommenders.base import in_llama
from efficientids.serving import cli as recommend_cli
from efficientids.train import main
from efficientids.training.step import build_program
from tests.conftest import ROOT
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import LLAMA, NUM_ITEMS, NUM_USERS, SMALL_JOB, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

FROZEN = ("--freeze_llama",)
TWO_LEVEL = ("--head=two_level", "--output_tying=shared_mlp", "--gradient_accumulation=2")


def events(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


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


def test_frozen_llama(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(*FROZEN)
    check_run(run)
    printed = capsys.readouterr().out
    assert "pretrained, frozen, float32" in printed
    assert "best possible on these users" in printed
    assert printed.count("\nuser user-") == 3


def test_two_level_head_with_shared_mlp_and_accumulation(trained: Trained) -> None:
    params = check_run(trained(*TWO_LEVEL))
    clusters = params["clusters"]
    assert clusters["members_CM"][...].shape == (6, 5)
    assert sorted(clusters["members_CM"][...].ravel().tolist()) == list(range(1, NUM_ITEMS + 1))
    assert "output_adapter" not in params


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
    assert open_run(run).system.spec.bos == encoder.token_to_id("<s>")
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


def evaluated(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate_cli.main(["--run", str(run), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_command(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(*FROZEN)
    result = evaluated(run, capsys)
    assert {name: events(run, "test")[0][name] for name in result["metrics"]} == pytest.approx(result["metrics"])
    assert result["users"] == NUM_USERS and result["dataset"] == "generated-0" and result["run"] == str(run)
    protocol = {"split": "leave-one-out, test", "seen": "mask", "unit": "fractions", "ties": "against the model"}
    assert protocol.items() <= result["protocol"].items()
    assert 0 < result["best_possible"]["hr@10"] <= 1
    kept = evaluated(run, capsys, "--seen", "keep", "--batch_size", "16")
    assert kept["metrics"] != result["metrics"] and kept["protocol"]["seen"] == "keep"
    for line in events(run, "validation"):
        found = evaluated(run, capsys, "--split", "validation", "--step", str(line["step"]))
        assert found["metrics"]["ndcg@10"] == pytest.approx(line["ndcg@10"])
    assert evaluate_cli.main(["--run", str(run / "2")]) == 0
    assert "leave-one-out, test: 60 users; ranked over the full catalogue, 30 items" in capsys.readouterr().out


def recommended(run: Path, output: Path, *more: str) -> pl.DataFrame:
    assert recommend_cli.main(["--run", str(run), "--output", str(output), *more]) == 0
    return pl.read_parquet(output)


def test_recommend_command(trained: Trained, tiny_data: Dataset, tmp_path: Path) -> None:
    run, users = trained(*FROZEN), tmp_path / "users.txt"
    wanted = ["user-0031", "user-0002", "user-0060"]
    users.write_text("\n".join(wanted) + "\n")
    table = recommended(run, tmp_path / "recs.parquet", "--users", str(users), "--k", "4")
    assert table.columns == ["user_id", "rank", "item_id", "title", "score"]
    assert table["user_id"].to_list() == [user for user in wanted for _ in range(4)]
    assert table["rank"].to_list() == [1, 2, 3, 4] * 3
    titles = dict(tiny_data.items.select("item_id", "title").iter_rows())
    assert table["title"].to_list() == [titles[item] for item in table["item_id"]]
    for user in wanted:
        rows = table.filter(pl.col("user_id") == user)
        assert rows["score"].is_sorted(descending=True) and (rows["score"] < 0).all()
        seen = tiny_data.history(tiny_data.users["user_id"].to_list().index(user), "all")
        assert not set(rows["item_id"]) & {f"film-{item:04d}" for item in seen}


def test_recommend_for_all_with_fewer_items_left_than_asked_for(
    trained: Trained, tiny_data: Dataset, tmp_path: Path
) -> None:
    table = recommended(trained(*FROZEN), tmp_path / "all.parquet", "--k", str(NUM_ITEMS), "--batch_size", "32")
    left = NUM_ITEMS - np.diff(tiny_data.offsets)  # nothing is watched twice
    counts = table.group_by("user_id", maintain_order=True).len()
    assert counts["user_id"].to_list() == tiny_data.users["user_id"].to_list()
    assert counts["len"].to_list() == left.tolist()
    whole = recommended(trained(*FROZEN), tmp_path / "seen.parquet", "--k", str(NUM_ITEMS), "--seen", "keep")
    assert len(whole) == NUM_USERS * NUM_ITEMS
    # All items of a user: their probabilities sum to one.
    sums = whole.group_by("user_id").agg(pl.col("score").exp().sum())["score"].to_numpy()
    np.testing.assert_allclose(sums, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("users", "more", "message"),
    [
        ("user-0001\nnobody\nno-one\n", [], r"2 ids are not in .*, first nobody, no-one"),
        ("user-0001\nuser-0001\n", [], "user-0001 stands there more than once"),
        ("\n", [], "the file names no user"),
        (None, [], "expected `all` or a file"),
        ("user-0001\n", ["--k", "0"], "--k 0"),
        ("user-0001\n", ["--k", "31"], "the catalogue has 30 items"),
        ("user-0001\n", ["--output", "{here}/none/recs.parquet"], "no folder"),
        ("user-0001\n", ["--output", "{here}/users.txt"], r"exists; give another file, or --overwrite"),
    ],
)
def test_recommend_refuses(trained: Trained, tmp_path: Path, users: str | None, more: list[str], message: str) -> None:
    file = tmp_path / "users.txt"
    if users is not None:
        file.write_text(users)
    given = [word.format(here=tmp_path) for word in more]
    with pytest.raises(UserError, match=message):
        recommended(trained(*FROZEN), tmp_path / "recs.parquet", "--users", str(file), *given)
    assert not (tmp_path / "recs.parquet").exists()


def estimated(capsys: pytest.CaptureFixture[str], *given: str) -> dict[str, Any]:
    assert main([*given, "--estimate_memory_only", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_estimate_of_a_7b_llama_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    base, n, e, d = 6_738_415_616, 3417, 384, 4096
    items = n * e + n + (e * d + d) + (d * d + d) + (d * e + e)
    unread = 2 * 32_000 * d  # without text neither the embedding nor the head is read
    trained = base - unread + items
    full = estimated(capsys, "--llama_size=7b")
    assert full["parameters"] == base + items and full["trained_parameters"] == trained
    assert full["parts"] == {
        "Llama, trained": 4 * (base - unread), "Llama, frozen": 4 * unread, "items, adapters, heads": 4 * items,
        "buffers": 0, "gradients": 4 * trained, "optimiser": 8 * trained + 8,
    }  # fmt: skip
    frozen = estimated(capsys, "--llama_size=7b", "--freeze_llama")
    assert frozen["parameters"] == base + items and frozen["trained_parameters"] == items
    assert frozen["total"] == 2 * base + (4 + 4 + 8) * items + 8
    assert main(["--llama_size=7b", "--freeze_llama", "--estimate_memory_only"]) == 0
    assert f"{2 * base:,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("more", [TWO_LEVEL, FROZEN])
def test_estimate_equals_the_bytes_of_the_real_arrays(
    more: tuple[str, ...], trained: Trained, weights: Path, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = open_run(trained(*more))
    capsys.readouterr()
    given = (*more, *flags(weights=weights, data_dir=tiny_data.path, precision="float32", num_steps=4))
    parts = estimated(capsys, *given)["parts"]
    program = build_program(
        loaded.model, abstract_program(loaded.config, LLAMA, NUM_ITEMS)[1], accumulation=1, grad_clip=1.0
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
    assert "best checkpoint: step " in done.stdout
    for word in ("cuda", "plugin", "traceback", "warning"):
        assert word not in done.stderr.lower(), done.stderr
    assert parse(["--config", str(tmp_path / "run" / "config.yaml")]).num_steps == SMALL_JOB["num_steps"]
