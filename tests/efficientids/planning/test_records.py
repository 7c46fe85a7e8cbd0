"""What is kept of a plan: found again, told apart, never half there."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

from efficientids import systems
from efficientids.options import TrainConfig
from efficientids.planning import gpu, records
from efficientids.planning.candidates import Candidates
from efficientids.planning.gpu import CompiledMemory
from efficientids.systems.base import Scale
from tests.efficientids.planning.targets import gpu_target

ACCOUNT = CompiledMemory(arguments=4, outputs=3, aliased=2, temporaries=1)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFICIENTIDS_CACHE", str(tmp_path))
    return tmp_path / "plans"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that would have been compiled for a GPU."""
    done: list[Any] = []
    monkeypatch.setattr(gpu, "compiled_memory", lambda step: (done.append(step), ACCOUNT)[1])
    monkeypatch.setattr(gpu, "described", lambda device, count: jax.devices("cpu")[:count])
    return done


def candidates(name: str = "rtx5090", items: int = 50) -> Candidates:
    return Candidates(systems.get("efficientids"), Scale(num_items=items), gpu_target(name))


def test_a_second_call_compiles_nothing(kept: Path, compilations: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(seq_len=16, batch_size=4)
    first = candidates().need(config)
    assert first.compiled == ACCOUNT and first.peak == 6 and len(compilations) == 1
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "traced_step", lambda *_: pytest.fail("traced again"))
        again = candidates().need(dataclasses.replace(config, checkpoint_dir=Path("elsewhere"), quick=True))
        assert dataclasses.replace(again, config=first.config) == first and len(compilations) == 1
    for other in (
        dataclasses.replace(config, batch_size=8),
        dataclasses.replace(config, gradient_checkpointing="full"),
    ):
        candidates().need(other)
    candidates(items=60).need(config)
    candidates("h100").need(config)
    assert len(compilations) == 5 == len(list(kept.iterdir()))


def test_a_damaged_record_is_made_anew(kept: Path, compilations: list[Any]) -> None:
    config = TrainConfig(seq_len=16, batch_size=4)
    first = candidates().need(config)
    (file,) = kept.iterdir()
    for number, damage in enumerate(("{", "[]", "{}", '{"estimate": {"parts": {}}, "compiled": {}, "bound": null}')):
        file.write_text(damage)
        assert candidates().need(config) == first and len(compilations) == number + 2


def test_many_writers_leave_one_whole_record(kept: Path) -> None:
    writers = [threading.Thread(target=records.write, args=("key", {"a": list(range(1000))})) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [path.name for path in kept.iterdir()] == ["key.json"]
    assert records.read("key") == {"a": list(range(1000))}


def test_without_a_place_to_keep_it_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFICIENTIDS_CACHE", str(tmp_path / "file"))
    records.write("key", {})
    assert records.read("key") is None


def test_flags_of_the_compiler_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    plain = records.key_of("a", 1)
    assert plain == records.key_of("a", 1) != records.key_of("a", 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    assert records.key_of("a", 1) != plain
