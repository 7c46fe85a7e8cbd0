"""A hidden folder beside the output, where a data set is made: survives a kill, is taken up by the next run, never seen
by those who read the output.

    .NAME.lock                   held by the process that makes NAME, or tidies up after a killed one
    .NAME.work-KEY/stages.json   finished stages → their facts
    .NAME.work-KEY/new/          the whole new data set, from just before it takes the place of the old one
    .NAME.work-KEY/old/          the data set that is being replaced

`old` and `new` together: killed between the two renames, so `old` goes back. `old` alone has been replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientids.data import layout
from efficientids.errors import UserError

_STAGES, _NEW, _OLD = "stages.json", "new", "old"


def check_destination(path: Path, overwrite: bool) -> None:
    """Raises UserError unless a data set may be written to `path`.

    A folder that does not exist or is empty will do. A data set is replaced only when `overwrite` is set, and only when
    the folder holds nothing beside it; any other folder or file is refused.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path}: a file is in the way of the data set folder; give another --output")
    held = {entry.name for entry in path.iterdir()}
    if not held:
        return
    try:
        manifest = json.loads((path / layout.MANIFEST).read_bytes())
        ours = manifest["format"] == layout.FORMAT
        known = {layout.MANIFEST, layout.REPORT, layout.PAGE, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours, known = False, set()
    if not ours:
        raise UserError(f"{path}: not empty and not a prepared data set; give another --output")
    if not overwrite:
        raise UserError(f"{path}: holds a data set already; give --overwrite to replace it, or another --output")
    foreign = sorted(held - known)
    if foreign:
        raise UserError(f"{path}: holds {foreign[0]}, no part of the data set; move it away before --overwrite")


def check_new_folder(output: Path) -> None:
    """Raises UserError unless `output` (of the flag --output) can be made: new or empty, in a folder that is there."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; give a new folder")
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent}")


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

    def put(self, made: Path, output: Path, overwrite: bool = False) -> None:
        """Moves the folder `made` to `output`. What was there moves aside first and comes back should that fail.

        Raises UserError when something was put there meanwhile that may not be replaced (`check_destination`).
        """
        new, old = self.path / _NEW, self.path / _OLD
        os.rename(made, new)
        check_destination(output, overwrite)
        if not output.exists():
            os.rename(new, output)
            return
        os.rename(output, old)
        try:
            os.rename(new, output)
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
    leaves it, to be taken up. Raises UserError when another process is making the same output, with whatever flags.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f".{output.name}.work-{key}"
    with _locked(output) as held:
        if not held:
            raise UserError(f"{output}: another process is making it; wait for that, or give another --output")
        _restore(output)
        for folder in _work_folders(output):
            for leftover in (folder / _NEW, folder / _OLD) if folder == path else (folder,):
                shutil.rmtree(leftover, ignore_errors=True)
        path.mkdir(exist_ok=True)
        try:
            yield Workplace(path)
        except Exception:
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(output: Path, key: str) -> Iterator[Path]:
    """A folder to fill, which becomes `output` (new or empty) at the end of the block; after an error nothing is left.

    Raises UserError as `check_new_folder` and `workplace`.
    """
    check_new_folder(output)
    with workplace(output, key) as place:
        try:
            folder = place.folder("whole")
            yield folder
            place.put(folder, output.resolve())
        except BaseException:  # an interruption, too, leaves nothing behind
            shutil.rmtree(place.path, ignore_errors=True)
            raise


def recover(output: Path) -> None:
    """Brings back the data set that a run killed in the middle of replacing it had moved aside."""
    output = output.resolve()
    if output.exists() or not any(_is_cut_off(folder) for folder in _work_folders(output)):
        return
    with _locked(output) as held:
        if held:
            _restore(output)


def tidy(output: Path) -> None:
    """Removes what killed runs left beside `output`, which is what was wanted; nothing while another process makes it.

    What may not be removed (a folder that can only be read) stays: it is in nobody's way.
    """
    output = output.resolve()
    if not _work_folders(output) and not _lock_file(output).exists():
        return
    with contextlib.suppress(OSError), _locked(output) as held:
        for folder in _work_folders(output) if held else []:
            shutil.rmtree(folder, ignore_errors=True)


def _restore(output: Path) -> None:
    for folder in _work_folders(output):
        if _is_cut_off(folder) and not output.exists():
            os.rename(folder / _OLD, output)


def _is_cut_off(folder: Path) -> bool:
    """Whether a run was killed between the two renames of `put`."""
    return (folder / _OLD).is_dir() and (folder / _NEW).is_dir()


def _work_folders(output: Path) -> list[Path]:
    """Those of `output` alone: a dot in the key would be of the output "NAME.work-…"."""
    if not output.parent.is_dir():
        return []
    prefix = f".{output.name}.work-"
    found = (entry for entry in output.parent.iterdir() if entry.name.startswith(prefix) and entry.is_dir())
    return sorted(entry for entry in found if "." not in entry.name.removeprefix(prefix))


def _lock_file(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[bool]:
    """Whether the lock of `output` is held for the time of the block; False where another process has it.

    The file is removed at the end; the end of the process frees the lock, too.
    """
    path = _lock_file(output)
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_at(path, file.fileno()):
                continue  # whoever had it removed it after we opened it: a lock on it keeps nobody out
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
