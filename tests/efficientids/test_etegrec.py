"""ETEGRec from flags to recommendations: turns, what each trains, one version of codes, what is refused.

Legend: N items, L levels, B rows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.code_tables import largest_shape, verify
from core.semantic_ids import version_name
from core.sharding import MeshShape, make_mesh
from efficientids import systems
from efficientids.checkpoints import writer
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import evaluate
from efficientids.loading import load_run, open_run
from efficientids.options import TrainConfig
from efficientids.recommenders import etegrec, reindexing, shapes
from efficientids.recommenders.base import Cycle, Histories
from efficientids.recommenders.etegrec import ETEGRec, search
from efficientids.recommenders.etegrec_model import ETEGRecModel, ETEGRecSpec, code_table
from efficientids.systems.base import Scale
from efficientids.tokenizing import cli
from efficientids.train import main
from tests.efficientids.etegrec_parts import OF_MAKING, made
from tests.efficientids.tiny import ETEGREC_JOB as JOB
from tests.efficientids.tiny import NUM_ITEMS, events, flags

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def start(tiny_data: Dataset, quick_compile: None) -> tuple[ETEGRec, ETEGRecModel, TrainConfig]:
    return made(tiny_data)


@pytest.fixture(scope="module")
def run(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("etegrec") / "run"
    job = {
        **JOB,
        "num_steps": 6,
        "eval_every": 2,
        "recommender_epochs": 0.25,
        "tokenizer_epochs": 0.25,
        "finetune_epochs": 0.25,
    }
    given = flags(data_dir=tiny_data.path, checkpoint_dir=folder, log_every=1, learning_rate=1e-2, **job)
    assert main([*given, "--tokenizer_learning_rate=0.05", "--aligned_from=0.25"]) == 0
    yield folder


def test_a_run_takes_turns_and_ends_with_codes_alone(run: Path) -> None:
    steps = events(run, "step")
    turn = len([step for step in steps if step["phase"] == "tokenizer"]) // 3
    assert [step["phase"] for step in steps] == (["tokenizer"] * turn + ["recommender"] * turn) * 3 + [
        "finetune"
    ] * turn
    first, last = (
        next(s for s in order if s["phase"] == "recommender") for order in (steps, steps[::-1])
    )  # fmt: skip
    assert {"code1_loss", "code2_loss", "code3_loss", "code_loss", "sia_loss", "psa_loss"} <= first.keys()
    # Alignment counts from the second turn on.
    assert first["loss"] == pytest.approx(first["code_loss"], rel=1e-6)
    added = 1e-4 * last["sia_loss"] + 3e-4 * last["psa_loss"]
    assert last["loss"] - last["code_loss"] == pytest.approx(added, rel=1e-2)
    pretraining = events(run, "pretraining")
    assert [row["epoch"] for row in pretraining] == [1, 2] and len(pretraining[0]["perplexity"]) == 2
    indexed = events(run, "reindexed")
    assert [row["step"] for row in indexed] == [turn, 3 * turn, 5 * turn]
    for row in indexed:
        assert len(row["used"]) == len(row["perplexity"]) == len(row["collisions"]) == 2
        assert 0 <= row["changed"] <= 1 and row["largest_bucket"] >= 1 and not row["kept"]
    codes_alone = next(step for step in steps if step["phase"] == "finetune")
    assert "sia_loss" not in codes_alone


def test_histories_labels_trie_and_checkpoint_are_of_one_version(run: Path, tiny_data: Dataset) -> None:
    """In every checkpoint, and they are the tokenizer's codes of the items, though turns changed them."""
    versions = set()
    for step in events(run, "validation"):
        try:
            loaded = open_run(run, step["step"])
        except UserError:
            continue  # not among those that are kept
        model: Any = loaded.model
        verify(model.ids)
        codes_NL = np.asarray(model.tokenizer.codes(model.vectors_NI[...][1:]))
        np.testing.assert_array_equal(np.asarray(model.ids.codes_RL[...])[1 : NUM_ITEMS + 1, :2], codes_NL)
        versions.add(version_name(model.ids.version[...]))
    assert len(versions) > 1
    loaded = open_run(run)
    found = evaluate(loaded.recommender, loaded.model, tiny_data, "test", cutoffs=(5,)).metrics
    reported = events(run, "test")[0]
    assert found["hr@5"] == pytest.approx(reported["hr@5"])


def test_a_checkpoint_whose_trie_is_of_other_codes_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    loaded = open_run(run)
    codes = np.asarray(loaded.params["ids"]["codes_RL"][...]).copy()
    codes[[1, 2]] = codes[[2, 1]]
    mixed: Any = nnx.clone(loaded.model)
    mixed.ids.codes_RL[...] = codes
    with writer(copy / "checkpoints") as checkpoints:
        checkpoints.save(1000, nnx.state(mixed), {}, {"ndcg@10": 0.0}, {})
    with pytest.raises(UserError, match=r"checkpoints.1000: ids: .* its trie is of other codes.*--step"):
        open_run(copy, 1000)


def test_ids_of_another_version_are_refused(run: Path, tiny_data: Dataset, tmp_path: Path) -> None:
    """--semantic_ids beside a checkpoint that was trained on others."""

    other = tmp_path / "other"
    assert cli.main(flags(data_dir=tiny_data.path, output=other, levels="6,6", latent_dim=8, epochs=1, seed=5)) == 0
    job = {name: value for name, value in JOB.items() if name not in OF_MAKING}
    given = flags(data_dir=tiny_data.path, checkpoint_dir=tmp_path / "run", load_checkpoint=run, **job)
    with pytest.raises(UserError, match=r"are of version \w+, and the parameters of .* trained on codes of version"):
        main([*given, f"--semantic_ids={other}", "--num_steps=1"])


def test_turns_without_the_tokenizers(tiny_data: Dataset) -> None:
    """One run; but with tied tables items are indexed anew after every turn."""
    system, scale = systems.get("etegrec"), Scale.of(tiny_data)
    for tied, rounds in ((False, 1), (True, 2)):
        asked = TrainConfig(**{**JOB, "epochs": 2.0, "tokenizer_epochs": 0.0, "tie_to_tokenizer": tied})
        cycle, *_ = system.planned(system.resolve(asked, scale), scale).plan()
        assert isinstance(cycle, Cycle) and cycle.repeats == rounds
        assert [(phase.name, phase.on_end is not None) for phase in cycle.phases] == [("recommender", tied)]


def test_reindexing_keeps_every_shape(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    recommender, model, _ = start
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(jnp.array, state))
    assert copy.tokenizer is not None
    copy.tokenizer.quantizer.codebooks[0][...] = -copy.tokenizer.quantizer.codebooks[0][...]
    after: Any = recommender.reindex(copy).model
    verify(after.ids)
    assert jax.tree.map(jnp.shape, nnx.state(after)) == jax.tree.map(jnp.shape, state)
    assert (after.ids.version[...] != model.ids.version[...]).any()


def test_a_bucket_that_overflows_is_named(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    recommender, model, _ = start
    shape = dataclasses.replace(recommender.spec.table, level_sizes=(6, 6, 2))
    with pytest.raises(ValueError, match=r"3 items share the codes \[1, 1\], but the suffix level has 2 codes"):
        code_table(np.ones((3, 2), np.int32), shape)
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(jnp.array, state))
    copy.vectors_NI[...] = jnp.zeros_like(copy.vectors_NI[...])  # all alike
    version = version_name(copy.ids.version[...])
    small = ETEGRec(dataclasses.replace(recommender.spec, table=shape))
    kept: Any = small.reindex(copy)
    verify(kept.model.ids)
    assert version_name(kept.model.ids.version[...]) == version == kept.row["version"]
    assert kept.row["kept"] and kept.row["changed"] == 0 and kept.row["largest_bucket"] == NUM_ITEMS
    assert f"tokenize again with --suffix_size {NUM_ITEMS}" in kept.said and version in kept.said


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_goes_on_where_a_bucket_overflows(
    tied: bool, tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes stay those of before, of one version, and the warning says what to do."""
    monkeypatch.setattr(reindexing, "real_codes", lambda model, spec: np.ones((NUM_ITEMS, 2), np.int32))
    job = {**JOB, "suffix_size": 24, "num_steps": 1, "finetune_epochs": 0, "tokenizer_epochs": 0.1}
    given = flags(data_dir=tiny_data.path, checkpoint_dir=tmp_path / "run", recommender_epochs=0.1, **job)
    assert main([*given, *(["--tie_to_tokenizer"] if tied else [])]) == 0
    rows = events(tmp_path / "run", "reindexed")
    assert [row["phase"] for row in rows] == ["tokenizer"] + ["recommender"] * tied
    assert all(row["kept"] for row in rows) and len({row["version"] for row in rows}) == 1
    said = capsys.readouterr().out
    assert said.count("WARNING") == len(rows) and "--suffix_size 30 or more" in said
    model: Any = open_run(tmp_path / "run").model
    assert version_name(model.ids.version[...]) == rows[0]["version"]


def test_codes_that_were_spread_are_spread_again(tiny_data: Dataset, tmp_path: Path) -> None:
    """A tokenizer that has not moved gives the codes that it gave."""
    ids = tmp_path / "ids"
    asked = flags(data_dir=tiny_data.path, output=ids, levels="6,6", latent_dim=8, epochs=2, suffix_size=32)
    assert cli.main([*asked, "--sinkhorn"]) == 0
    recommender, model, _ = made(tiny_data, semantic_ids=ids)
    assert recommender.spec.sinkhorn and model.tokenizer is not None and model.vectors_NI is not None
    codes_NL = np.asarray(model.ids.codes_RL[...])[1 : NUM_ITEMS + 1, :2]
    assert (np.asarray(model.tokenizer.codes(model.vectors_NI[...][1:])) != codes_NL).any()
    found = recommender.reindex(model)
    assert found.row["changed"] == 0 and not found.row["kept"]
    old = recommender.spec.to_json()
    del old["sinkhorn"]
    assert not ETEGRecSpec.from_json(json.loads(json.dumps(old))).sinkhorn


def test_a_loaded_run_is_called_as_the_readme_says(run: Path) -> None:
    """Items where the mask says so, wherever they stand; the newest that the model looks at."""
    model, params, config = load_run(run)
    assert config.max_seq_len == 6
    ids = np.array([[3, 0, 5, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
    asked = functools.partial(model.apply, training=False, return_logits=True, top_k=4)
    out = jax.jit(asked)(params, input_ids=jnp.zeros_like(ids), item_ids=jnp.asarray(ids), item_mask=ids > 0)
    loaded = open_run(run)
    rows = np.array([[3, 5, 9, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
    wanted = loaded.recommender.recommend(loaded.model, Histories(rows, np.array([3, 8], np.int32)), 4, None)
    np.testing.assert_array_equal(out["top_k_items"], wanted.item_ids)
    np.testing.assert_allclose(out["top_k_scores"], wanted.scores, atol=1e-5)
    assert out["logits"].shape == (2, 6)
    zeros = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="row 0 has no items"):
        model.apply(params, input_ids=zeros, item_ids=zeros, item_mask=zeros)


def test_padding_gets_nothing_and_results_are_items(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    recommender, model, _ = start
    with pytest.raises(ValueError, match=r"row 0 has item id 0, which is padding, at place 0 of its 3 items"):
        recommender.recommend(model, Histories(np.array([[0, 1, 2]], np.int32), np.array([3], np.int32)), 4, None)
    histories = Histories(np.array([[1, 2, 3], [0, 0, 0]], np.int32), np.array([3, 0], np.int32), padding=1)
    found = recommender.recommend(model, histories, 4, np.array([[1, 2, 3], [0, 0, 0]], np.int32))
    assert (found.item_ids[1] == 0).all() and np.isneginf(found.scores[1]).all()
    with pytest.raises(ValueError, match=r"histories: row 1 has no items \(1 such rows\)"):
        recommender.recommend(model, histories._replace(padding=0), 4, None)
    assert len(set(found.item_ids[0])) == 4 and not {0, 1, 2, 3} & set(found.item_ids[0].tolist())


def test_a_new_catalogue_compiles_nothing(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    """A system of other items whose padded shapes are the same."""
    recommender, model, _ = start
    histories = Histories(np.array([[1, 2, 3]], np.int32), np.array([3], np.int32))
    recommender.recommend(model, histories, 4, None)
    compiled = search._cache_size()
    spec = dataclasses.replace(recommender.spec, num_items=27, table=largest_shape((6, 6, 32), 27))
    other = ETEGRec(spec, compute=recommender._compute, init=recommender._init)
    its_model = other.init(jax.random.key(1))
    codes_NL = np.random.default_rng(0).integers(0, 6, (27, 2))
    nnx.update(its_model.ids, nnx.state(code_table(codes_NL, spec.table)))
    found = other.recommend(its_model, histories, 4, None)
    assert found.item_ids.min() > 0 and found.item_ids.max() <= 27
    assert search._cache_size() == compiled > 0


def test_rows_that_do_not_fit_are_searched_in_parts(
    start: tuple[ETEGRec, ETEGRecModel, TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender, model, _ = start
    ids = np.arange(1, 22, dtype=np.int32).reshape(7, 3)
    histories = Histories(ids, np.full(7, 3, np.int32))
    whole = recommender.recommend(model, histories, 4, ids)
    a_row = model.search_bytes(1 + 6 * 3, 4)
    monkeypatch.setattr(shapes, "RANKING_BYTES", 2 * a_row)
    assert [shapes.rows_at_once(count, a_row, None) for count in (1, 2, 8)] == [1, 2, 2]
    assert shapes.rows_at_once(8, a_row, make_mesh(MeshShape(data=2))) == 4
    assert shapes.rows_at_once(8, 9 * a_row, make_mesh(MeshShape(data=2))) == 2  # never less than one a device
    sizes: list[int] = []

    def counted(graphdef: Any, state: Any, ids: Any, *rest: Any, **more: Any) -> Any:
        sizes.append(len(ids))
        return search(graphdef, state, ids, *rest, **more)

    monkeypatch.setattr(etegrec, "search", counted)
    parts = recommender.recommend(model, histories, 4, ids)
    assert sizes == [2, 2, 2, 2]
    np.testing.assert_array_equal(parts.item_ids, whole.item_ids)
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-5)
