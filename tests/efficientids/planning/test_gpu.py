"""The GPU program, compiled on the CPU: every target is accepted."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from core import attention, sharding
from core.config import TINY
from core.sharding import MeshShape, make_mesh
from efficientids import systems
from efficientids.config import parse
from efficientids.options import TrainConfig
from efficientids.planning import gpu
from efficientids.planning.candidates import Candidates
from efficientids.planning.devices import DEVICES
from efficientids.recommenders.etegrec import ETEGRec, search
from efficientids.recommenders.shapes import RANKING_BYTES, rows_at_once
from efficientids.systems.base import Scale
from tests.conftest import ROOT
from tests.efficientids.planning.targets import gpu_target, need_plugin
from tests.efficientids.test_main_job import tokenizer
from tests.efficientids.tiny import flags


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
@pytest.mark.parametrize("file", ["etegrec_llama2_7b_5090.yaml", "etegrec_llama2_7b_text_5090.yaml"])
def test_a_7b_that_fits_to_train_fits_to_search(file: str, tmp_path: Path) -> None:
    """Validation's 256 rows at once would need 45 GiB. `search_bytes` is near XLA's account, so parts of them fit."""
    tokenizer(tmp_path, ["The user has bought: Next, the buys:"])
    words = flags(tokenizer=tmp_path / "tokenizer.json") if "text" in file else []
    config = parse([*flags(config=ROOT / "configs" / file), *words])
    system, scale, device = systems.get("etegrec"), Scale(), DEVICES["rtx5090"]
    recommender = system.planned(system.resolve(config, scale), scale)
    assert isinstance(recommender, ETEGRec)
    model = nnx.eval_shape(recommender.init, jax.random.key(0))
    mesh = make_mesh(MeshShape(), gpu.described(device, 1))
    graphdef, state = nnx.split(recommender.searched(model))
    beams = recommender.spec.beams
    a_row = model.search_bytes(recommender.positions, beams)
    rows = rows_at_once(256, a_row, None)
    assert 4 <= rows <= 32

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.rows(mesh))

    items = recommender.max_items
    traced = search.trace(
        graphdef, sharding.place(state, mesh), ints(rows, items), ints(rows), ints(rows, 64),
        k=32, beams=beams, normalise=recommender.spec.normalise,
    )  # fmt: skip
    memory = gpu.compiled_memory(traced)
    assert 0.8 < memory.temporaries / (rows * a_row) < 1.1
    assert memory.temporaries < 1.1 * RANKING_BYTES and memory.peak < 0.6 * device.memory_bytes


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
