"""Attention kernels: the rules of the choice, XLA's against the plainest text, cuDNN's against XLA's (on a GPU)."""

from __future__ import annotations

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from core import attention
from core.attention import Choice, causal_attention, choose, cudnn_obstacle
from core.config import TINY
from core.llama import Compute, Llama

CUDNN_CALL = "cudnn$fmha"
BF16, FP32 = jnp.bfloat16, jnp.float32


def plain(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None) -> np.ndarray:
    """Attention position by position and head by head."""
    (rows, length, heads, width), kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    segments = np.zeros((rows, length)) if segments_BT is None else np.asarray(segments_BT)
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(rows, length, heads):
        seen, head = [s for s in range(t + 1) if segments[b, s] == segments[b, t]], n * kv_heads // heads
        weights = np.exp(k[b, seen, head] @ q[b, t, n] / width**0.5)
        out[b, t, n] = weights / weights.sum() @ v[b, seen, head]
    return out


def arrays(rows: int, length: int, heads: int, kv_heads: int, width: int, dtype: jnp.dtype) -> list[Array]:
    random = np.random.default_rng(length)
    return [jnp.asarray(random.normal(size=(rows, length, n, width)), dtype) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("packed", [False, True])
def test_xla_equals_the_plain_text(packed: bool) -> None:
    q, k, v = arrays(2, 7, 4, 2, 8, FP32)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]]) if packed else None
    np.testing.assert_allclose(jax.jit(causal_attention)(q, k, v, segments), plain(q, k, v, segments), atol=1e-5)


# dtype, head_dim, packed, platform, capability, version → words of the obstacle
RULES = {
    "a 5090": ((BF16, 128, False, "gpu", (12, 0), 91002), None),
    "float16": ((jnp.float16, 64, False, "gpu", (8, 0), 91002), None),
    "a plan": ((BF16, 128, False, "gpu", None, 91002), None),
    "wide heads on Hopper": ((BF16, 256, False, "gpu", (9, 0), 91002), None),
    "wide heads before": ((BF16, 256, False, "gpu", (8, 9), 91002), "heads of 256; it takes multiples of 8 up to 128"),
    "wide heads in a plan": ((BF16, 136, False, "gpu", None, 91002), "heads of 136"),
    "too wide": ((BF16, 264, False, "gpu", (9, 0), 91002), "up to 256"),
    "odd heads": ((BF16, 100, False, "gpu", (9, 0), 91002), "heads of 100"),
    "float32": ((FP32, 128, False, "gpu", (9, 0), 91002), "float32.*--precision bfloat16"),
    "packed": ((BF16, 128, True, "gpu", (9, 0), 91002), "packed rows need a mask"),
    "a T4": ((BF16, 128, False, "gpu", (7, 5), 91002), "compute capability 7.5"),
    "a CPU": ((BF16, 128, False, "cpu", None, 91002), "for NVIDIA GPUs, not cpu"),
    "no library": ((BF16, 128, False, "gpu", (9, 0), None), "nvidia-cudnn"),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rules(name: str) -> None:
    facts, words = RULES[name]
    found = cudnn_obstacle(*facts)
    if words is None:
        assert found is None
    else:
        assert found is not None and re.search(words, found)


def test_auto_falls_back_with_the_reason_and_an_impossible_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cudnn_version", lambda: 91002)
    assert choose("auto", BF16, 64, platform="gpu") == Choice("cudnn")
    assert choose("xla", BF16, 64, platform="gpu") == Choice("xla")
    fallen = choose("auto", FP32, 64, platform="gpu")
    assert fallen.kernel == "xla" and str(fallen).startswith("xla (float32")
    with pytest.raises(ValueError, match="cannot be used: float32"):
        choose("cudnn", FP32, 64, platform="gpu")
    with pytest.raises(ValueError, match=r"'flash'.*auto, cudnn, xla"):
        choose("flash", FP32, 64)  # type: ignore[arg-type]


def test_segments_never_reach_cudnn() -> None:
    with pytest.raises(ValueError, match="takes no segments"):
        causal_attention(*[jnp.zeros((1, 4, 2, 8), BF16)] * 3, jnp.zeros((1, 4), int), kernel="cudnn")


@pytest.fixture
def cudnn_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no cuDNN to ask for its version: programs are traced and lowered without it, not compiled."""
    jax.default_backend()  # so that the plugin has loaded its libraries before they are asked for
    if attention.cudnn_version() is None:
        monkeypatch.setattr(attention, "cudnn_version", lambda: 91002)
        inner = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(inner, "check_cudnn_version", lambda: 91002)


def lowered_for_cuda(compute: Compute, *, packed: bool = False) -> str:
    """The gradient of a small Llama as the program for a GPU."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(TINY, jax.random.key(0), compute)))
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)

    def loss(state: nnx.State, ids: Array) -> Array:
        model = nnx.merge(graphdef, state)
        return model.hidden(model.embed(ids), segments_BT=ids if packed else None).astype(FP32).sum()

    return jax.jit(jax.grad(loss)).trace(state, ids).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("cudnn_at_hand")
def test_a_program_for_a_gpu_calls_cudnn_in_bfloat16_alone() -> None:
    forward, backward = CUDNN_CALL + "Softmax", CUDNN_CALL + "SoftmaxBackward"
    text = lowered_for_cuda(Compute(BF16, platform="gpu"))
    assert forward in text and backward in text
    # No mask and no logits: nothing in the program has two axes of T.
    assert "x6x6x" not in text
    assert CUDNN_CALL not in lowered_for_cuda(Compute(FP32, platform="gpu"))
    assert CUDNN_CALL not in lowered_for_cuda(Compute(BF16, attention="xla", platform="gpu"))
    assert CUDNN_CALL not in lowered_for_cuda(Compute(BF16, platform="gpu"), packed=True)
    assert CUDNN_CALL not in lowered_for_cuda(Compute(BF16))  # traced for the CPU at hand


@pytest.mark.usefixtures("cudnn_at_hand")
def test_a_single_position_is_left_to_xla() -> None:
    def call(length: int) -> str:
        given = [jax.ShapeDtypeStruct((2, length, heads, 8), BF16) for heads in (4, 2, 2)]
        attend = jax.jit(lambda *qkv: causal_attention(*qkv, kernel="cudnn"))
        return attend.trace(*given).lower(lowering_platforms=("cuda",)).as_text()

    assert CUDNN_CALL in call(2) and CUDNN_CALL not in call(1)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("length", [2, 17, 64, 130, 512])
def test_cudnn_equals_xla_on_a_gpu(length: int, heads: int, kv_heads: int) -> None:
    """Outputs and gradients in bfloat16, as far apart from float32's as XLA's own are, and no further."""
    qkv = arrays(3, length, heads, kv_heads, 64, BF16)
    assert choose("cudnn", BF16, 64) == Choice("cudnn")
    weight = jax.random.normal(jax.random.key(1), qkv[0].shape)

    def both(kernel: attention.Kernel, dtype: jnp.dtype) -> list[Array]:
        def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            out = causal_attention(q, k, v, kernel=kernel).astype(FP32)
            return (out * weight).sum(), out

        given = [x.astype(dtype) for x in qkv]
        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*given)
        return [out, *(g.astype(FP32) for g in grads)]

    with jax.default_matmul_precision("highest"):
        exact = both("xla", FP32)
    for want, xla, cudnn in zip(exact, both("xla", BF16), both("cudnn", BF16), strict=True):
        own = float(jnp.linalg.norm(xla - want) / jnp.linalg.norm(want))
        assert float(jnp.linalg.norm(cudnn - want) / jnp.linalg.norm(want)) < 2 * own + 2e-3
