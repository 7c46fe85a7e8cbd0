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

from efficientids.checkpoints import BEST_METRIC, Writer, writer
from efficientids.errors import UserError
from efficientids.log import RunLog
from efficientids.recommenders.base import Phase, Recommender
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
    done = 0
    phases = recommender.plan()
    with writer(run.checkpoints) as checkpoints:
        if not phases:
            metrics = validate(model)
            log.record({"event": "validation", "phase": "counted", "step": 0, **metrics})
            log.say("validation: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            checkpoints.save(0, nnx.state(model, options.saved), (), metrics, {"phase": "counted"})
        for phase in phases:
            program = build_program(
                model, phase, accumulation=options.accumulation, grad_clip=options.grad_clip, mesh=options.mesh
            )
            loop = _Loop(phase, program, options, log, validate, checkpoints, done)
            model = loop.run()
            done += loop.steps_done


class _Loop:
    """One phase: dispatches step n + 1 before it reads the metrics of step n, so that the device never waits."""

    def __init__(
        self,
        phase: Phase,
        program: Program,
        options: TrainerOptions,
        log: RunLog,
        validate: Validate,
        checkpoints: Writer,
        first_step: int,
    ) -> None:
        self._phase, self._program, self._options = phase, program, options
        self._log, self._validate, self._checkpoints, self._first = log, validate, checkpoints, first_step
        self._best, self._best_step = -math.inf, 0
        self.steps_done = 0

    def run(self) -> nnx.Module:
        """Returns the model after the last step."""
        phase, options = self._phase, self._options
        key = self._program.key(options.seed, self._first)
        state, frozen = self._program.state, self._program.frozen
        # A later phase starts with an order of its own.
        batches = phase.batches(options.seed + self._first, 0)
        unread: tuple[int, dict[str, jax.Array], float] | None = None
        names, began = phase.batch_specs[0], time.perf_counter()
        for step in range(1, phase.num_steps + 1):
            asked = time.perf_counter()
            batch = {name: value for name, value in next(batches).items() if name in names}
            waited = time.perf_counter() - asked
            state, metrics = self._program.step(state, frozen, self._program.on_devices(batch), key)
            if unread is not None:
                self._read(*unread)
            began, ended = time.perf_counter(), began
            unread = (step, metrics, waited / max(began - ended, 1e-9))
            self.steps_done = step
            if step % options.eval_every == 0 or step == phase.num_steps:
                self._read(*unread)
                unread = None
                with self._log.untimed():
                    ends = self._evaluate_and_save(step, state)
                began = time.perf_counter()
                if ends:
                    break
        return self._program.model(state)

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
        epoch = step / self._phase.steps_per_epoch
        self._log.step(self._phase.name, step, self._phase.num_steps, epoch, values, self._first)

    def _evaluate_and_save(self, step: int, state: TrainState) -> bool:
        """Validates and saves; True where the phase should end early."""
        total = self._first + step
        model = self._program.model(state)
        metrics = self._validate(model)
        improved = metrics[BEST_METRIC] >= self._best  # of equals the later one, as Orbax keeps it
        if improved:
            self._best, self._best_step = metrics[BEST_METRIC], step
        self._log.record({"event": "validation", "phase": self._phase.name, "step": total, **metrics})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._log.say(f"validation at step {total}: {shown}{'  (best so far)' if improved else ''}")
        info = {"phase": self._phase.name, "step_in_phase": step, "seed": self._options.seed}
        saved = nnx.state(model, self._options.saved)
        self._checkpoints.save(total, saved, state.opt_states, metrics, info)
        waited = (step - self._best_step) // self._options.eval_every
        if self._options.patience and waited >= self._options.patience and step < self._phase.num_steps:
            self._log.say(f"no better {BEST_METRIC} in {waited} validations: phase {self._phase.name!r} ends")
            return True
        return False
