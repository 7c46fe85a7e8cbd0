"""A hidden folder beside the output, where a data set is made: survives a kill, is taken up by the next run, never seen
by those who read the output.

    .NAME.work-KEY/lock          held by the process that works here
    .NAME.work-KEY/stages.json   finished stages → their facts
    .NAME.work-KEY/old/          the data set that is being replaced, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from efficientids.errors import UserError

_LOCK, _STAGES, _OLD = "lock", "stages.json", "old"


class Workplace:
    """An open work folder. `path` is where files may be made; all of it is removed at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def facts(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage has to tell; None where it is not finished."""
        return self._stages().get(stage)

    def finish(self, stage: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Notes that `stage` is finished: all its files are whole. Returns `facts` as a later run will read them."""
        text = json.dumps({**self._stages(), stage: facts})
        beside = self.path / f"{_STAGES}.new"
        beside.write_text(text)
        os.replace(beside, self.path / _STAGES)
        return self._stages()[stage]

    def folder(self, name: str) -> Path:
        """An empty folder `name`; what a killed run left in it is removed."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def put(self, made: Path, output: Path) -> None:
        """Moves the folder `made` to `output`. What was there moves aside first and comes back should that fail."""
        if not output.exists():
            os.rename(made, output)
            return
        old = self.path / _OLD
        os.rename(output, old)
        try:
            os.rename(made, output)
        except BaseException:
            os.rename(old, output)
            raise

    def _stages(self) -> dict[str, Any]:
        file = self.path / _STAGES
        return json.loads(file.read_bytes()) if file.is_file() else {}


@contextlib.contextmanager
def workplace(output: Path, key: str) -> Iterator[Workplace]:
    """The work folder of `output` for work named `key`; what a killed run of the same work finished is still there.

    Other work folders of `output` are removed. The folder goes away at the end, and on errors too; only an interruption
    leaves it, to be taken up. Raises UserError when another process is making the same output.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    recover(output)
    path = output.parent / f".{output.name}.work-{key}"
    path.mkdir(exist_ok=True)
    with _locked(path) as lock:
        if lock is None:
            raise UserError(f"{output}: another process is making it; wait for that, or give another --output")
        for other in _work_folders(output):
            if other != path:
                _remove_stale(other)
        try:
            yield Workplace(path)
        except Exception:
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


def recover(output: Path) -> None:
    """Brings back the data set that a run killed in the middle of replacing it had moved aside."""
    for folder in _work_folders(output):
        if (folder / _OLD).is_dir() and not output.exists():
            with _locked(folder) as lock:
                if lock is not None and not output.exists():
                    os.rename(folder / _OLD, output)


def _work_folders(output: Path) -> list[Path]:
    if not output.parent.is_dir():
        return []
    prefix = f".{output.name}.work-"
    return sorted(entry for entry in output.parent.iterdir() if entry.name.startswith(prefix) and entry.is_dir())


def _remove_stale(folder: Path) -> None:
    with _locked(folder) as lock:
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[bytes] | None]:
    """The folder's lock for the time of the block, or None where another process has it."""
    with (folder / _LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file  # closing it, or the end of the process, frees the lock
