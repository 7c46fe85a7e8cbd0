"""The GPU program, compiled on the CPU."""

import dataclasses
import importlib.metadata

import jax
import pytest

from core import attention
from core.config import TINY
from efficientids import systems
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.planning.gpu import DEVICES, compile_step
from efficientids.planning.memory import abstract_program
from efficientids.systems.base import Scale


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    try:
        found = importlib.metadata.version("jax-cuda12-plugin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no jax-cuda12-plugin: `make install` installs it on Linux x86-64")
    assert found == jax.__version__


def test_the_7b_training_step_compiles_for_an_rtx_5090() -> None:
    asked = TrainConfig(llama_size="7b", freeze_llama=True, precision="bfloat16", batch_size=4, seq_len=512)
    system = systems.get("efficientids")
    config = system.resolve(dataclasses.replace(asked, random_weights=True), Scale())
    program, phase = abstract_program(config, system, Scale())
    memory = compile_step(program, phase, "rtx5090")
    base = 2 * 6_738_415_616
    # The bf16 base is an argument and nothing else; what is trained (with its Adam state) is written in place.
    assert base < memory.arguments < base + 2**29
    assert memory.outputs < 2**29
    assert memory.aliased > 0.9 * memory.outputs
    assert base < memory.peak < DEVICES["rtx5090"].memory_bytes


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    system, small = systems.get("efficientids"), Scale(num_items=20)
    program, phase = abstract_program(system.resolve(TrainConfig(), small), system, small)
    with pytest.raises(UserError, match="rtx5090"):
        compile_step(program, phase, "rtx6000")


def test_cudnn_attention_needs_less_memory_than_xla() -> None:
    jax.default_backend()  # so that the plugin has loaded what libraries there are
    if attention.cudnn_version() is None:
        pytest.skip("no cuDNN to compile its kernel with: pip install --no-deps nvidia-cudnn-cu12")
    peaks = {}
    for kernel in ("cudnn", "xla"):
        asked = TrainConfig(freeze_llama=True, precision="bfloat16", batch_size=8, seq_len=512, length_buckets=1)
        system, small = systems.get("efficientids"), Scale(num_items=100)
        config = system.resolve(dataclasses.replace(asked, attention=kernel), small)
        peaks[kernel] = compile_step(*abstract_program(config, system, small), "rtx5090").temporaries
    # XLA holds one layer's logits and probabilities, [B, N, T, T], at least once in bfloat16.
    heads = TINY.num_heads
    assert peaks["xla"] - peaks["cudnn"] > 2 * 8 * heads * 512 * 512
