"""Arithmetic and activations read off a traced program, against what is known of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from core.sharding import MeshShape
from efficientids import systems
from efficientids.options import TrainConfig
from efficientids.planning import traced
from efficientids.planning.bound import bound, passed_bytes
from efficientids.planning.candidates import Candidates, Need
from efficientids.planning.devices import DEVICES
from efficientids.systems.base import Scale
from tests.efficientids.planning.targets import gpu_target, need_plugin

MIB = 2**20
x_f32 = jax.ShapeDtypeStruct((512, 512), jnp.float32)  # 1 MiB
x_bf16 = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
PRODUCT = 2.0 * 512**3


def program(f: Any, *arguments: Any) -> Any:
    return jax.jit(f).trace(*arguments).jaxpr


def test_products_are_counted_by_width_of_operands() -> None:
    found = traced.cost(program(lambda a, b: (a @ b, b.T @ b), x_f32, x_f32))
    assert found.flops_32 == 2 * PRODUCT and found.flops_16 == found.scanned_bytes == 0
    assert traced.cost(program(lambda a: a @ a, x_bf16)).flops_16 == PRODUCT


def test_a_scan_counts_its_length_and_what_it_reads() -> None:
    layers = jax.ShapeDtypeStruct((6, 512, 512), jnp.float32)

    def run(x: jax.Array, layers: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    found = traced.cost(program(run, x_f32, layers))
    assert found.flops == 6 * PRODUCT and found.scanned_bytes == 6 * MIB
    # Forward, then the gradients of input and weights; kept activations are written once and read once.
    both = traced.cost(program(jax.grad(lambda x, w: run(x, w).sum(), argnums=(0, 1)), x_f32, layers))
    assert both.flops == 3 * 6 * PRODUCT and both.scanned_bytes > 4 * 6 * MIB


def test_of_branches_the_dearest_counts() -> None:
    found = traced.cost(program(lambda p, a: jax.lax.cond(p, lambda: a, lambda: a @ a @ a), True, x_f32))
    assert found.flops == 2 * PRODUCT


def test_activations_of_known_programs() -> None:
    # Fused into one: nothing is made but the result, which the caller holds.
    assert traced.activations(program(lambda a, b: jnp.tanh(a) * b + 1, x_f32, x_f32)) == 0
    # A product's result; two at a time where the second reads the first.
    assert traced.activations(program(lambda a, b: a @ b, x_f32, x_f32)) == MIB
    assert traced.activations(program(lambda a, b: a @ b @ b @ b, x_f32, x_f32)) == 2 * MIB
    # What a product reads is written first: tanh(a), then the result.
    assert traced.activations(program(lambda a, b: jnp.tanh(a) @ b, x_f32, x_f32)) == 2 * MIB
    # Both products live until they are added; calls change nothing.
    double = jax.jit(lambda a, b: a @ b)
    assert traced.activations(program(lambda a, b: double(a, b) + double(b, a), x_f32, x_f32)) == 2 * MIB


def test_kept_activations_of_a_scan() -> None:
    layers = jax.ShapeDtypeStruct((6, 512, 512), jnp.float32)

    def loss(x: jax.Array, layers: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0].sum()

    found = traced.activations(program(jax.grad(loss), x_f32, layers))
    assert 6 * MIB <= found <= 16 * MIB  # one or two arrays a layer, and a few at the top


def need(target: Any = None, **flags: Any) -> Need:
    config = TrainConfig(**{"llama_size": "1b", "seq_len": 256, "batch_size": 4, **flags})
    return Candidates(systems.get(config.recommender), Scale(), target or gpu_target(compiles=False)).need(config)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(("train", "passes"), [("frozen", 2), ("full", 3)])
def test_arithmetic_of_a_step_against_the_formula(train: str, passes: int, remat: bool) -> None:
    """Forward, backward through activations and, where they train, into weights; with full remat forward again."""
    found = need(train=train, gradient_checkpointing="full" if remat else "none").bound
    layers, positions, t, d, f, e = 16, 4 * 256, 256, 2048, 8192, 384
    mlp, attention = layers * 3 * d * f, layers * (2 * d * d + 2 * d * 512)
    scores = layers * 2 * t * d  # QK and PV, not halved by causality: XLA computes all of T × T
    own = 3 * (e * 3417 + d * e + d * d + e * d)  # the head, the adapters: they always train
    # What goes back: a product of activations has two gradients. Not computed again: the last product of a layer.
    macs = passes * (mlp + attention) + 3 * scores + own + remat * (mlp * 2 / 3 + attention + scores)
    assert found is not None and found.flops == pytest.approx(2 * positions * macs, rel=0.01)


def test_the_bound_takes_the_slowest_of_three() -> None:
    device, alone = DEVICES["rtx5090"], MeshShape()
    cost = traced.Cost(flops_16=device.matmul_flops, flops_32=0, scanned_bytes=0)
    one = bound(cost, 0, 0, 0, 100, device, alone)
    assert one.seconds == one.compute == 1 and one.link == 0 and one.to_json()["positions_per_s"] == 100
    four = bound(cost, int(64e9), 0, 0, 100, device, MeshShape(4))
    assert four.compute == 0.25 and four.link == pytest.approx(1.5) == four.seconds
    slow = bound(
        traced.Cost(scanned_bytes=2 * device.memory_bandwidth), 0, 0, device.memory_bandwidth, 100, device, alone
    )
    assert slow.memory == slow.seconds == pytest.approx(4)
    assert bound(traced.Cost(flops_32=device.matmul_flops), 0, 0, 0, 1, device, alone).compute == pytest.approx(2)


def test_what_devices_pass_on() -> None:
    """8 bytes of gradients, 100 of frozen weights: over fsdp gathered twice, gradients summed where they stay."""
    assert passed_bytes(8, 100, MeshShape(2)) == 2 * 8 / 2
    assert passed_bytes(8, 100, MeshShape(fsdp=2)) == (2 * (100 + 4) + 8) / 2
    assert passed_bytes(8, 100, MeshShape(data=2, fsdp=2)) == (2 * (100 + 4) + 8) / 2 + 2 * 4 / 2


@pytest.mark.parametrize(
    "flags",
    [{"recommender": "sasrec", "llama_size": "tiny", "seq_len": 200, "batch_size": 128},
     *(pytest.param({"llama_size": "tiny", "seq_len": 256, "batch_size": 64, **more}, marks=pytest.mark.slow)
       for more in ({"gradient_checkpointing": "full"}, {"train": "lora", "lora_rank": 8}))],
)  # fmt: skip
def test_the_estimate_is_near_the_compilers_account(flags: dict[str, Any]) -> None:
    need_plugin()
    found = need(gpu_target(), **flags)
    assert found.compiled is not None
    assert 0.6 < found.estimate.total / found.compiled.peak < 1.6
