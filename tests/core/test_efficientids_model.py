"""The EfficientIDS model: what its loss reads, and that inference agrees with it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.clustering import from_assignment
from core.config import TINY
from core.embeddings import Woven, items_only, weave
from core.functional import FunctionalModel
from core.models import LlamaEfficientIDSModel
from core.models.efficientids import EfficientIDSConfig

LLAMA = dataclasses.replace(TINY, vocab_size=40, hidden_size=32, intermediate_size=48, head_dim=16)
ITEMS = 11
CLUSTERS = from_assignment(np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0]), 3)
VARIANTS = [(head, tying) for head in ("full", "two_level") for tying in ("adapter", "shared_mlp")]


def make(head: str = "full", tying: str = "adapter", **fields: object) -> LlamaEfficientIDSModel:
    config = EfficientIDSConfig(LLAMA, ITEMS, item_dim=8, head=head, output_tying=tying, init_std=0.3, **fields)
    return LlamaEfficientIDSModel(config, jax.random.key(0), clusters=CLUSTERS if head == "two_level" else None)


def histories() -> Woven:
    return items_only(jnp.array([[1, 5, 2, 9], [3, 11, 0, 0], [4, 0, 0, 0]]), jnp.array([4, 2, 1]))


def jitted(model: LlamaEfficientIDSModel, method: Callable[..., object]) -> Callable[..., object]:
    """`method(model, …)` compiled once: run op by op, the scan over layers would be compiled at every call."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda s, *inputs: method(nnx.merge(graphdef, s), *inputs))
    return lambda *inputs: compiled(state, *inputs)


@pytest.mark.parametrize(("head", "tying"), VARIANTS)
def test_loss_is_the_sum_over_prefixes_of_minus_log_prob(head: str, tying: str) -> None:
    model = make(head, tying)
    rows, cuts, targets = zip(
        *((row, cut, row[cut]) for row in ([1, 5, 2, 9], [3, 11, 0, 0], [4, 0, 0, 0]) for cut in (1, 2, 3) if row[cut]),
        strict=True,
    )
    prefixes = items_only(jnp.array(rows), jnp.array(cuts))
    log_probs_BN = jitted(model, lambda m, s: m.log_probs(m.last_hidden(s)))(prefixes)
    parts = jitted(model, lambda m, s: m.loss(s, 4))(histories())
    expected = -log_probs_BN[np.arange(len(cuts)), np.array(targets)].sum()
    assert float(parts.item_loss) == pytest.approx(float(expected), rel=1e-5)
    assert parts.num_items == len(cuts) == 4


@pytest.mark.parametrize(("head", "tying"), VARIANTS)
def test_top_k_is_the_order_of_exact_probabilities(head: str, tying: str) -> None:
    model = make(head, tying)
    hidden_BD = jitted(model, lambda m, s: m.last_hidden(s))(histories())
    log_probs_BN, (scores_Bk, ids_Bk) = jitted(model, lambda m, h: (m.log_probs(h), m.top_k(h, ITEMS)))(hidden_BD)
    log_probs_BN = np.asarray(log_probs_BN)
    np.testing.assert_allclose(np.exp(log_probs_BN).sum(axis=1), 1, atol=1e-6)
    order = np.argsort(-log_probs_BN, axis=1)[:, :ITEMS]
    np.testing.assert_array_equal(ids_Bk, order)
    np.testing.assert_allclose(scores_Bk, np.take_along_axis(log_probs_BN, order, axis=1), atol=1e-6)


@pytest.mark.parametrize(("head", "tying"), VARIANTS)
def test_every_parameter_that_is_read_gets_a_gradient(head: str, tying: str) -> None:
    model = make(head, tying)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p, rest).loss(histories(), 4).item_loss))(params)
    zero = {"/".join(map(str, path)) for path, value in nnx.to_flat_state(grads) if not jnp.abs(value[...]).max() > 0}
    assert zero == {"llama/embed_VD"}  # no text in these sequences


def test_frozen_llama_passes_the_input_adapters_gradient() -> None:
    graphdef, adapter, rest = nnx.split(make(), nnx.PathContains("input_adapter"), ...)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p, rest).loss(histories(), 4).item_loss))(adapter)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("head", ["full", "two_level"])
def test_no_label_leaks(head: str) -> None:
    """The log-probability of an item has exactly zero gradient on the inputs at or after it."""
    model = make(head)
    sequence = histories()
    x_BTD = model.input_adapter(model.items(sequence.item_ids))

    def target(x: jax.Array) -> jax.Array:
        return model.log_probs(model.llama.hidden(x)[:, 1])[0, 2]

    grad_TD = jax.grad(target)(x_BTD)[0]
    assert jnp.abs(grad_TD[:2]).min(axis=1).max() > 0
    assert not grad_TD[2:].any()


@pytest.mark.parametrize("head", ["full", "two_level"])
def test_with_text_one_softmax_holds_words_and_items(head: str) -> None:
    """After one prefix, the probabilities of every word and every item as the next position sum to one."""
    model = make(head)
    titles_NK = jnp.full((ITEMS + 1, 2), -1).at[1].set(jnp.array([7, 8]))
    base = weave(jnp.array([[1]]), jnp.array([1]), titles_NK, 3, 6)
    before = jitted(model, lambda m, s: m.loss(s, 2, with_text=True))(base)

    def with_next(m: LlamaEfficientIDSModel, token: jax.Array, item: jax.Array) -> jax.Array:
        place = (0, base.lengths[0])
        longer = Woven(
            base.input_ids.at[place].set(token),
            base.item_ids.at[place].set(item),
            base.item_mask.at[place].set(item > 0),
            base.lengths + 1,
        )
        parts = m.loss(longer, 2, with_text=True)
        return parts.item_loss + parts.text_loss

    tokens = jnp.concatenate([jnp.arange(LLAMA.vocab_size), jnp.zeros(ITEMS, int)])
    items = jnp.concatenate([jnp.zeros(LLAMA.vocab_size, int), jnp.arange(1, ITEMS + 1)])
    losses = jitted(model, lambda m, t, i: jax.lax.map(lambda pair: with_next(m, *pair), (t, i)))(tokens, items)
    probabilities = np.exp(-(np.asarray(losses, np.float64) - float(before.item_loss + before.text_loss)))
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    assert probabilities.min() > 0


def test_items_after_text_are_read_where_their_label_is_not_yet_seen() -> None:
    model = make()
    titles_NK = jnp.full((ITEMS + 1, 2), -1).at[1:].set(jnp.array([7, 8]))
    woven = weave(jnp.array([[1, 5, 2]]), jnp.array([3]), titles_NK, 3, 10)
    places = np.flatnonzero(woven.item_mask[0])
    prefixes = Woven(*(jnp.repeat(x, len(places), axis=0) for x in woven[:3]), jnp.asarray(places))
    log_probs_BN = jitted(model, lambda m, s: m.log_probs(m.last_hidden(s)))(prefixes)
    parts = jitted(model, lambda m, s: m.loss(s, 3))(woven)
    expected = -log_probs_BN[np.arange(3), woven.item_ids[0, places]].sum()
    assert float(parts.item_loss) == pytest.approx(float(expected), rel=1e-5)
    assert parts.num_items == 3


def test_functional_apply_gives_top_items_and_last_logits() -> None:
    """The seed's inference example: text and items in one row, no lengths."""
    graphdef, params = nnx.split(make())
    model = FunctionalModel(graphdef)
    outputs = model.apply(
        params,
        input_ids=jnp.array([[1, 23, 0, 0]]),
        item_ids=jnp.array([[0, 0, 10, 5]]),
        item_mask=jnp.array([[0, 0, 1, 1]]),
        training=False,
        top_k=3,
        exclude=jnp.array([[10, 5]]),
        return_logits=True,
    )
    assert outputs["top_k_items"].shape == (1, 3)
    assert outputs["logits"].shape == (1, ITEMS + 1)
    kept = np.asarray(outputs["logits"][0]).copy()
    kept[[10, 5]] = -np.inf
    assert outputs["top_k_items"][0].tolist() == np.argsort(-kept)[:3].tolist()
    assert not {10, 5} & set(outputs["top_k_items"][0].tolist())


def test_training_flag_points_to_loss() -> None:
    ones = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="loss"):
        make()(ones, ones, ones, training=True)


@pytest.mark.parametrize(("name", "value"), [("item_ids", 12), ("item_ids", -1), ("input_ids", 40), ("exclude", 12)])
def test_ids_out_of_range_are_refused(name: str, value: int) -> None:
    inputs = {key: jnp.ones((1, 2), jnp.int32) for key in ("input_ids", "item_ids", "item_mask", "exclude")}
    inputs[name] = inputs[name].at[0, 1].set(value)
    with pytest.raises(ValueError, match=rf"{name}: ids .*{value}.*expected 0"):
        make()(**inputs)


def test_two_level_without_clusters_is_refused() -> None:
    with pytest.raises(ValueError, match="needs clusters"):
        LlamaEfficientIDSModel(EfficientIDSConfig(LLAMA, ITEMS, head="two_level"), jax.random.key(0))


def test_dropout_only_with_a_key() -> None:
    model = make(dropout=0.5)
    plain = model.loss(histories(), 4).item_loss
    assert plain == make().loss(histories(), 4).item_loss
    assert model.loss(histories(), 4, key=jax.random.key(0)).item_loss != plain
