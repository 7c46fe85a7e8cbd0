"""Properties of the transformer itself; parity with Hugging Face is in test_hf_parity.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.config import TINY, RopeScaling
from core.layers import Init
from core.llama import REMAT_POLICIES, Compute, Llama

SMALL = dataclasses.replace(TINY, vocab_size=50, hidden_size=32, intermediate_size=48, num_heads=4, head_dim=8)


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(SMALL, jax.random.key(0), init=Init(std=0.2))


@pytest.fixture(scope="module")
def ids() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (3, 12), 0, SMALL.vocab_size)


def test_causal_by_gradient(model: Llama, ids: jax.Array) -> None:
    x_BTD = model.embed(ids)
    gradient = jax.jit(jax.grad(lambda x, t: model.hidden(x)[:, t].sum()))
    for t in (0, 5, 10):
        grad_BTD = gradient(x_BTD, t)
        assert not grad_BTD[:, t + 1 :].any()
        assert jnp.abs(grad_BTD[:, : t + 1]).sum(axis=(0, 2)).min() > 0


def test_padding_on_the_right_changes_nothing(model: Llama, ids: jax.Array) -> None:
    short = model(ids[:, :7])
    np.testing.assert_allclose(model(ids)[:, :7], short, atol=2e-5)


def test_cache_steps_equal_full_pass(model: Llama, ids: jax.Array) -> None:
    full = model.hidden(model.embed(ids))
    x, cache = model.extend(model.embed(ids[:, :4]), model.init_cache(3, 12))
    parts, step = [x], jax.jit(model.extend)
    for t in range(4, 12):
        x, cache = step(model.embed(ids[:, t : t + 1]), cache)
        parts.append(x)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=2e-5)
    assert cache.lengths_B.tolist() == [12, 12, 12]


def test_cache_of_rows_with_different_lengths(model: Llama, ids: jax.Array) -> None:
    lengths_B = jnp.array([2, 5, 4])
    _, cache = model.extend(model.embed(ids[:, :5]), model.init_cache(3, 8), lengths_B)
    x, _ = model.extend(model.embed(ids[:, 5:7]), cache)
    hidden = jax.jit(lambda row: model.hidden(model.embed(row[None]))[0])
    for row, length in enumerate(lengths_B.tolist()):
        alone = jnp.concatenate([ids[row, :length], ids[row, 5:7], jnp.zeros(5 - length, int)])
        np.testing.assert_allclose(x[row], hidden(alone)[length : length + 2], atol=2e-5)


def test_a_row_past_its_cache_is_nan_and_no_other(model: Llama, ids: jax.Array) -> None:
    _, cache = model.extend(model.embed(ids[:, :4]), model.init_cache(3, 4), jnp.array([4, 3, 2]))
    x, _ = model.extend(model.embed(ids[:, 4:5]), cache)
    assert jnp.isnan(x[0]).all()
    assert not jnp.isnan(x[1:]).any()


def test_dynamic_rope_refuses_a_cache_past_the_limit() -> None:
    config = dataclasses.replace(SMALL, max_position_embeddings=8, rope_scaling=RopeScaling("dynamic", 2.0))
    model = Llama(config, jax.random.key(0))
    model.init_cache(1, 8)
    with pytest.raises(ValueError, match=r"cache of 9 positions.*max_position_embeddings 8"):
        model.init_cache(1, 9)


def test_dynamic_rope_depends_on_padded_length_only_beyond_the_limit(ids: jax.Array) -> None:
    config = dataclasses.replace(SMALL, max_position_embeddings=8, rope_scaling=RopeScaling("dynamic", 4.0))
    model = Llama(config, jax.random.key(0), init=Init(std=0.2))
    within, padded = model(ids[:, :6]), model(ids[:, :8])
    np.testing.assert_allclose(padded[:, :6], within, atol=2e-5)
    assert jnp.abs(model(ids)[:, :6] - within).max() > 1e-3


def test_remat_policies_change_no_gradient(ids: jax.Array) -> None:
    def gradient(remat: str) -> nnx.State:
        graphdef, state = nnx.split(Llama(SMALL, jax.random.key(0), Compute(remat=remat)))
        return jax.jit(jax.grad(lambda s: (nnx.merge(graphdef, s)(ids) ** 2).mean()))(state)

    plain = gradient("none")
    for remat in REMAT_POLICIES.keys() - {"none"}:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, gradient(remat))


def test_unknown_remat_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'some'.*full, dots, none"):
        Compute(remat="some")


def test_layer_outputs_end_in_hidden(model: Llama, ids: jax.Array) -> None:
    x_BTD = model.embed(ids)
    layers_LBTD = model.layer_outputs(x_BTD)
    assert layers_LBTD.shape == (SMALL.num_layers, 3, 12, SMALL.hidden_size)
    np.testing.assert_allclose(model.norm(layers_LBTD[-1]), model.hidden(x_BTD), atol=1e-6)


def test_bf16_compute_over_float32_parameters(ids: jax.Array) -> None:
    model = Llama(SMALL, jax.random.key(0), Compute(jnp.bfloat16))
    assert model.hidden(model.embed(ids)).dtype == jnp.bfloat16
    logits = model(ids)
    assert logits.dtype == jnp.float32
    exact = Llama(SMALL, jax.random.key(0))(ids)
    assert jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()


def test_dropout_needs_a_key_and_keeps_the_mean(model: Llama, ids: jax.Array) -> None:
    x_BTD = model.embed(ids)
    plain = model.hidden(x_BTD)
    np.testing.assert_array_equal(model.hidden(x_BTD, dropout=0.5), plain)
    one = model.hidden(x_BTD, dropout=0.5, key=jax.random.key(0))
    np.testing.assert_array_equal(one, model.hidden(x_BTD, dropout=0.5, key=jax.random.key(0)))
    assert jnp.abs(one - model.hidden(x_BTD, dropout=0.5, key=jax.random.key(1))).max() > 1e-3
    assert jnp.abs(one - plain).max() > 1e-3


def test_layers_are_stacked_and_differ() -> None:
    model = Llama(SMALL, jax.random.key(0))
    weight = model.layers.mlp.up.weight[...]
    assert weight.shape == (2, 32, 48)
    assert jnp.abs(weight[0] - weight[1]).max() > 0.01


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_branches_of_a_prefix_equal_caches_of_their_own(ids: jax.Array, kv_heads: int) -> None:
    config = dataclasses.replace(SMALL, num_kv_heads=kv_heads)
    model = Llama(config, jax.random.key(0), init=Init(std=0.2))
    lengths_B, beams, steps = jnp.array([2, 5, 4]), 4, 3
    _, prefix = model.extend(model.embed(ids[:, :5]), model.init_cache(3, 5), lengths_B)
    own_BWP = jax.random.randint(jax.random.key(2), (3, beams, steps), 0, config.vocab_size)
    branches, hidden = model.init_branches(prefix, beams, steps), []
    for step in range(steps):
        x, branches = jax.jit(model.extend_branches, static_argnums=3)(
            model.embed(own_BWP[..., step]), prefix, branches, step
        )
        hidden.append(x)
    _, repeated = model.extend(
        model.embed(jnp.repeat(ids[:, :5], beams, axis=0)),
        model.init_cache(3 * beams, 8),
        jnp.repeat(lengths_B, beams),
    )
    alone, _ = jax.jit(model.extend)(model.embed(own_BWP.reshape(3 * beams, steps)), repeated)
    np.testing.assert_allclose(jnp.stack(hidden, axis=2), alone.reshape(3, beams, steps, -1), atol=2e-5)


def test_a_reordered_branch_continues_its_parent(model: Llama, ids: jax.Array) -> None:
    _, prefix = model.extend(model.embed(ids[:1, :5]), model.init_cache(1, 5))
    first_BW, parents_BW, second_BW = jnp.array([[7, 8]]), jnp.array([[1, 1, 0]]), jnp.array([[3, 4, 3]])
    _, branches = model.extend_branches(model.embed(first_BW), prefix, model.init_branches(prefix, 2, 2), 0)
    x, _ = model.extend_branches(model.embed(second_BW), prefix, branches.reordered(parents_BW), 1)
    for beam, own in enumerate(([8, 3], [8, 4], [7, 3])):
        full = model.hidden(model.embed(jnp.concatenate([ids[:1, :5], jnp.array([own])], axis=1)))
        np.testing.assert_allclose(x[0, beam], full[0, -1], atol=2e-5)


def test_branches_refuse_what_their_prefix_and_they_together_exceed() -> None:
    config = dataclasses.replace(SMALL, max_position_embeddings=8, rope_scaling=RopeScaling("dynamic", 2.0))
    for changed, message in (
        (config, r"cache of 9 positions.*max_position_embeddings 8"),
        (dataclasses.replace(SMALL, sliding_window=8), r"9 positions, but the Llama has a sliding_window of 8"),
    ):
        model = Llama(changed, jax.random.key(0))
        prefix = model.init_cache(1, 6)
        model.init_branches(prefix, 2, 2)
        with pytest.raises(ValueError, match=message):
            model.init_branches(prefix, 2, 3)
