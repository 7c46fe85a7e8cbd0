"""Runs the phases of a recommender: steps, validation, checkpoints, early stopping."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from core import sharding
from efficientids.checkpoints import BEST_METRIC, Writer, writer
from efficientids.errors import UserError
from efficientids.log import RunLog
from efficientids.recommenders.base import Cycle, Phase, Recommender, cycles
from efficientids.runs import RunFolder
from efficientids.training.step import Program, TrainState, build_program

Validate = Callable[[nnx.Module], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class TrainerOptions:
    """How any system trains.

    Attributes:
        seed: of the data order and of dropout.
        accumulation: micro-batches an optimiser step.
        grad_clip: largest global gradient norm; 0 clips nothing.
        log_every: steps a printed line.
        eval_every: steps between validations, each followed by a checkpoint; the last step always has both.
        patience: validations without a better NDCG@10 after which a phase ends; 0: never.
        saved: the NNX filter of the variables that checkpoints hold.
        mesh: the devices; None: one.
    """

    seed: int
    accumulation: int
    grad_clip: float
    log_every: int
    eval_every: int
    patience: int
    saved: Any
    mesh: Mesh | None = None


def train(
    recommender: Recommender,
    model: nnx.Module,
    options: TrainerOptions,
    run: RunFolder,
    log: RunLog,
    validate: Validate,
) -> None:
    """Trains `model` through all phases of `recommender.plan()`; the result is in the run's checkpoints.

    Where a job has several processes, all of them call this, and metrics are the same on each.

    A plan without phases (a baseline that only counts) is validated and saved as step 0.

    Args:
        model: concrete; its arrays are given away (donated) to the steps.
        validate: model → validation metrics as fractions, `ndcg@10` among them.

    Raises:
        UserError: the loss or a gradient is not finite. Checkpoints written before stay.
    """
    plan = cycles(recommender.plan())
    with writer(run.checkpoints) as checkpoints:
        if not plan:
            metrics = validate(model)
            log.record({"event": "validation", "phase": "counted", "step": 0, **metrics})
            log.say("validation: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            checkpoints.save(0, nnx.state(model, options.saved), (), metrics, {"phase": "counted"})
        trainer = _Trainer(options, log, validate, checkpoints)
        for cycle in plan:
            model = trainer.run(cycle, model)


@dataclasses.dataclass
class _Turns:
    """A phase of a cycle from turn to turn.

    Attributes:
        first: steps done before its first turn.
        total: steps of all its turns.
        steps: those done.
    """

    program: Program
    key: jax.Array
    first: int
    total: int
    steps: int = 0


class _Trainer:
    """Runs cycles, one after the other, and knows what came of them so far."""

    def __init__(self, options: TrainerOptions, log: RunLog, validate: Validate, checkpoints: Writer) -> None:
        self._options, self._log, self._validate, self._checkpoints = options, log, validate, checkpoints
        self._done, self._patience = 0, _Patience(options.patience)

    def run(self, cycle: Cycle, model: nnx.Module) -> nnx.Module:
        """Returns the model after the last step."""
        self._patience.waited = 0
        turns: dict[str, _Turns] = {}
        for _ in range(cycle.repeats):
            for phase in cycle.phases:
                model, ends = self._turn(phase, cycle.repeats, model, turns)
                if ends:
                    return model
        return model

    def _turn(self, phase: Phase, repeats: int, model: nnx.Module, turns: dict[str, _Turns]) -> tuple[nnx.Module, bool]:
        """One turn of a phase; True where the cycle should end with it."""
        options = self._options
        turn = turns.get(phase.name)
        if turn is None:
            if phase.start_from == "best":
                model = self._best(model)
            program = build_program(
                model, phase, accumulation=options.accumulation, grad_clip=options.grad_clip, mesh=options.mesh,
                repeats=repeats,
            )  # fmt: skip
            key = program.key(options.seed, self._done)
            turn = turns[phase.name] = _Turns(program, key, self._done, phase.num_steps * repeats)
        else:
            turn.program = turn.program.resumed(model, turn.program.state)
        loop = _Loop(phase, turn, options, self._log, self._validate, self._checkpoints, self._done, self._patience)
        model, state = loop.run()
        # Its parameters may be given away to the next phase's steps; the optimiser's moments are its own.
        turn.program = turn.program._replace(state=state)
        turn.steps += loop.steps_done
        self._done += loop.steps_done
        return model, loop.ended

    def _best(self, model: nnx.Module) -> nnx.Module:
        graphdef, state = nnx.split(model)
        saved = nnx.filter_state(state, self._options.saved)
        step, found = self._checkpoints.best(saved, self._options.mesh)
        self._log.say(f"from the best checkpoint so far, step {step}")
        return nnx.merge(graphdef, nnx.merge_state(state, found))


class _Patience:
    """Counts a cycle's validations since the best one, of this cycle or before it."""

    def __init__(self, patience: int) -> None:
        self._patience, self._best, self.waited = patience, -math.inf, 0

    def improved(self, value: float) -> bool:
        """Told of a validation: is it the best so far? Of equals the later one, as Orbax keeps it."""
        better = value >= self._best
        self._best, self.waited = (value, 0) if better else (self._best, self.waited + 1)
        return better

    @property
    def over(self) -> bool:
        """True where there were as many in vain as allowed."""
        return bool(self._patience) and self.waited >= self._patience


class _Loop:
    """One turn of a phase: dispatches step n + 1 before it reads the metrics of step n, so that the device never
    waits."""

    def __init__(
        self,
        phase: Phase,
        turn: _Turns,
        options: TrainerOptions,
        log: RunLog,
        validate: Validate,
        checkpoints: Writer,
        first_step: int,
        patience: _Patience,
    ) -> None:
        self._phase, self._turn, self._program, self._options = phase, turn, turn.program, options
        self._log, self._validate, self._checkpoints, self._first = log, validate, checkpoints, first_step
        self._patience = patience
        self.steps_done, self.ended = 0, False

    def run(self) -> tuple[nnx.Module, TrainState]:
        """Returns the model after the last step, and the phase's state."""
        phase, options = self._phase, self._options
        state, frozen = self._program.state, self._program.frozen
        # A later phase starts with an order of its own.
        batches = phase.batches(options.seed + self._turn.first, self._turn.steps)
        unread: tuple[int, dict[str, jax.Array], float] | None = None
        names, began = phase.batch_specs[0], time.perf_counter()
        model = None
        for step in range(1, phase.num_steps + 1):
            asked = time.perf_counter()
            batch = {name: value for name, value in next(batches).items() if name in names}
            waited = time.perf_counter() - asked
            state, metrics = self._program.step(state, frozen, self._program.on_devices(batch), self._turn.key)
            if unread is not None:
                self._read(*unread)
            began, ended = time.perf_counter(), began
            unread = (step, metrics, waited / max(began - ended, 1e-9))
            self.steps_done = step
            last, due = step == phase.num_steps, phase.validated and self._due(step)
            if last or due:
                self._read(*unread)
                unread = None
                with self._log.untimed():
                    model = self._ended(step, self._program.model(state))
                    self.ended = due and self._evaluate_and_save(step, model, state)
                    if phase.on_end is not None:
                        self._program = self._program.resumed(model, state)
                        state, frozen = self._program.state, self._program.frozen
                began = time.perf_counter()
                if self.ended:
                    self._log.flush()
                    break
        assert model is not None
        return model, state

    def _due(self, step: int) -> bool:
        """Whether a validation follows this step: by the phase's own count over all turns, and after its last."""
        done = self._turn.steps + step
        return done % self._options.eval_every == 0 or done == self._turn.total

    def _ended(self, step: int, model: nnx.Module) -> nnx.Module:
        """The model as it is validated, laid as before: what `on_end` makes on the host lies on one device alone."""
        if self._phase.on_end is None:
            return model
        ended, mesh = self._phase.on_end(model), self._options.mesh
        self._log.record({"phase": self._phase.name, "step": self._first + step, **ended.row})
        self._log.say(ended.said)
        if mesh is None:
            return ended.model
        graphdef, state = nnx.split(ended.model)
        return nnx.merge(graphdef, sharding.place(state, mesh))

    def _read(self, step: int, metrics: dict[str, jax.Array], input_wait: float) -> None:
        """Logs a step; `input_wait` is the share of its time that went into waiting for the batch."""
        values = {name: float(value) for name, value in metrics.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise UserError(
                    f"step {self._first + step}: {name} is {values[name]}, so training stops; earlier checkpoints are "
                    "kept. Try a lower --learning_rate, more --warmup_steps, or --precision float32"
                )
        values["input_wait"] = input_wait
        epoch = (self._turn.steps + step) / self._phase.steps_per_epoch
        self._log.step(self._phase.name, step, self._phase.num_steps, epoch, values, self._first)

    def _evaluate_and_save(self, step: int, model: nnx.Module, state: TrainState) -> bool:
        """Validates and saves; True where the cycle should end early."""
        total = self._first + step
        metrics = self._validate(model)
        improved = self._patience.improved(metrics[BEST_METRIC])
        self._log.record({"event": "validation", "phase": self._phase.name, "step": total, **metrics})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._log.say(f"validation at step {total}: {shown}{'  (best so far)' if improved else ''}")
        info = {"phase": self._phase.name, "step_in_phase": self._turn.steps + step, "seed": self._options.seed}
        saved = nnx.state(model, self._options.saved)
        self._checkpoints.save(total, saved, state.opt_states, metrics, info)
        if self._patience.over and self._turn.steps + step < self._turn.total:
            waited = self._patience.waited
            self._log.say(f"no better {BEST_METRIC} in {waited} validations: phase {self._phase.name!r} ends")
            return True
        return False
