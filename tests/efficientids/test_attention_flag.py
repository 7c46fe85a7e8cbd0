"""--attention on its way from the command line to the kernel."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from flax import nnx

from core import attention
from core.llama import Compute
from efficientids import systems
from efficientids.config import parse
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.systems.base import Scale

SCALE = Scale(num_items=20)


def resolved(**flags: object) -> TrainConfig:
    return systems.get("efficientids").resolve(dataclasses.replace(TrainConfig(), **flags), SCALE)


def headline(**flags: object) -> str:
    return systems.get("efficientids").headline(resolved(**flags))


def planned_compute(**flags: object) -> Compute:
    """How the model of a plan computes."""
    recommender = systems.get("efficientids").planned(resolved(**flags), SCALE)
    return nnx.eval_shape(recommender.init, jax.random.key(0)).llama.compute


def test_the_flag_is_parsed_and_reaches_the_model() -> None:
    config = parse(["--attention", "xla"])
    assert planned_compute(attention=config.attention).attention == "xla"


def test_a_cpu_says_nothing_and_refuses_cudnn_before_anything_is_loaded() -> None:
    assert "attention" not in headline()
    with pytest.raises(UserError, match=r"--attention cudnn: .*not cpu; or leave --attention out"):
        headline(attention="cudnn")


def test_a_gpu_says_which_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cudnn_version", lambda: 91002)
    monkeypatch.setattr(attention, "_capability", lambda: (12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert headline().endswith(", attention cudnn")  # --precision auto is bfloat16 there
    assert ", attention xla (float32" in headline(precision="float32")
    assert headline(pack_sequences=True).endswith(", attention xla (packed rows need a mask)")
    assert headline(attention="xla").endswith(", attention xla")
    with pytest.raises(UserError, match=r"--attention cudnn: .*packed rows"):
        headline(attention="cudnn", pack_sequences=True)


@pytest.mark.parametrize("version, kernel", [(91002, "cudnn"), (None, "xla")])
def test_a_plan_on_a_cpu_chooses_for_a_gpu(version: int | None, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cudnn_version", lambda: version)
    choice = planned_compute(precision="bfloat16").attention_kernel(64)
    assert choice.kernel == kernel and bool(choice.reason) == (kernel == "xla")
