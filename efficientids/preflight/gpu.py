"""Whether the driver and libraries here suffice for this machine's GPUs, and its shared memory for several of them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.platform import has_nvidia_device
from efficientids.errors import UserError
from efficientids.preflight.room import amount

Version = tuple[int, ...]

SHARED_MEMORY_NEEDED = 2**30
"""Of /dev/shm for NCCL between GPUs without peer-to-peer access: what NCCL's guide (Troubleshooting, Docker) asks for.
Docker's default is 64 MiB."""

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")


@dataclasses.dataclass(frozen=True)
class GpuFacts:
    """What is installed; None where it is not known. `capability`: the newest of this machine's GPUs."""

    driver: Version | None = None
    capability: Version | None = None
    cuda: Version | None = None
    cudnn: Version | None = None


@dataclasses.dataclass(frozen=True)
class _Needs:
    driver: Version
    cuda: Version
    cudnn: Version


# From this compute capability on. Blackwell came with CUDA 12.8, whose driver is 570 (CUDA 12.8 release notes), and
# cuDNN 9.7 (what cudnn-frontend 1.10 and TransformerEngine ask for); 10.3 is what jax itself asks for
# (jax/_src/cudnn/fused_attention_stablehlo.py).
_NEEDS: Mapping[Version, _Needs] = {
    (10, 0): _Needs((570,), (12, 8), (9, 7)),
    (10, 3): _Needs((570,), (12, 8), (9, 11)),
    (12, 0): _Needs((570,), (12, 8), (9, 7)),
}
# By CUDA's major version (CUDA release notes, "minor version compatibility").
_DRIVER_OF_CUDA: Mapping[int, Version] = {12: (525,), 13: (580,)}


def check_gpu(facts: GpuFacts | None = None) -> None:
    """Refuses a GPU that the installed driver, CUDA or cuDNN is too old for. Before jax looks for devices.

    Args:
        facts: None: of this machine, if jax would use its GPU at all.

    Raises:
        UserError: one line for each check that fails.
    """
    if facts is None:
        if not (has_nvidia_device() and _jax_may_use_cuda()):
            return
        facts = read_gpu_facts()
    problems = gpu_problems(facts)
    if problems:
        raise UserError("this GPU cannot be used yet:\n  " + "\n  ".join(problems))


def gpu_problems(facts: GpuFacts) -> list[str]:
    """A line for each fact that is known and not enough; empty: nothing speaks against the GPU."""
    needs = _Needs((), (), ())
    if facts.capability is not None:
        for least, asked in _NEEDS.items():
            if facts.capability >= least:
                needs = asked
    driver = max(needs.driver, _DRIVER_OF_CUDA.get(facts.cuda[0], ()) if facts.cuda else ())
    card = "" if facts.capability is None else f" for compute capability {_text(facts.capability)}"
    checks = (
        ("NVIDIA driver", facts.driver, driver, "install a newer driver and restart"),
        ("CUDA runtime", facts.cuda, needs.cuda, 'pip install --upgrade "jax[cuda12]" (jax[cuda13] for CUDA 13)'),
        ("cuDNN", facts.cudnn, needs.cudnn, "pip install --upgrade nvidia-cudnn-cu12 (-cu13 for CUDA 13)"),
    )
    return [
        f"{name} {_text(found)}: at least {_text(least)} is needed{card}; {remedy}"
        for name, found, least, remedy in checks
        if found is not None and found < least
    ]


def read_gpu_facts() -> GpuFacts:
    """Asks nvidia-smi (or the driver's file) and the metadata of the installed packages."""
    driver, capability = parse_smi(
        _run("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
    )
    if driver is None and _DRIVER_FILE.exists():
        driver = parse_driver_file(_DRIVER_FILE.read_text(errors="replace"))
    # Other packages (torch) may have brought libraries of the other CUDA.
    major = 13 if importlib.util.find_spec("jax_cuda13_plugin") else 12
    return GpuFacts(
        driver=driver,
        capability=capability,
        cuda=_installed("nvidia-cuda-runtime" if major == 13 else "nvidia-cuda-runtime-cu12"),
        cudnn=_installed(f"nvidia-cudnn-cu{major}"),
    )


def parse_smi(text: str) -> tuple[Version | None, Version | None]:
    """`nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader` → driver, newest compute capability."""
    rows = re.findall(r"^\s*([\d.]+)\s*,\s*(\d+\.\d+)\s*$", text, re.MULTILINE)
    if not rows:
        return None, None
    return _version(rows[0][0]), max(_version(capability) for _, capability in rows)


def parse_driver_file(text: str) -> Version | None:
    """/proc/driver/nvidia/version → the driver's version."""
    found = re.search(r"^NVRM version:.*?\s(\d{3,}(?:\.\d+)+)\s", text, re.MULTILINE)
    return _version(found[1]) if found else None


def check_shared_memory(
    devices: int,
    *,
    size: int | None = None,
    peer_to_peer: bool | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuses to start NCCL on several GPUs without peer-to-peer access where /dev/shm is too small for its buffers.

    Args:
        devices: GPUs of this process's host that take part.
        size: bytes of /dev/shm; None: this machine's.
        peer_to_peer: whether every GPU reaches every other; None: ask nvidia-smi, which may not know.

    Raises:
        UserError: the start would fail, or hang, at its first reduction.
    """
    if devices < 2 or environment.get("NCCL_SHM_DISABLE") == "1":
        return
    if peer_to_peer is None:
        peer_to_peer = all_peers(_run("nvidia-smi", "topo", "-p2p", "r"))
    # Unknown is no reason to refuse.
    if peer_to_peer is not False and environment.get("NCCL_P2P_DISABLE") != "1":
        return
    if size is None:
        if not _SHARED_MEMORY.is_dir():
            return
        size = shutil.disk_usage(_SHARED_MEMORY).total
    if size >= SHARED_MEMORY_NEEDED:
        return
    without = "these GPUs have no peer-to-peer access (as with NCCL_P2P_DISABLE=1)"
    if peer_to_peer is not False:
        without = "NCCL_P2P_DISABLE=1 is set"
    raise UserError(
        f"/dev/shm has {amount(size)}, and {amount(SHARED_MEMORY_NEEDED)} is needed: {without}, so NCCL passes data "
        f"between {devices} GPUs through shared memory. Start the container with --shm-size=1g (or --ipc=host), "
        "enlarge it with `mount -o remount,size=1G /dev/shm`, "
        + ("" if peer_to_peer is False else "unset NCCL_P2P_DISABLE, ")
        + "or set NCCL_SHM_DISABLE=1: NCCL then uses the network's sockets, which is slower"
    )


def all_peers(text: str) -> bool | None:
    """`nvidia-smi topo -p2p r`: whether it says OK for every pair of GPUs; None where it says nothing of any."""
    rows = re.findall(r"^[ \t]*GPU\d+((?:[ \t]+(?!GPU)\S+)+)[ \t]*$", text, re.MULTILINE)
    states = [state for row in rows for state in row.split() if state != "X"]
    return all(state == "OK" for state in states) if states else None


def _jax_may_use_cuda() -> bool:
    """False where jax is told to use other platforms, or its CUDA plugin is not installed."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = not platforms or {"cuda", "gpu"} & set(platforms.split(","))
    return bool(wanted) and any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))


def _run(*command: str) -> str:
    """A command's output; empty where it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _installed(package: str) -> Version | None:
    """The version of a package; None where it is not installed."""
    try:
        return _version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(text: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
