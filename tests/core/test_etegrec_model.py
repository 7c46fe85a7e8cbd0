"""The ETEGRec model: what its loss reads, and that generation agrees with scoring every item by teacher forcing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core import rows, sharding
from core.code_sequences import BEGIN, CodeSequence, Template, lay_out
from core.code_sequences import TEXT as TEXT_LEVEL
from core.code_tables import build
from core.config import TINY
from core.layers import Init
from core.llama import Compute
from core.lora import LoRAConfig, LoRAParam
from core.models import ETEGRecConfig, LlamaETEGRecModel
from core.semantic_ids import SemanticIDs
from core.sharding import MeshShape, make_mesh

from .test_semantic_ids import unique_codes

LLAMA = dataclasses.replace(
    TINY, vocab_size=40, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8
)
SIZES = (5, 4, 3)
ITEMS = 24
CODES = unique_codes(SIZES, ITEMS)
IDS = build(CODES, SIZES)
TEXT = Template(prefix=(1, 7), suffix=(9, 8))
# Codes alone and a Llama from scratch; text around them and adapters.
CODES_OF_ALL = np.concatenate([np.zeros((1, 3), np.int32), CODES])
VARIANTS = [(None, None), (TEXT, LoRAConfig(4, 8.0))]
HISTORIES = np.array([[1, 5, 2, 9], [3, 11, 0, 0], [4, 4, 24, 0]])
LENGTHS = np.array([4, 2, 3])
ALL = np.arange(4) < LENGTHS[:, None]

laid_out = jax.jit(lay_out, static_argnums=2, static_argnames="with_target")


def make(template: Template | None = None, lora: LoRAConfig | None = None, **fields: Any) -> LlamaETEGRecModel:
    compute = fields.pop("compute", None)
    config = ETEGRecConfig(LLAMA, SIZES, code_dim=8, template=template, lora=lora, init_std=0.3, **fields)
    model = LlamaETEGRecModel(config, jax.random.key(0), compute=compute, init=Init(0.2))
    for path, adapter in nnx.to_flat_state(nnx.state(model, LoRAParam)):
        if path[-1] == "b":  # at zero it would do nothing
            adapter[...] = 0.2 * jax.random.normal(jax.random.key(1), adapter.shape)
    return model


def jitted(model: LlamaETEGRecModel, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method(model, …)` compiled once."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda s, *inputs: method(nnx.merge(graphdef, s), *inputs))
    return lambda *inputs: compiled(state, *inputs)


def sequences(template: Template | None, with_target: bool = True) -> CodeSequence:
    return laid_out(CODES_OF_ALL[HISTORIES], LENGTHS, template, with_target=with_target)


def teacher_forced(model: LlamaETEGRecModel, history_H: jax.Array, length: jax.Array) -> jax.Array:
    """log p of every item after a history [ITEMS]: each is put behind it and passed whole, without a cache."""
    row_H = jnp.append(history_H, 0)
    rows_IH = jnp.where(jnp.arange(row_H.shape[0]) == length, jnp.arange(1, ITEMS + 1)[:, None], row_H)
    lengths = jnp.full((ITEMS,), length + 1)
    sequence = lay_out(IDS.codes_of(rows_IH), lengths, model.config.template, with_target=True)
    hidden = model.hidden(sequence)
    total = jnp.zeros((ITEMS,))
    for level in range(3):
        logits = model.logits(hidden[jnp.arange(ITEMS), sequence.state + level], level)
        total += jax.nn.log_softmax(logits)[jnp.arange(ITEMS), CODES[:, level]]
    return total


@pytest.mark.parametrize(("template", "lora"), VARIANTS)
def test_every_item_as_a_beam_equals_teacher_forcing(template: Template | None, lora: LoRAConfig | None) -> None:
    model = make(template, lora)
    scores_Bk, items_Bk = jitted(model, lambda m, s: m.top_k(s, IDS, ITEMS, beams=ITEMS))(sequences(template, False))
    force = jitted(model, teacher_forced)
    for row in range(3):
        expected = np.asarray(force(HISTORIES[row], LENGTHS[row]))
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_array_equal(items_Bk[row], order + 1)
        np.testing.assert_allclose(scores_Bk[row], expected[order], atol=2e-5)


def test_few_beams_give_items_with_their_exact_scores_and_none_excluded() -> None:
    model, exclude = make(), HISTORIES
    find = jitted(model, lambda m, s, x: m.top_k(s, IDS, 3, beams=4, exclude=x))
    scores_Bk, items_Bk = (np.asarray(x) for x in find(sequences(None, False), exclude))
    force = jitted(model, teacher_forced)
    for row in range(3):
        expected = np.asarray(force(HISTORIES[row], LENGTHS[row]))
        assert len(set(items_Bk[row].tolist()) - {0}) == 3
        assert not set(items_Bk[row].tolist()) & set(HISTORIES[row].tolist())
        np.testing.assert_allclose(scores_Bk[row], expected[items_Bk[row] - 1], atol=2e-5)


@pytest.mark.parametrize(("template", "lora"), VARIANTS)
def test_loss_reads_every_code_at_the_position_before_it(template: Template | None, lora: LoRAConfig | None) -> None:
    model, sequence = make(template, lora), sequences(template)
    fields = CodeSequence(*map(np.asarray, sequence[:5]))
    target_only = np.arange(4) == LENGTHS[:, None] - 1
    for weights in (ALL, target_only):
        loss = jitted(model, lambda m, s, w: m.loss(m.hidden(s), s, w))(sequence, weights)
        logits = jitted(model, lambda m, s: [m.logits(m.hidden(s), level) for level in range(3)])(sequence)
        expected, counts = np.zeros(3), np.zeros(3)
        for row in range(3):
            for at in range(int(fields.lengths[row])):
                level, item = int(fields.levels[row, at]), int(fields.items[row, at])
                if level >= 0 and weights[row, item]:
                    scores = np.asarray(logits[level][row, at - 1], np.float64)
                    expected[level] += np.log(np.exp(scores).sum()) - scores[fields.codes[row, at]]
                    counts[level] += 1
        np.testing.assert_allclose(loss.totals_L, expected, rtol=1e-5)
        np.testing.assert_array_equal(loss.weights_L, counts)
        assert counts.tolist() == ([9] * 3 if weights is ALL else [3] * 3)


def test_loss_among_siblings_is_what_the_search_scores_by() -> None:
    """Trained so, items' probabilities sum to one; and an empty row, which has no siblings, harms no gradient."""
    model = make()
    search = jitted(model, lambda m, s: m.top_k(s, IDS, ITEMS, beams=ITEMS, normalise="children"))
    scores, items = search(sequences(None, with_target=False))
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, rtol=1e-5)

    def loss(model: LlamaETEGRecModel, rows_BH: jax.Array, lengths_B: jax.Array) -> jax.Array:
        sequence = lay_out(IDS.codes_of(rows_BH), lengths_B, None, with_target=True)
        last_BH = (jnp.arange(rows_BH.shape[1]) == lengths_B[:, None] - 1).astype(jnp.float32)
        return model.loss(model.hidden(sequence), sequence, last_BH, IDS.siblings(rows_BH)).totals_L.sum()

    row, (target, score) = 1, (int(items[1, 4]), float(scores[1, 4]))
    rows_BH = jnp.array([[*HISTORIES[row, :2], target, 0], [0, 0, 0, 0]])
    value, gradients = jitted(model, nnx.value_and_grad(loss))(rows_BH, jnp.array([3, 0]))
    assert float(value) == pytest.approx(-score, rel=1e-5)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("template", [None, TEXT])
def test_causal_by_gradient(template: Template | None) -> None:
    model, sequence = make(template), sequences(template)

    def one_code(m: LlamaETEGRecModel, x_BTD: jax.Array, weights_BH: jax.Array, level: jax.Array) -> jax.Array:
        return m.loss(m.llama.hidden(x_BTD), sequence, weights_BH).totals_L[level]

    gradient = jitted(model, lambda m, *inputs: jax.grad(one_code, argnums=1)(m, *inputs))
    x_BTD = jitted(model, LlamaETEGRecModel.embed)(sequence)
    for item in (0, 2, 3):
        for level in range(3):
            own_T = (np.asarray(sequence.items[0]) == item) & (np.asarray(sequence.levels[0]) == level)
            place = int(np.argmax(own_T))
            weights = np.zeros((3, 4), np.float32)
            weights[0, item] = 1.0
            grad_BTD = np.asarray(gradient(x_BTD, weights, level))
            assert not grad_BTD[0, place:].any()
            assert np.abs(grad_BTD[0, :place]).sum(axis=1).min() > 0
            assert not grad_BTD[1:].any()


def test_padding_on_the_right_changes_nothing() -> None:
    model = make()
    run = jitted(model, lambda m, s, w: (m.loss(m.hidden(s), s, w).totals_L, m.top_k(s, IDS, 5, beams=5)))
    short = run(sequences(None, False), ALL)
    more = np.pad(HISTORIES, ((0, 0), (0, 3)), constant_values=7)
    longer = laid_out(CODES_OF_ALL[more], LENGTHS, None, with_target=False)
    padded = run(longer, np.pad(ALL, ((0, 0), (0, 3))))
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_reindexed_catalogue_gives_new_codes_without_compiling() -> None:
    model, compiled = make(), []

    def losses(m: LlamaETEGRecModel, ids: SemanticIDs) -> jax.Array:
        compiled.append(1)
        sequence = lay_out(ids.codes_of(HISTORIES), LENGTHS, None, with_target=True)
        return m.loss(m.hidden(sequence), sequence, ALL).totals_L

    run = jitted(model, losses)
    again = build(CODES[::-1], SIZES, at_least=IDS.shape)
    before, after = run(IDS), run(again)
    assert len(compiled) == 1 and jnp.abs(before - after).min() > 1e-3


def test_a_template_is_needed_where_the_model_has_one() -> None:
    with pytest.raises(ValueError, match="made with a template: lay its histories out with it"):
        make(TEXT).embed(sequences(None))
    plain = make()  # text in a model that has a begin vector: its Llama's row; the begin vector elsewhere
    none = jnp.zeros((1, 2), jnp.int32)
    text = CodeSequence(none, jnp.array([[TEXT_LEVEL, BEGIN]]), none - 1, jnp.array([1]), jnp.array([0]), none + 3)
    np.testing.assert_array_equal(plain.embed(text)[0], jnp.stack([plain.llama.embed_VD[3], plain.begin_D[...]]))


def test_state_and_adapters() -> None:
    model, sequence = make(TEXT, latent_dim=6, item_dim=10), sequences(TEXT)
    hidden = jitted(model, LlamaETEGRecModel.hidden)(sequence)
    state = model.state(hidden, sequence)
    # prefix 2, three codes an item but the target, suffix 2
    np.testing.assert_array_equal(state, [hidden[row, 2 + 3 * (n - 1) + 1] for row, n in enumerate(LENGTHS.tolist())])
    assert model.enc_adapter is not None and model.dec_adapter is not None
    assert model.enc_adapter(state).shape == (3, 6) and model.dec_adapter(state).shape == (3, 10)
    assert not model.enc_adapter.bias[...].any()
    assert make().enc_adapter is None


@pytest.mark.parametrize("template", [None, TEXT])
def test_the_state_before_an_item_is_that_of_the_history_before_it(template: Template | None) -> None:
    model, sequence = make(template), sequences(template)
    hidden = jitted(model, LlamaETEGRecModel.hidden)(sequence)
    rows, places = jnp.array([0, 1, 2]), jnp.asarray(LENGTHS) - 1
    last = model.state_before(hidden, sequence, rows, places)
    np.testing.assert_array_equal(last, model.state(hidden, sequence))
    if template is None:
        shorter = lay_out(IDS.codes_of(jnp.asarray(HISTORIES[:1, :3])), jnp.array([3]), None, with_target=True)
        earlier = model.state_before(hidden, sequence, jnp.array([0]), jnp.array([2]))
        np.testing.assert_allclose(earlier, model.state(model.hidden(shorter), shorter), atol=1e-5)


def test_tables_may_be_shared_and_must_fit() -> None:
    shared = nnx.Param(jnp.ones((5, 8)))
    config = ETEGRecConfig(LLAMA, SIZES, code_dim=8)
    model = LlamaETEGRecModel(config, jax.random.key(0), tables=[shared])
    assert model.tables[0] is shared and model.tables[2].shape == (3, 8)
    with pytest.raises(ValueError, match=r"table of level 1: shape \(5, 8\); the levels' are \[\(5, 8\), \(4, 8\)"):
        LlamaETEGRecModel(config, jax.random.key(0), tables=[shared, shared])


def test_a_code_table_of_other_alphabets_is_refused() -> None:
    other = build(CODES, (5, 4, 4))
    with pytest.raises(ValueError, match=r"levels of \(5, 4, 4\) codes, the model of \(5, 4, 3\)"):
        make().top_k(sequences(None, False), other, 1, beams=1)


def test_bfloat16_scores_stay_float32_and_near() -> None:
    exact, rough = (
        jitted(make(compute=compute), lambda m, s: m.top_k(s, IDS, ITEMS, beams=ITEMS))(sequences(None, False))
        for compute in (Compute(), Compute(jnp.bfloat16))
    )
    assert rough[0].dtype == jnp.float32
    np.testing.assert_allclose(rough[0], exact[0], atol=0.2)


@pytest.mark.slow
def test_a_mesh_changes_nothing() -> None:
    mesh, graphdef_and_state = make_mesh(MeshShape(2, 2)), nnx.split(make(TEXT))
    histories, lengths = np.concatenate([HISTORIES, HISTORIES[:1]]), np.append(LENGTHS, 1)

    def both(state: nnx.State, ids: SemanticIDs, histories: jax.Array, lengths: jax.Array) -> Any:
        model = nnx.merge(graphdef_and_state[0], state)
        asked = lay_out(ids.codes_of(histories), lengths, TEXT, with_target=False)
        supervised = jnp.arange(4) < lengths[:, None]
        loss = model.loss(model.hidden(asked), asked, supervised)
        return loss, model.top_k(asked, ids, 5, beams=6, exclude=histories)

    def on_mesh(*inputs: Any) -> Any:
        with rows.on(mesh):
            return both(*inputs)

    state = graphdef_and_state[1]
    wanted = jax.jit(both)(state, IDS, histories, lengths)
    placed = sharding.place(state, mesh), sharding.place(IDS, mesh), *sharding.split_rows((histories, lengths), mesh)
    for a, b in zip(jax.tree.leaves(jax.jit(on_mesh)(*placed)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
