"""The compiled step: accumulation, clipping, what is trained, what is frozen, what is decayed, what is donated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from core.clustering import by_popularity, from_assignment
from core.functional import Buffer
from core.layers import Init
from core.lora import LoRAConfig
from core.models.efficientids import EfficientIDSConfig
from efficientids.recommenders.base import Batch, LossSum, OptimizerConfig, Phase, Training, in_llama
from efficientids.recommenders.efficientids import EfficientIDS, EfficientIDSSpec
from efficientids.systems.base import history_spec
from efficientids.training import optimizer
from efficientids.training.step import Program, build_program
from tests.efficientids.tiny import LLAMA, NUM_ITEMS

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, ITEMS = 8, 6
# Behind a large epsilon Adam's first step is nearly the gradient's own: near zero its sign would be rounding's.
ADAM = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, eps=1e-3)
KEY = jax.random.key(3)


def no_batches(seed: int, start_step: int) -> Iterator[Batch]:
    raise AssertionError("a step needs no batches")


def system(
    *, train: str = "full", head: Any = "full", adam: OptimizerConfig = ADAM, quantize: Any = None
) -> EfficientIDS:
    clusters = from_assignment(by_popularity(np.arange(NUM_ITEMS), 5), 5) if head == "two_level" else None
    lora = LoRAConfig(4, 8.0) if train == "lora" else None
    model = EfficientIDSConfig(LLAMA, NUM_ITEMS, item_dim=8, head=head, lora=lora)
    spec = EfficientIDSSpec(model, seq_len=ITEMS, max_seq_len=ITEMS)
    own = None if train == "frozen" else adam
    training = Training(10, 1.0, [history_spec(ITEMS, ROWS)], adam, no_batches, own)
    return EfficientIDS(spec, clusters=clusters, training=training, init=Init(quantize=quantize))


def model_of(recommender: EfficientIDS) -> nnx.Module:
    """The model, filled by NumPy: compiling jax's random numbers takes longer than all that is tested here."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(recommender.init, jax.random.key(0)))

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def program(recommender: EfficientIDS, **options: Any) -> Program:
    plan = recommender.plan()[0]
    return build_program(model_of(recommender), plan, **{"accumulation": 1, "grad_clip": 1.0, **options})


def batch() -> dict[str, np.ndarray]:
    """Histories of 1 to 6 items: the micro-batches have 1, 5, 7 and 9 targets."""
    lengths = np.array([1, 2, 2, 5, 3, 6, 6, 5], np.int32)
    ids = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (ROWS, ITEMS)).astype(np.int32)
    return {"item_ids": np.where(np.arange(ITEMS) < lengths[:, None], ids, 0), "lengths": lengths}


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def close(one: Any, other: Any) -> None:
    """Equal to 1e-5 of the largest value of each array."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-6))


def test_accumulated_micro_batches_equal_the_large_batch() -> None:
    results = []
    for accumulation in (1, 4):
        made = program(system(), accumulation=accumulation)
        before = jax.tree.map(np.asarray, made.state.params)
        state, metrics = made.step(made.state, made.frozen, batch(), KEY)
        moved = jax.tree.map(lambda after, start: np.asarray(after) - start, state.params, before)
        results.append((metrics, optax.tree.get(state.opt_states[0], "mu"), moved))
    (large, large_mu, large_moved), (small, small_mu, small_moved) = results
    assert large["targets"] == small["targets"] == 22
    assert float(small["loss"]) == pytest.approx(float(large["loss"]), rel=1e-5)
    assert float(small["grad_norm"]) == pytest.approx(float(large["grad_norm"]), rel=1e-5)
    close(small_mu, large_mu)
    close(small_moved, large_moved)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(large_moved)) > 1e-3


@pytest.mark.parametrize(("train", "quantize"), [("frozen", None), ("lora", None), ("lora", "nf4")])
def test_frozen_parameters_are_read_and_nothing_else(train: str, quantize: str | None) -> None:
    made = program(system(train=train, quantize=quantize))
    frozen_before, params_before = jax.tree.map(np.array, (made.frozen, made.state.params))
    compiled = made.step.lower(made.state, made.frozen, batch(), KEY).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    written, frozen = size(made.state), size(made.frozen)
    assert frozen > (4_000 if quantize else 20_000)
    # Outputs: the state and three metrics, with a pointer or a little alignment each, and nothing of the Llama's size.
    assert written <= memory.output_size_in_bytes < written + 1000
    # The state is written over itself: donated, and every large array of it aliased.
    assert memory.alias_size_in_bytes > 0.9 * written

    state, _ = made.step(made.state, made.frozen, batch(), KEY)
    model = made.model(state)
    for path, leaf in nnx.to_flat_state(frozen_before):
        np.testing.assert_array_equal(leaf[...], dict(nnx.to_flat_state(nnx.state(model)))[path][...])
    llama = [path for path, _ in nnx.to_flat_state(frozen_before)]
    assert llama and all(in_llama(path, None) for path in llama)
    # The optimisers keep two moments of each trained parameter, two counters, and nothing of the Llama's but adapters'.
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_states)]
    assert not [path for path in paths if "llama" in path and "adapter" not in path]
    assert len(paths) == 2 * len(jax.tree.leaves(params_before)) + 2 * len(state.params)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, params_before)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("head", ["full", "two_level"])
def test_norm_scales_and_biases_are_not_decayed(head: str) -> None:
    """Without a gradient only the decay moves a parameter; all start at one, where it shows."""
    recommender = system(head=head)
    model = model_of(recommender)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(jnp.ones_like, params))
    nothing = LossSum(jnp.zeros(()), jnp.ones(()), jnp.ones(()), {})
    phase = dataclasses.replace(recommender.plan()[0], loss=lambda *_: nothing)
    made = build_program(model, phase, accumulation=1, grad_clip=1.0)
    state, _ = made.step(made.state, made.frozen, batch(), KEY)
    kept, rate = set(), float(optimizer.learning_rate(ADAM, phase.num_steps)(0))
    for path, leaf in nnx.to_flat_state(nnx.merge_state(*state.params)):
        values = np.asarray(leaf[...])
        if (values == 1).all():
            kept.add(".".join(map(str, path)))
        else:
            np.testing.assert_allclose(values, 1 - rate * ADAM.weight_decay, rtol=1e-6)
    scales = {"llama.layers.attention_norm.scale", "llama.layers.mlp_norm.scale", "llama.norm.scale"}
    biases = {"input_adapter.up.bias", "input_adapter.out.bias", "output_adapter.bias", "item_bias_N"}
    assert kept == scales | biases | ({"cluster_bias_C"} if head == "two_level" else set())


class Toy(nnx.Module):
    def __init__(self) -> None:
        self.one, self.two, self.rest = (nnx.Param(jnp.ones(())) for _ in range(3))
        self.table = Buffer(jnp.full((3,), 7.0))


def toy_loss(model: Toy, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
    """Gradients 3 and 4 a target; 12 for the parameter of no group, and 1 for the buffer."""
    total = 3 * model.one[...] + 4 * model.two[...] + 12 * model.rest[...] + model.table[...].sum()
    return LossSum(total * batch["n"].sum(), batch["n"].sum().astype(jnp.float32), batch["n"].sum(), {})


def toy_phase(*filters: Any, **adam: Any) -> Phase:
    config = OptimizerConfig(**{"learning_rate": 0.1, **adam})
    return Phase(
        name="toy", groups=[(f, config) for f in filters], batch_specs=[{"n": jax.ShapeDtypeStruct((2,), jnp.int32)}],
        batches=no_batches, loss=toy_loss, num_steps=10, steps_per_epoch=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 0.2), (2.5, 0.5), (10.0, 1.0), (0.0, 1.0)])
def test_clipping_is_by_the_norm_over_all_groups(clip: float, scale: float) -> None:
    phase = toy_phase(nnx.PathContains("one"), nnx.PathContains("two"))
    made = build_program(Toy(), phase, accumulation=1, grad_clip=clip)
    state, metrics = made.step(made.state, made.frozen, {"n": np.array([2, 3])}, KEY)
    assert float(metrics["grad_norm"]) == pytest.approx(5)  # of the mean over targets, before clipping
    first, second = (float(jax.tree.leaves(optax.tree.get(o, "mu"))[0]) for o in state.opt_states)
    assert (first, second) == pytest.approx((0.1 * 3 * scale, 0.1 * 4 * scale), rel=1e-5)


def test_a_buffer_is_never_trained_whatever_the_filter_says() -> None:
    made = build_program(Toy(), toy_phase(lambda path, leaf: True, weight_decay=0.5), accumulation=1, grad_clip=0.0)
    assert {path[0] for path, _ in nnx.to_flat_state(made.state.params[0])} == {"one", "two", "rest"}
    state, _ = made.step(made.state, made.frozen, {"n": np.array([1, 1])}, KEY)
    assert made.model(state).table[...].tolist() == [7, 7, 7]
    assert made.model(state).rest[...] < 1


def test_a_parameter_in_no_group_is_frozen() -> None:
    made = build_program(Toy(), toy_phase(nnx.PathContains("one"), weight_decay=0.5), accumulation=1, grad_clip=0.0)
    state, metrics = made.step(made.state, made.frozen, {"n": np.array([1, 1])}, KEY)
    assert float(metrics["grad_norm"]) == pytest.approx(3)
    model = made.model(state)
    assert (model.two[...], model.rest[...]) == (1, 1)
    assert model.one[...] < 1


@pytest.mark.parametrize("filter_", [nnx.PathContains("three"), nnx.PathContains("table")])
def test_a_group_that_matches_nothing_is_refused(filter_: Any) -> None:
    with pytest.raises(ValueError, match="phase 'toy': no parameter matches"):
        build_program(Toy(), toy_phase(nnx.PathContains("one"), filter_), accumulation=1, grad_clip=0.0)


def test_the_given_state_is_gone_after_the_step() -> None:
    made = build_program(Toy(), toy_phase(nnx.Param), accumulation=1, grad_clip=0.0)
    made.step(made.state, made.frozen, {"n": np.array([1, 1])}, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((made.state.params, made.state.opt_states)))


def test_learning_rate_rises_to_the_peak_and_falls_to_a_tenth() -> None:
    rate = optimizer.learning_rate(OptimizerConfig(2.0, warmup_steps=4), num_steps=12)
    values = [float(rate(done)) for done in range(12)]
    assert values[:4] == pytest.approx([0.5, 1, 1.5, 2])  # the first step is no step of size 0
    assert values[7] == pytest.approx(0.2 + 1.8 / 2)  # half-way down the cosine
    assert values[11] == pytest.approx(0.2)
    assert values[3:] == sorted(values[3:], reverse=True)
    assert 1.9 < float(optimizer.learning_rate(OptimizerConfig(2.0), num_steps=12)(0)) <= 2
