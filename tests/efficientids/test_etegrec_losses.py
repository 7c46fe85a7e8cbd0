"""What ETEGRec's phases train and minimise, against plain loops; the check of its gradients.

Legend: N items, L levels, B rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from core.alignment import first_occurrences
from core.sharding import MeshShape, make_mesh
from efficientids.data.dataset import Dataset
from efficientids.options import TrainConfig
from efficientids.recommenders.base import Cycle
from efficientids.recommenders.etegrec import ETEGRec
from efficientids.recommenders.etegrec_model import ETEGRecModel
from efficientids.train import main
from efficientids.training.gradient_check import FROZEN, NOT_READ, as_text, check_gradients
from efficientids.training.step import build_program
from tests.efficientids.etegrec_parts import made, phase_of, with_turns
from tests.efficientids.test_trainer import OPTIONS
from tests.efficientids.tiny import ETEGREC_JOB as JOB
from tests.efficientids.tiny import flags

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def start(tiny_data: Dataset, quick_compile: None) -> tuple[ETEGRec, ETEGRecModel, TrainConfig]:
    return made(tiny_data)


def parts_of(phase_name: str, recommender: ETEGRec, model: ETEGRecModel) -> tuple[Any, Any]:
    """One step of a phase at its start: the model's flat state before and after."""
    phase, repeats = phase_of(recommender, phase_name)
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


def test_each_phase_trains_its_own(tiny_data: Dataset) -> None:
    """Without weight decay, which moves what has no gradient."""
    recommender, model, _ = made(tiny_data, aligned_from=0.0, weight_decay=0.0)
    assert changed(*parts_of("tokenizer", recommender, model)) == {"tokenizer"}
    own = {"llama", "tables", "soft_embedding", "codebook_logits", "begin_D"}
    assert changed(*parts_of("recommender", recommender, model)) == own | {"enc_adapter", "dec_adapter"}
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


def test_losses_against_plain_loops(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    """The code loss of a batch, item by item: all that have something before them, or the last alone."""
    recommender, model, _ = start
    batch = {"item_ids": np.array([[3, 5, 9, 2], [7, 1, 0, 0]], np.int32), "lengths": np.array([4, 2], np.int32)}
    phase, _ = phase_of(recommender, "recommender")
    found = jax.jit(phase.loss)(model, batch, jax.random.key(0), jnp.int32(0))
    hidden = jax.jit(lambda model, sequence: model.hidden(sequence)[0])
    total, count = 0.0, 0
    for ids, length in zip(batch["item_ids"], batch["lengths"], strict=True):
        sequence = model.sequence(jnp.asarray(ids[None, :length]), jnp.array([length]), with_target=True)
        hidden_TD = hidden(model, sequence)
        for item in range(1, length):
            codes_L = np.asarray(model.ids.codes_RL[...])[ids[item]]
            for level, code in enumerate(codes_L):
                # One begin vector, then the items before, then the codes before.
                log_p_K = jax.nn.log_softmax(model.logits(hidden_TD[item * len(codes_L) + level], level))
                total -= float(log_p_K[code])
                count += 1
    assert float(found.weight) == count == 12 and float(found.items) == 4
    assert float(found.total) == pytest.approx(total, rel=1e-5)


def test_targets_alone_are_the_ends_of_beginnings(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    """Of three items two beginnings have a target, each as likely; its loss is what it is among all targets."""
    recommender, model, _ = start
    rows = {"item_ids": np.array([[3, 5, 9], [7, 0, 0]], np.int32), "lengths": np.array([3, 1], np.int32)}
    every, last = (
        jax.jit(phase_of(one, "finetune")[0].loss) for one in (recommender, with_turns(recommender, targets="last"))
    )
    step = jnp.int32(0)
    whole = every(model, rows, jax.random.key(0), step)
    first = every(model, {**rows, "lengths": np.array([2, 1], np.int32)}, jax.random.key(0), step)
    either = float(first.total), float(whole.total - first.total)
    drawn = [last(model, rows, jax.random.key(seed), step) for seed in range(40)]
    assert {float(one.weight) for one in drawn} == {3.0} and float(drawn[0].items) == 1
    of_first = [abs(float(one.total) - either[0]) < 1e-4 for one in drawn]
    of_second = [abs(float(one.total) - either[1]) < 1e-4 for one in drawn]
    assert 10 <= sum(of_first) <= 30 and sum(of_first) + sum(of_second) == 40
    # The tokenizer learns every item that follows another all the same, and is aligned at the target alone.
    of_tokenizer = phase_of(with_turns(recommender, targets="last"), "tokenizer")[0].loss
    found = jax.jit(of_tokenizer)(model, rows, jax.random.key(0), step)
    assert float(found.weight) == 2 and [float(found.metrics[name][1]) for name in ("sia_loss", "psa_loss")] == [1, 1]


@pytest.mark.parametrize("phase_name", ["tokenizer", "recommender"])
def test_alignment_is_added_from_its_step_on(phase_name: str, start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    """total = weight · (own mean + kl_loss · SIA + dec_cl_loss · PSA); before it, without the last two."""
    recommender, model, _ = start
    weighed = with_turns(
        recommender,
        code_loss=2.0,
        kl_loss=0.5,
        dec_cl_loss=0.25,
        aligned_from=6,
        recommender_steps=3,
        tokenizer_steps=2,
    )
    phase, _ = phase_of(weighed, phase_name)
    batch = {name: value for name, value in next(phase.batches(0, 0)).items() if name in phase.batch_specs[0]}
    loss = jax.jit(phase.loss)
    first = {"tokenizer": 4, "recommender": 6}[phase_name]  # 6 of the recommender's steps are 2 turns, as are 4
    before, after = (loss(model, batch, jax.random.key(0), jnp.int32(step)) for step in (first - 1, first))
    mean = {name: float(total / weight) for name, (total, weight) in after.metrics.items()}
    own = 2.0 * mean["code_loss"] if phase_name == "recommender" else (
        mean["reconstruction_loss"] + mean["quantization_loss"]
    )  # fmt: skip
    assert float(before.total / before.weight) == pytest.approx(own, rel=1e-5)
    added = 0.5 * mean["sia_loss"] + 0.25 * mean["psa_loss"]
    assert float(after.total / after.weight) - own == pytest.approx(added, rel=1e-4)
    assert min(mean["sia_loss"], mean["psa_loss"]) > 1e-3 * own  # neither is lost in the other's rounding


def test_a_target_that_stands_twice_counts_once(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    recommender, model, _ = start
    phase, _ = phase_of(recommender, "tokenizer")
    rows = {"item_ids": np.array([[3, 5], [7, 5], [2, 9]], np.int32), "lengths": np.full(3, 2, np.int32)}
    found = jax.jit(phase.loss)(model, rows, jax.random.key(0), jnp.int32(0))
    assert float(found.weight) == 2
    np.testing.assert_array_equal(first_occurrences(jnp.array([5, 5, 9])), [True, False, True])


@pytest.mark.slow
def test_gradients_by_part(start: tuple[ETEGRec, ETEGRecModel, TrainConfig]) -> None:
    """Every part that a phase trains gets some; what is frozen is said to be."""
    recommender, model, _ = start
    parts = {(part.phase, part.path): part for part in check_gradients(recommender, model, OPTIONS)}
    for path in ("tokenizer.encoder.layers.0", "tokenizer.quantizer.codebooks.0", "tokenizer.decoder.layers.0"):
        assert (parts["tokenizer", path].norm or 0) > 0 and parts["recommender", path].reason == FROZEN
    for path in ("soft_embedding.scid_projector", "codebook_logits.output_projector", "enc_adapter", "dec_adapter"):
        assert (parts["recommender", path].norm or 0) > 0, path
    assert parts["finetune", "enc_adapter"].reason == FROZEN
    assert not [part for part in parts.values() if part.reason == NOT_READ]


def checked_norm(data_dir: Path, folder: Path, said: pytest.CaptureFixture[str], *more: str) -> float:
    """The input projector's, by `--check_gradients`; the run that was never meant to start leaves no folder."""
    given = flags(data_dir=data_dir, checkpoint_dir=folder, num_steps=1, tokenizer_epochs=0, finetune_epochs=0, **JOB)
    with pytest.raises(SystemExit) as end:
        main([*given, *more, "--check_gradients"])
    assert end.value.code == 0 and not folder.exists()
    lines = said.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("  soft_embedding.scid_projector"))
    return float(line.split()[-1])


def test_gradients_are_checked_from_the_command_line(
    tiny_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked_norm(tiny_data.path, tmp_path / "run", capsys) > 0


@pytest.mark.slow
def test_gradients_are_checked_as_a_step_takes_them(
    tiny_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its micro-batches, on its mesh."""
    parts = ("--gradient_accumulation=2", "--batch_size=4", "--mesh=data=2")
    whole, in_parts = (checked_norm(tiny_data.path, tmp_path / "run", capsys, *more) for more in ((), parts))
    assert in_parts == pytest.approx(whole, rel=1e-3)


def test_gradients_that_a_weight_of_zero_takes_away(tiny_data: Dataset) -> None:
    """Each codebook has a line of its own, frozen or not, and an adapter without a loss says which flag that is."""
    recommender, model, _ = made(tiny_data, aligned_from=0.0, kl_loss=0.0, finetune_epochs=0.0)
    recommender_alone = dataclasses.replace(recommender._turns, tokenizer_steps=0)  # one phase compiles faster
    recommender._turns = recommender_alone
    text = as_text(check_gradients(recommender, model, OPTIONS))
    (line,) = (line for line in text.splitlines() if "enc_adapter" in line)
    assert line.endswith("zero: --kl_loss 0")
    for level in range(2):
        (line,) = (line for line in text.splitlines() if f"tokenizer.quantizer.codebooks.{level} " in line)
        assert FROZEN in line


@pytest.mark.slow
@pytest.mark.parametrize("phase_name", ["tokenizer", "recommender"])
def test_a_step_on_a_mesh_is_that_of_one_device(phase_name: str, tiny_data: Dataset) -> None:
    """Both alignments are on: the negatives of one row are those of every device."""
    recommender, model, _ = made(tiny_data, aligned_from=0.0, kl_loss=0.01, dec_cl_loss=0.1)
    phase, _ = phase_of(recommender, phase_name)
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
