"""Three real steps: the same code on the CPU, with a device that counts its memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from efficientids.errors import UserError
from efficientids.log import RunLog
from efficientids.options import TrainConfig
from efficientids.planning import measure, start, text
from efficientids.planning.devices import DEVICES


class Counting:
    """A device that says what it has held."""

    device_kind = "invented"

    def __init__(self, stats: dict[str, int] | None) -> None:
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def test_the_peak_is_the_devices_own() -> None:
    assert measure.peak_bytes(Counting({"peak_bytes_in_use": 7, "bytes_in_use": 3})) == 7
    assert measure.peak_bytes(Counting(None)) is None and measure.peak_bytes(Counting({})) is None
    assert measure.peak_bytes(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize(
    "flags",
    [{"batch_size": 4, "seq_len": 8}, {"recommender": "sasrec", "batch_size": 4, "seq_len": 8},
     *(pytest.param(flags, marks=pytest.mark.slow) for flags in (
         {"batch_size": 4, "seq_len": 8, "train": "lora", "lora_rank": 2, "quantize": "nf4"},
         {"batch_size": 4, "seq_len": 16, "pack_sequences": True},
         {"batch_size": 2, "seq_len": 8, "head": "two_level", "gradient_accumulation": 2}))],
)  # fmt: skip
@pytest.mark.usefixtures("quick_compile")
def test_three_steps_of_anything(flags: dict[str, Any]) -> None:
    found = measure.run_steps(TrainConfig(**flags), jax.devices("cpu")[0])
    assert found["steps"] == 3 and found["step_seconds"] > 0 and found["peak_bytes"] is None


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "has_nvidia_device", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        measure.three_steps(TrainConfig())


def test_a_run_says_what_it_came_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any) -> None:
    log = RunLog(tmp_path / "metrics.jsonl", 1)
    start.log_peak(None, log)
    start.log_peak(2**30, log)
    assert not (tmp_path / "metrics.jsonl").exists()  # a CPU counts nothing, and nothing is pretended
    monkeypatch.setattr(jax, "local_devices", lambda: [Counting({"peak_bytes_in_use": 2**31})])
    start.log_peak(2**30, log)
    assert '"peak_bytes": 2147483648' in (tmp_path / "metrics.jsonl").read_text()
    assert "the plan said 1.00 GiB for a step, the run came to 2.00 GiB" in capsys.readouterr().out


def test_another_card_is_no_measure_of_the_plan() -> None:
    found = {"device": "NVIDIA H100 80GB HBM3", "peak_bytes": 2**30, "steps": 3, "step_seconds": 0.1}
    need: Any = SimpleNamespace(peak=2**31)
    assert "the plan says 2.00 GiB (+100.0%)" in text.measured(found, need, DEVICES["h100"])
    other = text.measured(found, need, DEVICES["rtx5090"])
    assert "%" not in other and "for another card (NVIDIA GeForce RTX 5090)" in other
