"""What a run says while it runs: one line a logged step on the terminal, one JSON line in `metrics.jsonl`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class RunLog:
    """Collects the metrics of steps, and reports their means every `every` steps."""

    def __init__(self, file: Path, every: int, stream: TextIO | None = None) -> None:
        self._file, self._every = file, every
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._sums: dict[str, float] = {}
        self._targets, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._left_over = 0

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        # A live progress line is overwritten in place, so what follows it must clear it first.
        pad = " " * max(0, self._left_over - len(text))
        self._stream.write(("\r" if self._left_over else "") + text + pad + "\n")
        self._stream.flush()
        self._left_over = 0

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
        if step % self._every and step != num_steps:
            return
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
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        line = f"{phase} {step}/{num_steps}  epoch {epoch:.1f}  {shown}  {rate:,.0f} items/s  ETA {duration(eta)}"
        self._show(line)
        self._sums, self._targets, self._steps, self._since = {}, 0.0, 0, time.perf_counter()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Around an evaluation or a save, whose time is not the steps'."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def record(self, row: dict[str, Any]) -> None:
        """Appends a row to `metrics.jsonl`."""
        with self._file.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")

    def _show(self, line: str) -> None:
        if not self._live:
            self.say(line)
            return
        self._stream.write("\r" + line + " " * max(0, self._left_over - len(line)))
        self._stream.flush()
        self._left_over = len(line)


def progress(verb: str, stream: TextIO) -> Callable[[int, int], None]:
    """A callback (done, total) that keeps one line on a terminal, and prints every 30 seconds elsewhere."""
    began = last = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        eta = duration((total - done) * (now - began) / max(done, 1))
        if stream.isatty():
            stream.write(f"\r{verb} {done:,}/{total:,} users  ETA {eta}   " + ("\n" if done >= total else ""))
            stream.flush()
        elif now - last > 30:
            last = now
            print(f"{verb} {done:,}/{total:,} users  ETA {eta}", file=stream, flush=True)

    return show


def duration(seconds: float) -> str:
    """3661 → '1h01m', 75 → '1m15s', 9.2 → '9s'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
