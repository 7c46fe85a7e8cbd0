"""ETEGRec from flags to recommendations: turns, what each trains, one version of codes, what is refused.

Legend: N items, L levels, B rows.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from core.alignment import first_occurrences
from core.code_tables import verify
from core.semantic_ids import version_name
from core.sharding import MeshShape, make_mesh
from efficientids import systems
from efficientids.checkpoints import writer
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.evaluate import evaluate
from efficientids.loading import load_run, open_run
from efficientids.options import TrainConfig
from efficientids.recommenders import reindexing
from efficientids.recommenders.base import Cycle, Histories, turns
from efficientids.recommenders.etegrec import ETEGRec
from efficientids.recommenders.etegrec_model import ETEGRecModel, ETEGRecSpec, code_table
from efficientids.systems.base import Scale
from efficientids.tokenizing import cli
from efficientids.train import main
from efficientids.training.gradient_check import FROZEN, NOT_READ, as_text, check_gradients
from efficientids.training.step import build_program
from tests.efficientids.tiny import ETEGREC_JOB as JOB
from tests.efficientids.tiny import NUM_ITEMS, events, flags

pytestmark = pytest.mark.usefixtures("quick_compile")


# Flags of a tokenizer to be made: refused where there is one.
OF_MAKING = ("levels", "suffix_size", "pretrain_epochs")


def made(dataset: Dataset, **more: Any) -> tuple[ETEGRec, ETEGRecModel, TrainConfig]:
    """The recommender of a job and its model at the start."""
    system = systems.get("etegrec")
    job = {name: value for name, value in JOB.items() if "semantic_ids" not in more or name not in OF_MAKING}
    config = system.resolve(TrainConfig(**{**job, "epochs": 2.0, **more}), Scale.of(dataset))
    recommender = system.recommender(config, dataset, None)
    model = system.start(recommender, config)
    assert isinstance(recommender, ETEGRec) and isinstance(model, ETEGRecModel)
    return recommender, model, config


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


def parts_of(phase_name: str, recommender: ETEGRec, model: ETEGRecModel) -> tuple[Any, Any]:
    """One step of a phase at its start: the model's flat state before and after."""
    ((phase, repeats),) = [turn for turn in turns(recommender.plan()) if turn[0].name == phase_name]
    program = build_program(model, phase, accumulation=1, grad_clip=1.0, donate=False, repeats=repeats)
    batch = {name: value for name, value in next(phase.batches(0, 0)).items() if name in phase.batch_specs[0]}
    state, _ = program.step(program.state, program.frozen, batch, jax.random.key(0))
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, program.model(state)))
    return before, after


def changed(before: Any, after: Any) -> set[str]:
    names = set()
    for path, leaf in before.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and bool((leaf[...] != after[path][...]).any()):
            names.add(str(path[0]))
    return names


def test_each_phase_trains_its_own(start: tuple[ETEGRec, ETEGRecModel, TrainConfig], tiny_data: Dataset) -> None:
    recommender, model, _ = start
    assert changed(*parts_of("tokenizer", recommender, model)) == {"tokenizer"}
    own = {"llama", "tables", "soft_embedding", "codebook_logits", "begin_D"}
    aligned, aligned_model, _ = made(tiny_data, aligned_from=0.0)
    assert changed(*parts_of("recommender", aligned, aligned_model)) == own | {"enc_adapter", "dec_adapter"}
    assert changed(*parts_of("finetune", recommender, model)) == own


@pytest.mark.slow
def test_tables_start_as_the_codebooks_or_are_them(
    start: tuple[ETEGRec, ETEGRecModel, TrainConfig], tiny_data: Dataset
) -> None:
    _, model, _ = start
    assert model.tokenizer is not None
    for table, codebook in zip(model.tables, model.tokenizer.quantizer.codebooks, strict=False):
        np.testing.assert_array_equal(table[...], codebook[...])
        assert table is not codebook
    recommender, tied, _ = made(tiny_data, tie_to_tokenizer=True)
    assert tied.tokenizer is not None
    assert tied.tables[0] is tied.tokenizer.quantizer.codebooks[0] and len(tied.tables) == 3
    before, after = parts_of("recommender", recommender, tied)
    assert "tables" in changed(before, after) and "tokenizer" not in changed(before, after)
    (cycle,) = (part for part in recommender.plan() if isinstance(part, Cycle))
    assert all(phase.on_end is not None for phase in cycle.phases)  # whatever moves codebooks indexes anew
    assert "tables" not in changed(*parts_of("finetune", recommender, tied)) or _suffix_alone(recommender, tied)


def _suffix_alone(recommender: ETEGRec, model: ETEGRecModel) -> bool:
    before, after = parts_of("finetune", recommender, model)
    moved = [path for path in before if path[0] == "tables" and (before[path][...] != after[path][...]).any()]
    return [path[1] for path in moved] == [2]


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


def test_losses_against_plain_loops(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    """The code loss of a batch, item by item: all that have something before them, or the last alone."""
    recommender, model, _ = start
    batch = {"item_ids": np.array([[3, 5, 9, 2], [7, 1, 0, 0]], np.int32), "lengths": np.array([4, 2], np.int32)}
    (phase, _), *_ = [turn for turn in turns(recommender.plan()) if turn[0].name == "recommender"]
    found = phase.loss(model, batch, jax.random.key(0), jnp.int32(0))
    total, count = 0.0, 0
    for ids, length in zip(batch["item_ids"], batch["lengths"], strict=True):
        sequence = recommender.sequence(model, jnp.asarray(ids[None, :length]), jnp.array([length]), with_target=True)
        hidden_TD = model.hidden(sequence)[0]
        for item in range(1, length):
            codes_L = np.asarray(model.ids.codes_RL[...])[ids[item]]
            for level, code in enumerate(codes_L):
                # One begin vector, then the items before, then the codes before.
                log_p_K = jax.nn.log_softmax(model.logits(hidden_TD[item * len(codes_L) + level], level))
                total -= float(log_p_K[code])
                count += 1
    assert float(found.weight) == count == 12 and float(found.items) == 4
    assert float(found.total) == pytest.approx(total, rel=1e-5)
    last = ETEGRec(
        recommender.spec, training=recommender._training,
        turns=dataclasses.replace(recommender._turns, targets="last"),
    )  # fmt: skip
    (phase, _), *_ = [turn for turn in turns(last.plan()) if turn[0].name == "recommender"]
    assert float(phase.loss(model, batch, jax.random.key(0), jnp.int32(0)).weight) == 6


def test_a_target_that_stands_twice_counts_once(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    recommender, model, _ = start
    ((phase, _),) = [turn for turn in turns(recommender.plan()) if turn[0].name == "tokenizer"]
    rows = {"item_ids": np.array([[3, 5], [7, 5], [2, 9]], np.int32), "lengths": np.full(3, 2, np.int32)}
    found = phase.loss(model, rows, jax.random.key(0), jnp.int32(0))
    assert float(found.weight) == 2
    np.testing.assert_array_equal(first_occurrences(jnp.array([5, 5, 9])), [True, False, True])


@pytest.mark.slow
def test_gradients_by_part(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    """Every part that a phase trains gets some; what is frozen is said to be."""
    recommender, model, _ = start
    parts = {(part.phase, part.path): part for part in check_gradients(recommender, model, 0)}
    for path in ("tokenizer.encoder.layers.0", "tokenizer.quantizer.codebooks.0", "tokenizer.decoder.layers.0"):
        assert (parts["tokenizer", path].norm or 0) > 0 and parts["recommender", path].reason == FROZEN
    for path in ("soft_embedding.scid_projector", "codebook_logits.output_projector", "enc_adapter", "dec_adapter"):
        assert (parts["recommender", path].norm or 0) > 0, path
    assert parts["finetune", "enc_adapter"].reason == FROZEN
    assert not [part for part in parts.values() if part.reason == NOT_READ]


def test_a_loaded_run_is_called_as_the_readme_says(run: Path) -> None:
    """Items where the mask says so, wherever they stand; the newest that the model looks at."""
    model, params, config = load_run(run)
    assert config.max_seq_len == 6
    ids = np.array([[3, 0, 5, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
    out = model.apply(
        params, input_ids=jnp.zeros_like(ids), item_ids=jnp.asarray(ids), item_mask=jnp.asarray(ids > 0),
        training=False, return_logits=True, top_k=4,
    )  # fmt: skip
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
    histories = Histories(np.array([[1, 2, 3], [0, 0, 0]], np.int32), np.array([3, 0], np.int32), padding=1)
    found = recommender.recommend(model, histories, 4, np.array([[1, 2, 3], [0, 0, 0]], np.int32))
    assert (found.item_ids[1] == 0).all() and np.isneginf(found.scores[1]).all()
    with pytest.raises(ValueError, match=r"histories: row 1 has no items \(1 such rows\)"):
        recommender.recommend(model, histories._replace(padding=0), 4, None)
    assert len(set(found.item_ids[0])) == 4 and not {0, 1, 2, 3} & set(found.item_ids[0].tolist())


def test_gradients_that_a_weight_of_zero_takes_away(tiny_data: Dataset) -> None:
    """Each codebook has a line of its own, frozen or not, and an adapter without a loss says which flag that is."""
    recommender, model, _ = made(tiny_data, aligned_from=0.0, kl_loss=0.0, finetune_epochs=0.0)
    recommender_alone = dataclasses.replace(recommender._turns, tokenizer_steps=0)  # one phase compiles faster
    recommender._turns = recommender_alone
    text = as_text(check_gradients(recommender, model, 0))
    (line,) = (line for line in text.splitlines() if "enc_adapter" in line)
    assert line.endswith("zero: --kl_loss 0")
    for level in range(2):
        (line,) = (line for line in text.splitlines() if f"tokenizer.quantizer.codebooks.{level} " in line)
        assert FROZEN in line


@pytest.mark.parametrize("phase_name", [pytest.param("tokenizer", marks=pytest.mark.slow), "recommender"])
def test_a_step_on_a_mesh_is_that_of_one_device(phase_name: str, tiny_data: Dataset) -> None:
    """Both alignments are on: the negatives of one row are those of every device."""
    recommender, model, _ = made(tiny_data, aligned_from=0.0, kl_loss=0.01, dec_cl_loss=0.1)
    ((phase, _),) = [turn for turn in turns(recommender.plan()) if turn[0].name == phase_name]
    batch = {name: value for name, value in next(phase.batches(0, 0)).items() if name in phase.batch_specs[0]}
    found = []
    for mesh in (None, make_mesh(MeshShape(data=2, fsdp=2))):
        program = build_program(model, phase, accumulation=1, grad_clip=1.0, donate=False, mesh=mesh)
        key = program.key(0, 0)
        state, metrics = program.step(program.state, program.frozen, program.on_devices(batch), key)
        moments = [optax.tree.get(group, "mu") for group in state.opt_states]
        found.append(jax.tree.map(np.asarray, (metrics, moments)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * max(float(np.abs(one).max()), 1e-6))
    assert {"sia_loss", "psa_loss"} <= found[0][0].keys()
