"""The table of GPUs, and what a run may use of one."""

from __future__ import annotations

import pytest

from core.platform import MEMORY_FRACTION
from efficientids.errors import UserError
from efficientids.planning.devices import DEVICES, GIB, INSIDE_BYTES, Pool, find, fraction

NOMINAL_GIB = {
    "rtx4090": 24, "rtx5090": 32, "rtx6000pro": 96, "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "b200": 180,
}  # fmt: skip


def test_the_table_is_plausible() -> None:
    assert DEVICES.keys() == NOMINAL_GIB.keys()
    for name, device in DEVICES.items():
        assert 0.95 * NOMINAL_GIB[name] * GIB < device.memory_bytes <= NOMINAL_GIB[name] * GIB, name
        # Tensor cores do 512 to 8,192 sums of products a clock and core.
        per_clock = device.matmul_flops / device.cores / device.clock_ghz / 1e9 / 2
        assert 200 < per_clock < 8192 and device.source, name
        assert device.peer_to_peer == (not device.name.startswith("NVIDIA GeForce")), name
        assert ("NVLink" in device.link) == (device.link_bandwidth > 100e9), name


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="--device rtx6000: choose one of rtx4090, rtx5090"):
        find("rtx6000")


def test_the_pool_is_the_fraction_less_the_reserve() -> None:
    roomy = Pool.of(32 * GIB, 0.9, 1)
    assert roomy.reserve == INSIDE_BYTES and roomy.size == int(32 * GIB * 0.9) - INSIDE_BYTES
    # What CUDA needs outside the pool comes off it only where the pool leaves too little.
    assert Pool.of(32 * GIB, 0.99, 1).reserve > INSIDE_BYTES
    assert Pool.of(10 * GIB, 0.9, 2).reserve > Pool.of(10 * GIB, 0.9, 1).reserve


def test_the_fraction_is_the_users_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)
    assert fraction() == MEMORY_FRACTION
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert fraction() == 0.5
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "half")
    with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=half"):
        fraction()
