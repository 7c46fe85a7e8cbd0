"""What a run says while it runs: one line a logged step on the terminal, one JSON line in `metrics.jsonl`, and the same
to whoever follows the run (TensorBoard, trackers, the report). What libraries say is kept down here, too.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import absl.logging

from efficientids.tracking.trackers import Status, Tracker, Trackers

_LIBRARIES = ("jax", "flax", "orbax", "grain", "tensorstore", "huggingface_hub", "httpx", "asyncio", "matplotlib")
# Of a step's metrics, what is shown elsewhere on its line than in the middle.
_PLACED = ("loss", "grad_norm", "learning_rate", "input_wait")
_NOT_METRICS = ("time", "step", "epoch")


class RunLog:
    """Collects the metrics of steps, and reports their means every `every` steps.

    Of the processes of a job one `speaks`; the logs of the others keep silent and write nothing.
    """

    def __init__(self, file: Path, every: int, stream: TextIO | None = None, *, speaks: bool = True) -> None:
        self._file, self._every, self._speaks = file, every, speaks
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._sums: dict[str, float] = {}
        self._targets, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._left_over = 0
        self._unreported: Callable[[], None] | None = None
        self._trackers: Trackers | None = None

    def say(self, text: str) -> None:
        """Prints lines of their own. Control characters (of a title, say) are shown as spaces."""
        if not self._speaks:
            return
        text = printable(text)
        # A live progress line is overwritten in place, so what follows it must clear it first.
        pad = " " * max(0, self._left_over - len(text.partition("\n")[0]))
        head, newline, rest = text.partition("\n")
        self._stream.write(("\r" if self._left_over else "") + head + pad + newline + rest + "\n")
        self._stream.flush()
        self._left_over = 0

    @contextmanager
    def followed_by(self, trackers: Mapping[str, Tracker], run_path: Path, config: Mapping[str, Any]) -> Iterator[None]:
        """While this lasts, `trackers` (by name) are told of what is recorded; then how it ended.

        Args:
            config: the complete configuration as plain values.
        """
        self._trackers = Trackers(trackers, self.say)
        self._trackers.start(run_path, config)
        status: Status = "failed"
        try:
            yield
            status = "finished"
        except KeyboardInterrupt:
            status = "killed"
            raise
        finally:
            if self._left_over:
                # An error message, or the shell's prompt, begins on a line of its own.
                self._stream.write("\n")
                self._left_over = 0
            self._trackers.finish(status)
            self._trackers = None

    def step(
        self, phase: str, step: int, num_steps: int, epoch: float, metrics: dict[str, float], earlier_steps: int = 0
    ) -> None:
        """Takes one step's metrics (floats): `targets` counts what was predicted, the others are means over it.

        The file counts steps over all phases, the printed line within this one.
        """
        targets = metrics["targets"]
        for name, value in metrics.items():
            if name != "targets":
                self._sums[name] = self._sums.get(name, 0.0) + value * targets
        self._targets += targets
        self._steps += 1
        self._unreported = functools.partial(self._report, phase, step, num_steps, epoch, earlier_steps)
        if step % self._every == 0 or step == num_steps:
            self.flush()

    def flush(self) -> None:
        """Reports the steps since the last line, if there are any: at the end of a phase that ends before its last
        step, whose sums are no part of the next one's."""
        if self._unreported is not None:
            self._unreported()

    def _report(self, phase: str, step: int, num_steps: int, epoch: float, earlier_steps: int) -> None:
        seconds = time.perf_counter() - self._since
        means = {name: value / max(self._targets, 1e-9) for name, value in self._sums.items()}
        rate = self._targets / max(seconds, 1e-9)
        eta = (num_steps - step) * seconds / self._steps
        self.record(
            {
                "event": "step",
                "phase": phase,
                "step": earlier_steps + step,
                "epoch": epoch,
                "items_per_s": rate,
                **means,
            }
        )
        self._show(
            f"{phase} {step}/{num_steps}  epoch {epoch:.1f}  {_shown(means)}  {rate:,.0f} items/s"
            + (f"  input wait {means['input_wait']:.0%}" if "input_wait" in means else "")
            + f"  ETA {duration(eta)}"
        )
        self._sums, self._targets, self._steps, self._since = {}, 0.0, 0, time.perf_counter()
        self._unreported = None

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Around an evaluation or a save, whose time is not the steps'."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def record(self, row: dict[str, Any]) -> None:
        """Appends a row to `metrics.jsonl`; its numbers go to those who follow the run, as `EVENT/name`, those of a
        list as `EVENT/name1`, `EVENT/name2`, …"""
        if not self._speaks:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")
        if self._trackers is None or "step" not in row:
            return
        event = {"step": "train"}.get(row["event"], row["event"])
        metrics = {f"{event}/{name}": float(v) for name, v in _flat(row) if name not in _NOT_METRICS and _is_number(v)}
        if metrics:
            self._trackers.log(row["step"], metrics)

    def _show(self, line: str) -> None:
        if not (self._live and self._speaks):
            self.say(line)
            return
        # A line that wraps cannot be overwritten.
        line = printable(line)[: shutil.get_terminal_size().columns - 1]
        self._stream.write("\r" + line + " " * max(0, self._left_over - len(line)))
        self._stream.flush()
        self._left_over = len(line)


def _shown(means: Mapping[str, float]) -> str:
    """A step's metrics on its line: the loss, what belongs to it, the gradient, the learning rate."""
    names = [name for name in means if name not in _PLACED]
    ordered = [name for name in ("loss", *names, "grad_norm", "learning_rate") if name in means]
    return "  ".join(f"{'lr' if name == 'learning_rate' else name} {means[name]:.4g}" for name in ordered)


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{name}{place}", one) for place, one in enumerate(value, start=1))
        else:
            yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def printable(text: str) -> str:
    """`text` with a space for each control character but the end of a line: what a title holds moves no cursor."""
    return "".join(c if c == "\n" or unicodedata.category(c) != "Cc" else " " for c in text)


def quiet_libraries() -> None:
    """Lets libraries speak from WARNING on, whatever they had been set to. For every entry point, before it works."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    # That it builds its font cache, once a machine, is a warning of its.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def progress(verb: str, unit: str, stream: TextIO) -> Callable[[int, int], None]:
    """A callback (done, total) that keeps one line on a terminal, and prints every 30 seconds elsewhere.

    Args:
        verb: what is done, as in "evaluated".
        unit: what is counted, as in "examples".
    """
    began = last = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        eta = duration((total - done) * (now - began) / max(done, 1))
        line = f"{verb} {done:,}/{total:,} {unit}  ETA {eta}"
        if stream.isatty():
            stream.write(f"\r{line}   " + ("\n" if done >= total else ""))
            stream.flush()
        elif now - last > 30:
            last = now
            print(line, file=stream, flush=True)

    return show


def duration(seconds: float) -> str:
    """3661 → '1h01m', 75 → '1m15s', 9.2 → '9s'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
