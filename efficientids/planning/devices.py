"""Hardware facts of the GPUs that are planned for, and how much of their memory a run may use.

Where two public figures of a card's memory differ, the smaller one stands here: what CUDA reports on Linux (seen in
PyTorch's messages and in XLA's own target descriptions, `xla/backends/gpu/target_config/specs`), not the nominal size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from core.platform import memory_fraction
from efficientids.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """Public facts of a GPU; the upper block by the names and units of XLA's `GpuDeviceInfoProto`.

    Attributes:
        compute_capability: (major, minor).
        cores: streaming multiprocessors.
        memory_bytes: what CUDA reports.
        memory_bandwidth: bytes a second.
        clock_ghz: boost.
        matmul_flops: dense bfloat16 products with float32 sums, FLOP/s, without sparsity. TF32 (what float32 products
            take by default) has half of it on every card here.
        link_bandwidth: bytes a second from one GPU to its neighbours, in one direction.
        link: what that link is.
        peer_to_peer: whether GPUs reach each other's memory; without it, transfers go through the host's.
        source: where the facts are from.
    """

    name: str
    compute_capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    memory_bytes: int
    memory_bandwidth: int
    clock_ghz: float
    l2_bytes: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_optin: int
    matmul_flops: float
    link_bandwidth: float
    link: str
    peer_to_peer: bool
    source: str

    def is_card(self, kind: str) -> bool:
        """Whether a GPU that calls itself `kind` is one of these."""
        return self.name in kind or kind in self.name

    def target_config(self) -> str:
        """The device as the text of a `GpuTargetConfigProto`."""
        major, minor = self.compute_capability
        facts = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared_memory_per_core,
            "threads_per_core_limit": self.threads_per_core,
            "core_count": self.cores,
            "fpus_per_core": self.fpus_per_core,
            "block_dim_limit_x": 2147483647,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "memory_bandwidth": self.memory_bandwidth,
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            "shared_memory_per_block_optin": self.shared_memory_optin,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        listed = " ".join(f"{name}: {value}" for name, value in facts.items())
        return (
            f"gpu_device_info {{ {listed} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} '
            f'device_description_str: "{self.name}"'
        )


_ADA_OR_RTX_BLACKWELL: dict[str, Any] = {"fpus_per_core": 128, "threads_per_core": 1536, "shared_memory_optin": 101_376}
_A100: dict[str, Any] = {
    "compute_capability": (8, 0), "cores": 108, "fpus_per_core": 64, "clock_ghz": 1.41, "l2_bytes": 41_943_040,
    "threads_per_core": 2048, "shared_memory_per_core": 167_936, "shared_memory_optin": 166_912,
    "matmul_flops": 312e12, "link_bandwidth": 300e9, "link": "NVLink 3", "peer_to_peer": True,
}  # fmt: skip
_HOPPER: dict[str, Any] = {
    "compute_capability": (9, 0), "cores": 132, "fpus_per_core": 128, "clock_ghz": 1.98, "l2_bytes": 52_428_800,
    "threads_per_core": 2048, "shared_memory_per_core": 233_472, "shared_memory_optin": 232_448,
    "matmul_flops": 989.4e12, "link_bandwidth": 450e9, "link": "NVLink 4", "peer_to_peer": True,
}  # fmt: skip

DEVICES: Mapping[str, Device] = {
    "rtx4090": Device(
        name="NVIDIA GeForce RTX 4090", compute_capability=(8, 9), cores=128, memory_bytes=int(23.61 * GIB),
        memory_bandwidth=1_008_000_000_000, clock_ghz=2.52, l2_bytes=75_497_472, shared_memory_per_core=102_400,
        matmul_flops=165.2e12, link_bandwidth=32e9, link="PCIe 4 x16", peer_to_peer=False,
        source="NVIDIA Ada GPU architecture whitepaper; CUDA C programming guide; memory as PyTorch reports it",
        **_ADA_OR_RTX_BLACKWELL,
    ),
    "rtx5090": Device(
        name="NVIDIA GeForce RTX 5090", compute_capability=(12, 0), cores=170, memory_bytes=int(31.36 * GIB),
        memory_bandwidth=1_792_000_000_000, clock_ghz=2.407, l2_bytes=100_663_296, shared_memory_per_core=131_072,
        matmul_flops=209.5e12, link_bandwidth=64e9, link="PCIe 5 x16", peer_to_peer=False,
        source="NVIDIA RTX Blackwell GPU architecture whitepaper; memory as PyTorch reports it",
        **_ADA_OR_RTX_BLACKWELL,
    ),
    "rtx6000pro": Device(
        name="NVIDIA RTX PRO 6000 Blackwell", compute_capability=(12, 0), cores=188, memory_bytes=int(94.97 * GIB),
        memory_bandwidth=1_792_000_000_000, clock_ghz=2.6, l2_bytes=134_217_728, shared_memory_per_core=131_072,
        matmul_flops=503.8e12, link_bandwidth=64e9, link="PCIe 5 x16", peer_to_peer=True,
        source="NVIDIA RTX PRO 6000 Blackwell data sheet; XLA rtx6000pro.txtpb; memory as CUDA programs report it",
        **_ADA_OR_RTX_BLACKWELL,
    ),
    "a100-40": Device(
        name="NVIDIA A100-SXM4-40GB", memory_bytes=42_298_834_944, memory_bandwidth=1_555_200_000_000,
        source="NVIDIA A100 data sheet; XLA a100_sxm_40.txtpb", **_A100,
    ),
    "a100-80": Device(
        name="NVIDIA A100-SXM4-80GB", memory_bytes=85_100_068_864, memory_bandwidth=2_039_040_000_000,
        source="NVIDIA A100 data sheet; XLA a100_sxm_80.txtpb", **_A100,
    ),
    "h100": Device(
        name="NVIDIA H100 80GB HBM3", memory_bytes=84_942_979_072, memory_bandwidth=3_352_320_000_000,
        source="NVIDIA H100 data sheet (SXM); XLA h100_sxm.txtpb", **_HOPPER,
    ),
    "h200": Device(
        name="NVIDIA H200", memory_bytes=int(139.7 * GIB), memory_bandwidth=4_800_000_000_000,
        source="NVIDIA H200 data sheet; XLA h200.txtpb, but for its memory, which is the nominal 141 GiB there",
        **_HOPPER,
    ),
    "b200": Device(
        name="NVIDIA B200", compute_capability=(10, 0), cores=148, fpus_per_core=128, memory_bytes=191_514_411_008,
        memory_bandwidth=7_672_320_000_000, clock_ghz=1.965, l2_bytes=132_644_864, threads_per_core=2048,
        shared_memory_per_core=233_472, shared_memory_optin=232_448, matmul_flops=2250e12, link_bandwidth=900e9,
        link="NVLink 5", peer_to_peer=True, source="NVIDIA HGX B200 data sheet; XLA b200.txtpb",
    ),
}  # fmt: skip

OUTSIDE_BYTES = 3 * GIB // 4
OUTSIDE_BYTES_NCCL = GIB // 2
"""An allowance for what CUDA takes outside JAX's pool: its context, kernels, handles of cuBLAS and cuDNN; and NCCL's
channels where there are several GPUs. It comes off the pool only as far as it exceeds what the pool leaves."""

INSIDE_BYTES = GIB // 2
"""An allowance for what is in the pool but not in XLA's account of the step: scratch of autotuning, the next batch,
gaps between buffers. `benchmarks/plan_vs_measured.py` measures how much of it is needed."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """What a run may use of one device, in bytes.

    Attributes:
        memory: of the device.
        fraction: the share that JAX takes of it (XLA_PYTHON_CLIENT_MEM_FRACTION).
        reserve: allowance for what the account of a step leaves out.
    """

    memory: int
    fraction: float
    reserve: int

    @staticmethod
    def of(memory: int, fraction: float, num_devices: int) -> Pool:
        """The pool of each of `num_devices` devices."""
        outside = OUTSIDE_BYTES + (OUTSIDE_BYTES_NCCL if num_devices > 1 else 0)
        lacking = max(0, outside - int(memory * (1 - fraction)))
        return Pool(memory, fraction, INSIDE_BYTES + lacking)

    @property
    def size(self) -> int:
        """Bytes that a step may need."""
        return int(self.memory * self.fraction) - self.reserve


def find(name: str) -> Device:
    """The device of a `--device`.

    Raises:
        UserError: an unknown name.
    """
    if name not in DEVICES:
        raise UserError(f"--device {name}: choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


def fraction() -> float:
    """The share of a GPU's memory that a run started in this environment takes (`core.platform.memory_fraction`).

    Raises:
        UserError: the user's own setting of it cannot be read.
    """
    try:
        return min(1.0, memory_fraction())
    except ValueError as error:
        raise UserError(str(error)) from error
