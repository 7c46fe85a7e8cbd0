"""Checks of drivers, libraries and shared memory on invented facts, and the reading of recorded outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from efficientids.errors import UserError
from efficientids.preflight import gpu
from efficientids.preflight.gpu import (
    GpuFacts,
    all_peers,
    check_gpu,
    check_shared_memory,
    gpu_problems,
    parse_driver_file,
    parse_smi,
)  # fmt: skip

GOOD_5090 = GpuFacts(driver=(570, 86, 15), capability=(12, 0), cuda=(12, 8, 57), cudnn=(9, 7, 0, 66))

# The first lines of /proc/driver/nvidia/version: the proprietary module's, and the open one's.
PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs-builder@U16-I3)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""
PEERS = """ \tGPU0\tGPU1\t
 GPU0\tX\tOK\t
 GPU1\tOK\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  NS   = Not supported
"""


def test_enough_is_enough() -> None:
    assert gpu_problems(GOOD_5090) == []
    check_gpu(GOOD_5090)
    check_gpu(GpuFacts())  # nothing known: nothing refused
    ampere = GpuFacts(driver=(535, 183), capability=(8, 0), cuda=(12, 4), cudnn=(9, 1))
    assert gpu_problems(ampere) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"driver": (565, 57, 1)}, "NVIDIA driver 565.57.1: at least 570 is needed for compute capability 12.0"),
        ({"cuda": (12, 6, 77)}, "CUDA runtime 12.6.77: at least 12.8"),
        ({"cudnn": (9, 6)}, "cuDNN 9.6: at least 9.7"),
        ({"cuda": (13, 0)}, "NVIDIA driver 570.86.15: at least 580"),
        ({"capability": (10, 3)}, "cuDNN 9.7.0.66: at least 9.11"),
    ],
)
def test_each_shortage_is_one_line_with_its_remedy(change: dict[str, gpu.Version], words: str) -> None:
    (line,) = gpu_problems(dataclasses.replace(GOOD_5090, **change))
    assert words in line and "; " in line


def test_all_shortages_are_said_at_once() -> None:
    with pytest.raises(UserError) as raised:
        check_gpu(GpuFacts((535, 0), (12, 0), (12, 4), (9, 1)))
    assert str(raised.value).count("at least") == 3


def test_a_machine_without_a_gpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> GpuFacts:
        raise AssertionError("asked for facts")

    monkeypatch.setattr(gpu, "read_gpu_facts", asked)
    monkeypatch.setattr(gpu, "has_nvidia_device", lambda: False)
    check_gpu()
    monkeypatch.setattr(gpu, "has_nvidia_device", lambda: True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    check_gpu()


def test_recorded_outputs_are_read() -> None:
    assert parse_smi("570.133.20, 8.9\n570.133.20, 12.0\n") == ((570, 133, 20), (12, 0))
    assert parse_smi("535.183.01, 9.0\n") == ((535, 183, 1), (9, 0))
    for text in ("", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"):
        assert parse_smi(text) == (None, None)
    assert parse_driver_file(PROPRIETARY) == (535, 183, 1)
    assert parse_driver_file(OPEN) == (570, 124, 6)
    assert parse_driver_file("") is None


def test_without_nvidia_smi_the_drivers_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(OPEN)
    monkeypatch.setattr(gpu, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = gpu.read_gpu_facts()
    assert facts.driver == (570, 124, 6) and facts.capability is None


def test_peers_are_read_from_the_topology() -> None:
    assert all_peers(PEERS)
    assert all_peers(PEERS.replace("GPU1\tOK", "GPU1\tCNS")) is False
    assert all_peers("") is None  # no nvidia-smi: unknown, and no reason to refuse


SMALL, ENOUGH = 64 * 2**20, 2**30


@pytest.mark.parametrize(
    "devices, size, peers, environment",
    [
        (1, SMALL, False, {}),
        (2, ENOUGH, False, {}),
        (2, SMALL, True, {}),
        (2, SMALL, False, {"NCCL_SHM_DISABLE": "1"}),
        (2, ENOUGH, True, {"NCCL_P2P_DISABLE": "1"}),
        (2, SMALL, None, {}),
    ],
)
def test_shared_memory_that_suffices(
    devices: int, size: int, peers: bool | None, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_run", lambda *_: "")
    check_shared_memory(devices, size=size, peer_to_peer=peers, environment=environment)


def test_little_shared_memory_without_peers_is_refused_with_the_ways_out() -> None:
    with pytest.raises(UserError, match=r"/dev/shm has 64 MiB, and 1.0 GiB is needed.*--shm-size=1g") as raised:
        check_shared_memory(8, size=SMALL, peer_to_peer=False, environment={})
    assert "NCCL_SHM_DISABLE=1" in str(raised.value) and "NCCL_P2P_DISABLE=1" in str(raised.value)
    with pytest.raises(UserError, match=r"NCCL_P2P_DISABLE=1 is set.*unset NCCL_P2P_DISABLE"):
        check_shared_memory(8, size=SMALL, peer_to_peer=True, environment={"NCCL_P2P_DISABLE": "1"})
