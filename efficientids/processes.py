"""A job that runs as several processes, each with devices of its own: how they find each other, and who writes.

Every process runs the same program on the same flags. Compiled programs run on all of them together, so each must reach
the same steps, evaluations and saves. What a person or a file is told comes from the first one alone.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from core.platform import has_nvidia_device
from efficientids.errors import UserError

_LONGEST_TEXT = 4096  # bytes


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the job's other processes; before devices are looked for. Alone: does nothing.

    Without arguments, the tasks of a Slurm step (`srun` with several) find each other by themselves.

    Raises:
        UserError: the coordinator does not answer, or cannot listen where it is told to.
    """
    if coordinator is None and not _in_slurm_step():
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=_gpus_of_this_task())
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        where = f"--coordinator {coordinator}" if coordinator else "the Slurm step"
        raise UserError(
            f"{where}: the processes did not find each other ({reason}); the coordinator's address must be process "
            "0's, its port free there and reachable from the others, and all processes started"
        ) from error


def _in_slurm_step() -> bool:
    """True in a task of `srun` that has sisters; the batch script itself, which has none, is not a step's task."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    return all(name in os.environ for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")) and int(tasks) > 1


def _gpus_of_this_task() -> list[int] | None:
    """All GPUs of the host for a Slurm task that is the only one there; None: as jax finds them.

    jax takes a Slurm task to own the one GPU with its local number, also where it has a host's eight to itself.
    """
    tasks_here = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if "SLURM_LOCALID" not in os.environ or tasks_here is None or int(tasks_here[0]) != 1 or not has_nvidia_device():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*")))
    return list(range(count)) or None


def is_first() -> bool:
    """True in the process that writes and speaks; in a job of one process always."""
    return jax.process_index() == 0


def by_first(make: Callable[[], str]) -> str:
    """What `make` returns in the first process, in all of them; also where they wait for each other.

    Raises:
        UserError: `make` raised one; in all processes, so that none goes on alone.
    """
    if jax.process_count() == 1:
        return make()
    told = np.zeros(_LONGEST_TEXT, np.uint8)
    if is_first():
        try:
            text = "+" + make()
        except UserError as error:
            text = "-" + str(error)
        except BaseException as error:
            text = f"-process 0 on {socket.gethostname()} failed: {error!r}"
            _tell(told, text)
            raise
        return _read(_tell(told, text))
    return _read(multihost_utils.broadcast_one_to_all(told))


def of_first(tree: Any) -> Any:
    """Arrays as they are in the first process, in all of them; each gives its own, of the same shapes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def _tell(told: np.ndarray, text: str) -> np.ndarray:
    data = text.encode()[:_LONGEST_TEXT]
    told[: len(data)] = np.frombuffer(data, np.uint8)
    return multihost_utils.broadcast_one_to_all(told)


def _read(told: np.ndarray) -> str:
    text = np.asarray(told).tobytes().rstrip(b"\0").decode(errors="replace")
    if text[:1] == "-":
        raise UserError(text[1:])
    return text[1:]
