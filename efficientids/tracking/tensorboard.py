"""TensorBoard's event files, through TensorBoard's own writer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from efficientids.tracking.trackers import Status

FOLDER = "tensorboard"


class TensorBoard:
    """A tracker: scalars in `R/tensorboard/`. Each log is on the disk before training goes on, so a killed run leaves a
    file that reads to its last logged step.
    """

    def __init__(self) -> None:
        self._writer: EventFileWriter | None = None

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        """Makes the file; the configuration stands in config.yaml."""
        self._writer = EventFileWriter(str(run_path / FOLDER))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event with a scalar for each metric, by its name."""
        assert self._writer is not None, "log comes after start"
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def finish(self, status: Status) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
