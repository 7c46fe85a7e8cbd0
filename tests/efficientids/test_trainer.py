"""The trainer over a toy system: determinism, which checkpoints stay, early stopping, broken losses, what is logged."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.functional import Buffer
from core.sharding import MeshShape, make_mesh
from efficientids import checkpoints
from efficientids.errors import UserError
from efficientids.log import RunLog
from efficientids.recommenders.base import Batch, Cycle, Ended, Histories, LossSum, OptimizerConfig, Phase, Ranked
from efficientids.runs import RunFolder
from efficientids.training.step import build_program
from efficientids.training.trainer import TrainerOptions, train

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, WIDTH = 4, 5
OPTIONS = TrainerOptions(
    seed=0, accumulation=1, grad_clip=0.0, log_every=2, eval_every=2, patience=0, saved=...
)  # fmt: skip


class Toy(nnx.Module):
    def __init__(self, size: int = WIDTH) -> None:
        self.w = nnx.Param(jnp.linspace(1.0, 2.0, size))


def toy_loss(model: Toy, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
    """Squared error of each target; row r has `n[r]` of them. The key moves the inputs, as dropout would."""
    x_RW = batch["x"] * (1 + 0.01 * jax.random.normal(key, batch["x"].shape))
    errors_R = ((model.w[...] * x_RW).sum(axis=1) - 1) ** 2
    return LossSum((errors_R * batch["n"]).sum(), batch["n"].sum(), batch["n"].sum(), {})


def toy_batches(seed: int, start_step: int) -> Iterator[Batch]:
    for step in range(start_step, 1_000):
        rng = np.random.default_rng((seed, step))
        n = rng.integers(1, 9, ROWS).astype(np.float32)
        yield {"x": rng.standard_normal((ROWS, WIDTH)).astype(np.float32), "n": n, "user": np.array(["a", "b"])}


@dataclasses.dataclass
class ToySystem:
    num_steps: int = 6
    learning_rate: float = 0.1
    phases: int = 1
    loss: Callable[..., LossSum] = toy_loss
    batches: Callable[[int, int], Iterator[Batch]] = toy_batches

    def init(self, key: jax.Array) -> Toy:
        return Toy()

    def plan(self) -> Sequence[Phase]:
        shapes = {
            "x": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
            "n": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
        }
        groups = [(nnx.Param, OptimizerConfig(self.learning_rate))]
        return [
            Phase(f"part{i}", groups, [shapes], self.batches, self.loss, self.num_steps, steps_per_epoch=3.0)
            for i in range(self.phases)
        ]

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        raise NotImplementedError


class Validator:
    """Gives scripted NDCG@10 values, then zeros; keeps a copy of the parameters that it was shown."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)
        self.shown: list[np.ndarray] = []

    def __call__(self, model: Any) -> dict[str, float]:
        self.shown.append(np.array(model.w[...]))
        return {"ndcg@10": self._values.pop(0) if self._values else 0.0}


def run_toy(folder: Path, system: ToySystem, validate: Any = None, **options: Any) -> tuple[RunFolder, str]:
    """Trains; the run folder and what was printed."""
    run, printed, chosen = RunFolder.create(folder), io.StringIO(), dataclasses.replace(OPTIONS, **options)
    log = RunLog(run.metrics, chosen.log_every, printed)
    train(system, system.init(jax.random.key(0)), chosen, run, log, validate or Validator())
    return run, printed.getvalue()


def rows(run: RunFolder, event: str) -> list[dict[str, Any]]:
    """The lines of one kind in `metrics.jsonl`, without the clock's fields."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    clock = ("time", "items_per_s", "input_wait")
    return [{k: v for k, v in x.items() if k not in clock} for x in lines if x["event"] == event]


def restored(run: RunFolder, step: int) -> np.ndarray:
    abstract = nnx.state(nnx.eval_shape(Toy))
    return np.asarray(checkpoints.restore(run.checkpoints, step, abstract)["w"][...])


def test_a_seed_decides_losses_and_parameters(tmp_path: Path) -> None:
    runs = [("first", 5), ("again", 5), ("other", 6)]
    first, again, other = (run_toy(tmp_path / name, ToySystem(), seed=seed)[0] for name, seed in runs)
    assert len(rows(first, "step")) == 3
    assert rows(first, "step") == rows(again, "step")
    np.testing.assert_array_equal(restored(first, 6), restored(again, 6))
    assert rows(first, "step")[0]["loss"] != rows(other, "step")[0]["loss"]
    assert (restored(first, 6) != restored(other, 6)).any()
    # The seed is of dropout too: over the same batches another one moves otherwise.
    same_data = ToySystem(batches=lambda seed, start_step: toy_batches(5, start_step))
    dropped = run_toy(tmp_path / "dropped", same_data, seed=6)[0]
    assert rows(first, "step")[0]["loss"] != rows(dropped, "step")[0]["loss"]


def test_the_latest_three_and_the_best_are_kept_as_they_were(tmp_path: Path) -> None:
    validate = Validator(0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6)
    run, _ = run_toy(tmp_path / "run", ToySystem(num_steps=13), validate)
    assert checkpoints.steps(run.checkpoints) == ([4, 10, 12, 13], 4)
    # Saving copied the parameters before later steps wrote over them.
    for step, shown in zip((2, 4, 6, 8, 10, 12, 13), validate.shown, strict=True):
        if step in (4, 10, 12, 13):
            np.testing.assert_array_equal(restored(run, step), shown)
    assert len({shown.tobytes() for shown in validate.shown}) == 7


def test_a_checkpoint_is_unmoved_by_steps_taken_while_it_is_written(tmp_path: Path) -> None:
    size = 1 << 20
    phase = dataclasses.replace(
        ToySystem(num_steps=50, learning_rate=1.0).plan()[0],
        loss=lambda model, *_: LossSum((model.w[...] ** 2).sum(), jnp.ones(()), jnp.ones(()), {}),
    )
    program = build_program(Toy(size), phase, accumulation=1, grad_clip=0.0)
    state, batch, key = program.state, {"n": np.ones(1, np.float32)}, jax.random.key(0)
    state, _ = program.step(state, program.frozen, batch, key)
    before = np.array(state.params[0]["w"][...])
    with checkpoints.writer(tmp_path / "checkpoints") as writer:
        writer.save(1, nnx.state(program.model(state)), state.opt_states, {"ndcg@10": 0.0}, {})
        for _ in range(20):
            state, _ = program.step(state, program.frozen, batch, key)
        after = np.array(state.params[0]["w"][...])
    abstract = nnx.state(nnx.eval_shape(lambda: Toy(size)))
    found = np.asarray(checkpoints.restore(tmp_path / "checkpoints", 1, abstract)["w"][...])
    np.testing.assert_array_equal(found, before)
    assert (after != before).all()


def test_patience_ends_a_phase(tmp_path: Path) -> None:
    run, printed = run_toy(tmp_path / "run", ToySystem(num_steps=40), Validator(0.1, 0.3, 0.2, 0.25, 0.9), patience=2)
    assert [row["step"] for row in rows(run, "validation")] == [2, 4, 6, 8]
    assert checkpoints.steps(run.checkpoints) == ([4, 6, 8], 4)
    assert "no better ndcg@10 in 2 validations: phase 'part0' ends" in printed


def test_without_patience_a_phase_runs_to_its_end(tmp_path: Path) -> None:
    run, _ = run_toy(tmp_path / "run", ToySystem(num_steps=9), Validator(0.5))
    # The last step is validated and saved though 9 is no multiple of 2.
    assert [row["step"] for row in rows(run, "validation")] == [2, 4, 6, 8, 9]


def test_steps_count_on_through_the_phases(tmp_path: Path) -> None:
    validate = Validator()
    run, _ = run_toy(tmp_path / "run", ToySystem(num_steps=4, phases=2), validate)
    assert [(row["phase"], row["step"]) for row in rows(run, "validation")] == [
        ("part0", 2), ("part0", 4), ("part1", 6), ("part1", 8),
    ]  # fmt: skip
    np.testing.assert_array_equal(restored(run, 8), validate.shown[3])


def spoiled(kind: str) -> ToySystem:
    """A system whose fifth batch has a loss of NaN, or a finite loss with an infinite gradient."""

    def batches(seed: int, start_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(toy_batches(seed, start_step), start=start_step + 1):
            x = np.full_like(batch["x"], np.nan) if kind == "loss" else np.zeros_like(batch["x"])
            yield {**batch, "x": x} if step == 5 else batch

    def root(model: Toy, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        return LossSum(jnp.sqrt(jnp.abs(model.w[...] * batch["x"])).sum(), batch["n"].sum(), batch["n"].sum(), {})

    return ToySystem(num_steps=8, batches=batches, loss=toy_loss if kind == "loss" else root)


@pytest.mark.parametrize("kind", ["loss", "grad_norm"])
def test_a_broken_step_stops_the_run_and_keeps_what_was_saved(tmp_path: Path, kind: str) -> None:
    validate = Validator()
    with pytest.raises(UserError, match=rf"step 5: {kind} is (nan|inf).*--learning_rate"):
        run_toy(tmp_path / "run", spoiled(kind), validate)
    run = RunFolder(tmp_path / "run")
    assert checkpoints.steps(run.checkpoints)[0] == [2, 4]
    np.testing.assert_array_equal(restored(run, 4), validate.shown[1])
    assert np.isfinite(validate.shown[1]).all()


def test_the_logged_loss_is_the_mean_over_targets_since_the_last_line(tmp_path: Path) -> None:
    """Steps have unequal numbers of targets, and a validation between two lines forgets nothing."""

    def plain(model: Toy, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        return toy_loss_without_key(model.w[...], batch)

    system = ToySystem(num_steps=7, learning_rate=0.0, loss=plain)
    run, printed = run_toy(tmp_path / "run", system, log_every=3, eval_every=2)
    expected, totals = [], [0.0, 0.0]
    for step, batch in zip(range(1, 8), toy_batches(0, 0), strict=False):
        loss = toy_loss_without_key(np.linspace(1, 2, WIDTH), batch)
        totals = [totals[0] + float(loss.total), totals[1] + float(loss.weight)]
        if step in (3, 6, 7):
            expected.append(totals[0] / totals[1])
            totals = [0.0, 0.0]
    logged = rows(run, "step")
    assert [row["step"] for row in logged] == [3, 6, 7]
    assert [row["loss"] for row in logged] == pytest.approx(expected, rel=1e-5)
    assert [row["epoch"] for row in logged] == pytest.approx([1, 2, 7 / 3])
    # Not a terminal: plain lines, each with its place, its speed and what is left.
    lines = [line for line in printed.splitlines() if line.startswith("part0 ")]
    assert len(lines) == 3 and "\r" not in printed
    assert lines[0].startswith("part0 3/7  epoch 1.0  ") and "items/s  " in lines[0] and "ETA " in lines[0]


def toy_loss_without_key(w: Any, batch: Batch) -> LossSum:
    errors_R = ((w * batch["x"]).sum(axis=1) - 1) ** 2
    return LossSum((errors_R * batch["n"]).sum(), batch["n"].sum(), batch["n"].sum(), {})


class TwoParts(nnx.Module):
    """Two parameters, trained in turn, and a buffer that the end of the first one's turn replaces."""

    def __init__(self) -> None:
        self.w, self.v = nnx.Param(jnp.linspace(1.0, 2.0, WIDTH)), nnx.Param(jnp.ones(WIDTH))
        self.turns = Buffer(jnp.zeros((), jnp.int32))


def counted(model: TwoParts) -> Ended:
    model.turns[...] = model.turns[...] + 1
    turns = int(model.turns[...])
    return Ended(model, {"event": "counted", "turns": turns, "by_level": [1, 2]}, f"counted {turns} turns")


@dataclasses.dataclass
class InTurns(ToySystem):
    """w, then v, then w …; and, if `last` says from where, w alone."""

    repeats: int = 3
    last: Any = None
    on_end: Callable[[Any], Ended] = counted
    validated: bool = False

    def plan(self) -> Sequence[Phase | Cycle]:
        (one,) = ToySystem(num_steps=2, batches=self.batches).plan()

        def part(name: str, loss: Callable[..., LossSum], **more: Any) -> Phase:
            groups = [(nnx.PathContains(name), one.groups[0][1])]
            return dataclasses.replace(one, name=name, groups=groups, loss=loss, **more)

        def loss_of_v(model: Any, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
            found = toy_loss(SimpleNamespace(w=model.v), batch, key, step)  # type: ignore[arg-type]
            return found._replace(metrics={"turns": (model.turns[...] + 0.0, jnp.ones(())), "at": (step + 0.0, 1.0)})

        w = part("w", toy_loss, validated=self.validated, on_end=self.on_end)
        cycle = Cycle([w, part("v", loss_of_v)], self.repeats)
        return [cycle] if self.last is None else [cycle, part("w", toy_loss, start_from=self.last)]


def run_in_turns(folder: Path, system: ToySystem, validate: Any = None, **options: Any) -> RunFolder:
    run = RunFolder.create(folder)
    chosen = dataclasses.replace(OPTIONS, log_every=1, **options)
    train(system, TwoParts(), chosen, run, RunLog(run.metrics, 1, io.StringIO()), validate or Validator())
    return run


def test_in_a_cycle_each_phase_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Three turns of two steps are six steps in a row: data, schedule, moments, and the phase's own count of steps."""
    run = run_in_turns(tmp_path / "turns", InTurns(), Validator(0.1, 0.2, 0.3))
    found = rows(run, "step")
    assert [row["phase"] for row in found] == ["w", "w", "v", "v"] * 3
    assert [row["step"] for row in found] == list(range(1, 13))
    (alone,) = ToySystem(num_steps=6).plan()
    straight = run_toy(tmp_path / "straight", ToySystem(num_steps=6), log_every=1)[0]
    for name in ("loss", "learning_rate", "grad_norm", "epoch"):
        np.testing.assert_allclose(
            [row[name] for row in found if row["phase"] == "w"], [row[name] for row in rows(straight, "step")]
        )
    of_v = [row for row in found if row["phase"] == "v"]
    assert [row["at"] for row in of_v] == [0, 1, 2, 3, 4, 5]
    assert [row["turns"] for row in of_v] == [1, 1, 2, 2, 3, 3]  # what `on_end` put there
    assert [row["step"] for row in rows(run, "validation")] == [4, 8, 12]
    assert [(row["phase"], row["step"], row["turns"]) for row in rows(run, "counted")] == [
        ("w", 2, 1), ("w", 6, 2), ("w", 10, 3),
    ]  # fmt: skip
    assert alone.num_steps == 6 and len({row["learning_rate"] for row in of_v}) == 6


def test_what_the_end_of_a_turn_makes_lies_on_the_mesh(tmp_path: Path) -> None:
    """Buffers that are made on the host, as a code table is, are placed before anyone validates or saves them."""
    mesh, found = make_mesh(MeshShape(data=2)), []

    def host_made(model: TwoParts) -> Ended:
        nnx.update(model, nnx.State({"turns": Buffer(jnp.asarray(np.int32(7)))}))
        return Ended(model, {"event": "made"}, "made")

    def validate(model: Any) -> dict[str, float]:
        found.append([leaf.sharding for leaf in jax.tree.leaves(nnx.state(model))])
        return {"ndcg@10": 0.0}

    run_in_turns(tmp_path / "run", InTurns(on_end=host_made, validated=True), validate, mesh=mesh)
    assert len(found) == 6
    for layout in found:
        assert [one.device_set for one in layout] == [set(mesh.devices.flat)] * 3


def test_the_end_of_a_turn_comes_before_each_validation_in_it(tmp_path: Path) -> None:
    """What is validated and saved, and trained on from there, is what `on_end` made."""
    found: list[int] = []

    def validate(model: Any) -> dict[str, float]:
        found.append(int(model.turns[...]))
        return {"ndcg@10": 0.0}

    run = run_in_turns(tmp_path / "run", InTurns(validated=True), validate, eval_every=1)
    assert [(row["step"], row["turns"]) for row in rows(run, "counted")] == [
        (1, 1), (2, 2), (5, 3), (6, 4), (9, 5), (10, 6),
    ]  # fmt: skip
    assert found == [1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6]
    assert [row["turns"] for row in rows(run, "step") if row["phase"] == "v"] == [2, 2, 4, 4, 6, 6]
    shapes = nnx.state(nnx.eval_shape(TwoParts))
    assert checkpoints.restore(run.checkpoints, 10, shapes)["turns"][...] == 6
    straight = run_in_turns(tmp_path / "straight", InTurns())
    assert [row["loss"] for row in rows(run, "step")] == [row["loss"] for row in rows(straight, "step")]


def test_a_cycle_is_compiled_once(tmp_path: Path) -> None:
    counts: list[int] = []

    def batches(seed: int, start_step: int) -> Iterator[Batch]:
        counts.append(start_step)
        return toy_batches(seed, start_step)

    found = []
    for repeats in (1, 3):
        system = InTurns(repeats=repeats, batches=batches)
        with jax.log_compiles():
            found.append(compiled_by(lambda system=system: run_in_turns(tmp_path / f"{system.repeats}", system)))
    assert found == [2, 2] and counts == [0, 0, 0, 0, 2, 2, 4, 4]


def compiled_by(work: Callable[[], object]) -> int:
    """How often `train_step` is compiled meanwhile."""
    log, found = logging.getLogger("jax._src.interpreters.pxla"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        work()
    finally:
        log.removeHandler(handler)
    return sum("train_step" in line for line in found)


@pytest.mark.parametrize(("last", "step"), [("best", 4), ("previous", 12)])
def test_a_phase_starts_from_the_best_or_the_last(tmp_path: Path, last: str, step: int) -> None:
    validate = Validator(0.9, 0.2, 0.3, 0.4)
    run = run_in_turns(tmp_path / "run", InTurns(last=last), validate)
    shapes = nnx.state(nnx.eval_shape(TwoParts))
    start, end = (checkpoints.restore(run.checkpoints, at, shapes) for at in (step, 14))
    np.testing.assert_array_equal(start["v"][...], end["v"][...])  # no part of the last phase
    assert end["turns"][...] == {"best": 1, "previous": 3}[last]


def test_patience_ends_a_whole_cycle(tmp_path: Path) -> None:
    run = run_in_turns(tmp_path / "run", InTurns(repeats=9, last="best"), Validator(0.5, 0.4, 0.3, 0.2), patience=2)
    assert [row["step"] for row in rows(run, "validation")] == [4, 8, 12, 14]


def test_a_phase_that_ends_early_leaves_nothing_to_the_next_ones_line(tmp_path: Path) -> None:
    """Lines of three steps; patience ends the first phase after its fourth."""
    system = ToySystem(num_steps=9, phases=2)
    run, _ = run_toy(tmp_path / "run", system, Validator(0.5, 0.1, 0.6), log_every=3, patience=1)
    logged = rows(run, "step")
    assert [(row["phase"], row["step"]) for row in logged] == [
        ("part0", 3), ("part0", 4), ("part1", 7), ("part1", 8),
    ]  # fmt: skip
    fresh, _ = run_toy(tmp_path / "fresh", ToySystem(num_steps=9), log_every=1, eval_every=9)
    assert logged[1]["loss"] == pytest.approx(rows(fresh, "step")[3]["loss"])
