"""The GPU program, compiled on the CPU: every target is accepted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from core import attention
from core.config import TINY
from efficientids import systems
from efficientids.options import TrainConfig
from efficientids.planning import gpu
from efficientids.planning.candidates import Candidates
from efficientids.planning.devices import DEVICES
from efficientids.systems.base import Scale
from tests.efficientids.planning.targets import gpu_target, need_plugin


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    need_plugin()


def tiny_step(device: str) -> jax.stages.Traced:
    """A product of two matrices, traced for a device that is not there."""
    (there,) = gpu.described(DEVICES[device], 1)
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=SingleDeviceSharding(there))
    return jax.jit(lambda a, b: 2 * (a @ b)).trace(x, x)


@pytest.mark.parametrize("device", DEVICES)
def test_the_compiler_accepts_every_device(device: str) -> None:
    memory = gpu.compiled_memory(tiny_step(device))
    assert memory.arguments == 2 * 64 * 64 * 2 and memory.outputs == 64 * 64 * 2 and memory.aliased == 0
    assert memory.peak >= memory.arguments + memory.outputs


def test_the_7b_training_step_compiles_for_an_rtx_5090() -> None:
    config = TrainConfig(llama_size="7b", freeze_llama=True, batch_size=4, seq_len=512)
    need = Candidates(systems.get("efficientids"), Scale(), gpu_target()).need(config)
    memory, base = need.compiled, 2 * 6_738_415_616
    assert memory is not None
    # The bf16 base is an argument and nothing else; what is trained (with its Adam state) is written in place.
    assert base < memory.arguments < base + 2**29
    assert memory.outputs < 2**29
    assert memory.aliased > 0.9 * memory.outputs
    assert need.fits and base < memory.peak < DEVICES["rtx5090"].memory_bytes
    # The exact parts are the compiler's arguments, but for the batch; the estimate of the rest is near.
    kept = need.estimate.exact - need.estimate.parts["gradients"]
    assert 0 < memory.arguments - kept < 2**16
    assert abs(need.estimate.total / memory.peak - 1) < 0.1


@pytest.mark.slow
def test_products_without_tiles_are_compiled_otherwise() -> None:
    """Float32 products of this shape end XLA's compilation for a GPU that is not there (jaxlib 0.10.1)."""
    config = TrainConfig(recommender="sasrec", seq_len=200, batch_size=128)
    need = Candidates(systems.get("sasrec"), Scale(), gpu_target()).need(config)
    assert need.compiled is not None and need.fits


def test_cudnn_attention_needs_less_memory_than_xla() -> None:
    jax.default_backend()  # so that the plugin has loaded what libraries there are
    if attention.cudnn_version() is None:
        pytest.skip("no cuDNN to compile its kernel with: pip install --no-deps nvidia-cudnn-cu12")
    temporaries = {}
    for kernel in ("cudnn", "xla"):
        config = TrainConfig(freeze_llama=True, batch_size=8, seq_len=512, length_buckets=1, attention=kernel)
        need = Candidates(systems.get("efficientids"), Scale(num_items=100), gpu_target()).need(config)
        assert need.cudnn == (kernel == "cudnn") and need.compiled is not None
        temporaries[kernel] = need.compiled.temporaries
    # XLA holds one layer's logits and probabilities, [B, N, T, T], at least once in bfloat16.
    assert temporaries["xla"] - temporaries["cudnn"] > 2 * 8 * TINY.num_heads * 512 * 512
