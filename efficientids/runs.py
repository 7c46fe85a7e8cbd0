"""The run folder R: what a run was, in files that evaluate, recommend and later runs read alone.

config.yaml       the complete configuration, every default resolved
model.json        which recommender, its shape, its data set and (where frozen) its weight file
environment.json  versions, hardware, command
metrics.jsonl     one line a logged step or evaluation
checkpoints/STEP  see `efficientids.checkpoints`
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import yaml

from efficientids import checkpoints, processes
from efficientids.errors import UserError

_VERSIONS = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "polars", "tokenizers",
    "safetensors", "tensorboard", "efficientids",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @staticmethod
    def create(path: Path) -> RunFolder:
        """Makes the folder for a new run: a new one, or one that is empty.

        Raises:
            UserError: something is in it already; nothing of it is touched.
        """
        if path.exists() and not path.is_dir():
            raise UserError(f"--checkpoint_dir {path} is a file; give a folder")
        held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        if (path / "model.json").exists() and checkpoints.steps(path / "checkpoints")[0]:
            raise UserError(
                f"--checkpoint_dir {path} already holds a run; give a new folder, or start a new run from its "
                f"parameters with --load_checkpoint {path} and another --checkpoint_dir"
            )
        if (path / "model.json").exists():
            raise UserError(
                f"--checkpoint_dir {path} holds a run that ended before its first checkpoint; delete the folder to "
                "start again in it, or give another"
            )
        if held:
            shown = ", ".join(held[:4]) + (", …" if len(held) > 4 else "")
            raise UserError(f"--checkpoint_dir {path} is not empty ({shown}); give a new folder for the run")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--checkpoint_dir {path} cannot be made: {error}; give another folder") from error
        return RunFolder(path)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around the work before the first step: if it fails, the folder (which was empty) goes away again.

        SIGTERM, as Slurm and Kubernetes send it, is such a failure, and would otherwise end the process on the spot.
        """
        try:
            with _terminated_as_exit():
                yield
        except BaseException:
            if not processes.is_first():
                raise
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            with suppress(OSError):  # a link, or where the process stands
                self.path.rmdir()
            raise

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing run.

        Raises:
            UserError: there is none at `path`.
        """
        if not (path / "model.json").is_file():
            what = "no such folder" if not path.exists() else "it has no model.json"
            raise UserError(f"{path} is not a run folder ({what}); give the --checkpoint_dir of a training run")
        return RunFolder(path)

    def write(self, config: dict[str, Any], model: dict[str, Any], remark: str | None = None) -> None:
        """Writes the files that describe the run; `model.json` last, for it is what makes the folder a run.

        `remark`, one line, stands as a comment on top of config.yaml.
        """
        comment = "" if remark is None else f"# {remark}\n"
        (self.path / "config.yaml").write_text(comment + yaml.safe_dump(config, sort_keys=False))
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        (self.path / "model.json").write_text(json.dumps(model, indent=2) + "\n")

    def read_model(self) -> dict[str, Any]:
        """`model.json`."""
        return _read(self.path / "model.json", json.loads)

    def damaged(self, error: Exception) -> UserError:
        """What to raise where `model.json` is read, but lacks what it should say."""
        return UserError(f"{self.path / 'model.json'}: damaged, or written by another version ({error!r})")

    def read_config(self) -> dict[str, Any]:
        """`config.yaml`."""
        return _read(self.path / "config.yaml", yaml.safe_load)

    def read_environment(self) -> dict[str, Any]:
        """`environment.json`."""
        return _read(self.path / "environment.json", json.loads)

    def choose_step(self, step: int | None = None) -> int:
        """`step` if it has a checkpoint; for None the best by validation NDCG@10.

        Raises:
            UserError: no checkpoint, or none of that step: those that exist are listed.
        """
        found, best = checkpoints.steps(self.checkpoints)
        if not found:
            raise UserError(f"{self.checkpoints} holds no finished checkpoint; train first, or give another run")
        if step is None:
            return found[-1] if best is None else best
        if step not in found:
            raise UserError(f"{self.checkpoints} has no step {step}; it has {', '.join(map(str, found))}")
        return step


def locate(text: str) -> tuple[RunFolder, int | None]:
    """What `--load_checkpoint` names: R, R/STEP or R/checkpoints/STEP → the run and the step (None for R)."""
    path = Path(text)
    if re.fullmatch(r"\d+", path.name) and not (path / "model.json").is_file():
        parent = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return RunFolder.open(parent), int(path.name)
    return RunFolder.open(path), None


def environment() -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "working_directory": str(Path.cwd()),
        "commit": _commit(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in devices],
        "versions": versions,
    }


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM raises SystemExit in here; in a thread, where Python sets no handlers, all stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _commit() -> str | None:
    """The checkout's commit, "+" behind it where files differ from it; None where the code is in no git checkout."""
    here = Path(__file__).resolve().parent
    say = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(say, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        value = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a mapping")
    return value
