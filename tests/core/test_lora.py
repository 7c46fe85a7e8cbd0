"""LoRA: the formula, its start, what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.config import TINY
from core.layers import Init, LlamaLinear
from core.llama import Llama
from core.lora import TARGETS, LoRAConfig, LoRAParam, adapters, is_adapter, merged

LORA = LoRAConfig(rank=4, alpha=12.0, targets=TARGETS)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 512, (3, 9)))


def llama(lora: LoRAConfig | None = LORA, seed: int = 0) -> Llama:
    return Llama(TINY, jax.random.key(seed), init=Init(lora=lora))


def with_random_b(model: Llama) -> Llama:
    """Adapters as they are after training: B is not zero."""
    for number, adapter in enumerate(adapters(model).values()):
        adapter.b[...] = 0.3 * jax.random.normal(jax.random.key(number), adapter.b[...].shape)
    return model


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (2, 4)), ((2, 4), (6,)), ((6,), (10,))])
def test_a_map_with_an_adapter_is_the_formula(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    linear = LlamaLinear(jax.random.key(0), "q", inputs, outputs, False, Init(lora=LORA))
    assert linear.adapter is not None
    linear.adapter.b[...] = jax.random.normal(jax.random.key(1), (LORA.rank, *outputs))
    x = np.asarray(jax.random.normal(jax.random.key(2), (3, 5, *inputs)))
    size = int(np.prod(inputs))
    w = np.asarray(linear.weight[...]).reshape(size, -1)
    a = np.asarray(linear.adapter.a[...]).reshape(size, LORA.rank)
    b = np.asarray(linear.adapter.b[...]).reshape(LORA.rank, -1)
    expected = x.reshape(15, size) @ (w + 12.0 / 4 * a @ b)
    np.testing.assert_allclose(np.asarray(linear(jnp.asarray(x))).reshape(15, -1), expected, atol=1e-5)


def test_with_b_at_zero_logits_are_bit_identical() -> None:
    assert (llama()(IDS) == llama(None)(IDS)).all()
    # ... whatever the dtype of the computation.
    half = dataclasses.replace(llama().compute, dtype=jnp.bfloat16)
    plain, adapted = (Llama(TINY, jax.random.key(0), half, Init(lora=lora)) for lora in (None, LORA))
    assert (plain(IDS) == adapted(IDS)).all()


def test_merged_weights_give_the_same_logits_without_adapters() -> None:
    model = with_random_b(llama())
    graphdef, _ = nnx.split(llama(None))
    plain = nnx.merge(graphdef, merged(model))
    assert float(jnp.abs(model(IDS) - llama(None)(IDS)).max()) > 0.1
    np.testing.assert_allclose(plain(IDS), model(IDS), atol=2e-5)


def test_adapters_lie_in_the_stacked_layers_of_their_targets_alone() -> None:
    model = llama(LoRAConfig(2, 4.0, ("v", "down")))
    found = {path[-2]: adapter for path, adapter in adapters(model).items()}
    assert set(found) == {"v", "down"}
    assert found["v"].a[...].shape == (2, 64, 2) and found["v"].b[...].shape == (2, 2, 2, 32)
    assert found["down"].a[...].shape == (2, 256, 2) and found["down"].b[...].shape == (2, 2, 64)
    state = nnx.state(model, is_adapter)
    assert len(jax.tree.leaves(state)) == 4 and {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("float32")
    }
    abstract = nnx.state(nnx.eval_shape(lambda: llama(LoRAConfig(2, 4.0, ("v",)))), is_adapter)
    assert len(jax.tree.leaves(abstract)) == 2


def test_a_starts_within_one_over_the_root_of_its_inputs_and_differs_between_layers() -> None:
    a = next(iter(adapters(llama()).values())).a[...]
    assert 0.9 / 8 < float(jnp.abs(a).max()) <= 1 / 8  # D = 64
    assert not (a[0] == a[1]).all()


def test_the_base_starts_the_same_with_adapters_and_without() -> None:
    base = nnx.state(llama(), nnx.Not(is_adapter))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), base, nnx.state(llama(None))))


def test_dropout_falls_on_the_adapters_input_alone() -> None:
    dropping = LoRAConfig(4, 12.0, TARGETS, dropout=0.5)
    model, still = with_random_b(llama(dropping)), with_random_b(llama())
    x = model.embed(IDS)
    np.testing.assert_array_equal(model.hidden(x), still.hidden(x))  # no key, no dropout
    assert float(jnp.abs(model.hidden(x, key=jax.random.key(1)) - still.hidden(x)).max()) > 0.01
    # With B at zero there is nothing for it to fall on.
    np.testing.assert_array_equal(llama(dropping).hidden(x, key=jax.random.key(1)), llama().hidden(x))


def test_dropout_keeps_the_expectation() -> None:
    linear = LlamaLinear(jax.random.key(0), "q", (64,), (8,), False, Init(lora=LoRAConfig(4, 4.0, dropout=0.5)))
    assert linear.adapter is not None
    linear.adapter.b[...] = jnp.ones((4, 8))
    x = jnp.ones((1, 64))
    mean = jnp.mean(jax.vmap(lambda key: linear(x, key))(jax.random.split(jax.random.key(1), 4000)), axis=0)
    np.testing.assert_allclose(mean, linear(x), atol=0.08)


def test_adapters_are_parameters_of_a_type_of_their_own() -> None:
    graph = nnx.state(llama(), LoRAParam)
    assert len(jax.tree.leaves(graph)) == 2 * len(TARGETS)
    assert issubclass(LoRAParam, nnx.Param)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}, {"dropout": 1.0},
        {"targets": ("q", "x")}, {"targets": ("q", "q")}, {"targets": ()},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="LoRA"):
        LoRAConfig(**{"rank": 4, "alpha": 8.0, **wrong})  # type: ignore[arg-type]
