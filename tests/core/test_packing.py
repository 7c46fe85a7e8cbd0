"""Packing histories into rows on the host, and packed rows through the model: the same as a row each, without leaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.clustering import from_assignment
from core.config import TINY
from core.embeddings import Woven, items_only, weave
from core.llama import Compute, Llama
from core.models import LlamaEfficientIDSModel
from core.models.efficientids import EfficientIDSConfig, LossParts
from core.packing import PackedHistories, PackPlan, _level, pack_histories

ITEMS, BOS = 11, 3
LLAMA = dataclasses.replace(TINY, vocab_size=40, hidden_size=32, intermediate_size=48, head_dim=16, num_layers=2)
CLUSTERS = from_assignment(np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0]), 3)
# Item i has a title of (i mod 4) tokens.
TITLES_NK = np.where(np.arange(3) < np.arange(ITEMS + 1)[:, None] % 4, 20 + np.arange(ITEMS + 1)[:, None], -1)
TITLES_NK[0] = -1
WIDTHS_N = 1 + (TITLES_NK >= 0).sum(1)
HISTORIES = [[1, 5, 2, 9], [3, 11], [4, 4, 7], [8, 10, 6, 1, 2]]


@pytest.fixture(scope="module", autouse=True)
def quick_compile() -> Iterator[None]:
    """Few optimisations: here programs run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def padded(histories: list[list[int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """int32 [P, H], right-padded, and lengths int32 [P]."""
    lengths_P = np.array([len(history) for history in histories], np.int32)
    item_ids_PH = np.zeros((len(histories), width or int(np.max(lengths_P))), np.int32)
    for row, history in enumerate(histories):
        item_ids_PH[row, : len(history)] = history
    return item_ids_PH, lengths_P


def random_histories(rng: np.random.Generator, count: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = rng.integers(0, longest + 1, count)
    return padded([list(rng.integers(1, ITEMS + 1, n)) for n in lengths], longest)


def rows_of(packed: PackedHistories) -> list[list[list[int]]]:
    """The histories that each row holds."""
    return [
        [ids[segments == s].tolist() for s in range(1, segments.max() + 1)]
        for ids, segments in zip(packed.item_ids, packed.segments, strict=True)
    ]


@pytest.mark.parametrize("bos", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_rows_hold_ends_of_the_histories_and_no_more_than_fits(seed: int, bos: int) -> None:
    rng = np.random.default_rng(seed)
    item_ids_PH, lengths_P = random_histories(rng, int(rng.integers(1, 25)), 9)
    plan = PackPlan(8, int(rng.integers(1, 5)), int(rng.integers(12, 40)), int(rng.integers(4, 14)), bos)
    packed = pack_histories(item_ids_PH, lengths_P, WIDTHS_N, plan)
    assert packed.item_ids.shape == packed.segments.shape == (plan.rows, plan.items)
    expected = sorted(
        ids[n - kept : n].tolist() for ids, n, kept in zip(item_ids_PH, lengths_P, packed.kept, strict=True) if kept
    )
    rows = rows_of(packed)
    assert sorted(history for row in rows for history in row) == expected
    assert set(packed.kept[packed.kept > 0]) <= set(range(2, 10))
    for row, segments, length in zip(rows, packed.segments, packed.lengths, strict=True):
        assert sum(bos + WIDTHS_N[history].sum() for history in row) <= plan.positions
        assert length == sum(map(len, row)) and (segments[:length] > 0).all() and not segments[length:].any()
        assert (np.diff(segments[:length]) >= 0).all()


def test_histories_that_fit_are_packed_whole_and_tight() -> None:
    """Sizes 6 + 4, 5 + 5 and 7 + 3 fill three rows of ten; first fit in the given order would need four."""
    ones = np.ones(ITEMS + 1, int)
    item_ids_PH, lengths_P = padded([[n] * n for n in (4, 5, 3, 7, 5, 6)])
    packed = pack_histories(item_ids_PH, lengths_P, ones, PackPlan(6, 3, 10, 10, 0))
    assert packed.kept.tolist() == [4, 5, 3, 7, 5, 6]
    assert packed.lengths.tolist() == [10, 10, 10]


def test_the_longest_give_way_where_there_is_too_much() -> None:
    item_ids_PH, lengths_P = padded([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10], [1, 2, 3, 4, 5, 6], [11, 1]])
    packed = pack_histories(item_ids_PH, lengths_P, np.ones(ITEMS + 1, int), PackPlan(4, 2, 6, 6, 0))
    assert packed.kept.tolist() == [4, 2, 4, 2]
    assert sorted(history for row in rows_of(packed) for history in row) == [
        [3, 4, 5, 6],
        [5, 6, 7, 8],
        [9, 10],
        [11, 1],
    ]


def test_level_is_the_largest_that_fits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 20, rng.integers(1, 8))
        capacity = int(rng.integers(1, 100))
        fitting = [cap for cap in range(21) if np.minimum(sizes, cap).sum() <= capacity]
        level = _level(sizes, capacity)
        assert np.minimum(sizes, level).sum() == np.minimum(sizes, fitting[-1]).sum() <= capacity


def test_a_plan_fills_its_rows() -> None:
    rng = np.random.default_rng(1)
    item_ids_PH, lengths_P = random_histories(rng, 4000, 12)
    lengths_P = np.maximum(lengths_P, 2)
    item_ids_PH = np.where(np.arange(12) < lengths_P[:, None], rng.integers(1, ITEMS + 1, item_ids_PH.shape), 0)
    sizes_P = np.where(item_ids_PH > 0, WIDTHS_N[item_ids_PH], 0).sum(1)
    plan = PackPlan.of(sizes_P, lengths_P, rows=16, positions=128, bos=1)
    batches = np.split(np.arange(4000), np.arange(plan.histories, 4000, plan.histories))[:-1]
    shares, kept = [], 0
    for batch in batches:
        packed = pack_histories(item_ids_PH[batch], lengths_P[batch], WIDTHS_N, plan)
        positions = WIDTHS_N[packed.item_ids[packed.segments > 0]].sum() + packed.segments.max(axis=1).sum()
        shares.append(positions / (16 * 128))
        kept += packed.kept.sum()
    assert np.mean(shares) > 0.93
    assert kept > 0.96 * lengths_P[np.concatenate(batches)].sum()


def packed_rows(histories: list[list[int]] = HISTORIES) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All histories in two rows of 24 positions, 12 items."""
    item_ids_PH, lengths_P = padded(histories)
    packed = pack_histories(item_ids_PH, lengths_P, WIDTHS_N, PackPlan(4, 2, 24, 12, 1))
    assert packed.kept.tolist() == lengths_P.tolist()
    return jnp.asarray(packed.item_ids), jnp.asarray(packed.lengths), jnp.asarray(packed.segments)


def sequences(text: bool) -> tuple[Woven, Woven]:
    """The histories packed, and a row each."""
    item_ids_RI, lengths_R, segments_RI = packed_rows()
    item_ids_PH, lengths_P = map(jnp.asarray, padded(HISTORIES))
    if not text:
        return items_only(item_ids_RI, lengths_R, segments_RI), items_only(item_ids_PH, lengths_P)
    titles_NK = jnp.asarray(TITLES_NK)
    return (
        weave(item_ids_RI, lengths_R, titles_NK, BOS, 24, segments_RI),
        weave(item_ids_PH, lengths_P, titles_NK, BOS, 24),
    )


def make(head: str, **fields: Any) -> LlamaEfficientIDSModel:
    config = EfficientIDSConfig(LLAMA, ITEMS, item_dim=8, head=head, init_std=0.3, **fields)  # type: ignore[arg-type]
    return LlamaEfficientIDSModel(config, jax.random.key(0), clusters=CLUSTERS if head == "two_level" else None)


@pytest.mark.parametrize("text", [False, True])
def test_packed_hidden_states_are_those_of_a_row_each(text: bool) -> None:
    packed, single = sequences(text)
    graphdef, state = nnx.split(make("full"))
    hidden = jax.jit(lambda s, sequence: nnx.merge(graphdef, s).hidden(sequence))
    packed_RTD, single_PTD = np.asarray(hidden(state, packed)), np.asarray(hidden(state, single))
    found = 0
    assert packed.segments is not None
    for row, segments in enumerate(np.asarray(packed.segments)):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            (p,) = [
                p for p in range(len(HISTORIES))
                if single.lengths[p] == here.sum()
                and (single.item_ids[p, : here.sum()] == packed.item_ids[row, here]).all()
            ]  # fmt: skip
            np.testing.assert_allclose(packed_RTD[row, here], single_PTD[p, : here.sum()], atol=1e-5)
            found += 1
    assert found == len(HISTORIES)


@pytest.mark.parametrize(
    ("head", "text"), [pytest.param("full", False, marks=pytest.mark.slow), ("full", True), ("two_level", True)]
)
def test_packed_loss_and_gradients_are_those_of_a_row_each(head: str, text: bool) -> None:
    graphdef, params, rest = nnx.split(make(head), nnx.Param, ...)

    @jax.jit
    def both(params: nnx.State, sequence: Woven) -> tuple[tuple[jax.Array, LossParts], nnx.State]:
        def total(p: nnx.State) -> tuple[jax.Array, LossParts]:
            parts = nnx.merge(graphdef, p, rest).loss(sequence, 12, with_text=text)
            return parts.item_loss + parts.text_loss, parts

        return jax.value_and_grad(total, has_aux=True)(params)

    packed, single = sequences(text)
    (loss, parts), grads = both(params, packed)
    (expected, expected_parts), expected_grads = both(params, single)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert parts.num_items == expected_parts.num_items == sum(map(len, HISTORIES)) - (0 if text else len(HISTORIES))
    assert parts.num_tokens == expected_parts.num_tokens
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-4), grads, expected_grads)


def gradient_of_position(llama: Llama, segments_BT: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
    """(inputs [B, T, D], a position of row 0) → the gradient of a function of its hidden state."""
    graphdef, state = nnx.split(llama)

    def value(x_BTD: jax.Array, position: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, state).hidden(x_BTD, segments_BT=segments_BT)[0, position] ** 3).sum()

    return jax.jit(jax.grad(value))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_crosses_a_border_or_time(remat: str) -> None:
    segments_BT = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0]])
    llama = Llama(LLAMA, jax.random.key(0), Compute(remat=remat))
    x_BTD = jax.random.normal(jax.random.key(1), (1, 10, LLAMA.hidden_size))
    gradient = gradient_of_position(llama, segments_BT)
    for position, sees in ((1, [0, 1]), (2, [0, 1, 2]), (3, [3]), (5, [3, 4, 5]), (7, [7]), (9, [8, 9])):
        grad_TD = np.asarray(gradient(x_BTD, position)[0])
        reached = np.flatnonzero(np.abs(grad_TD).max(axis=1))
        assert reached.tolist() == sees
        assert not grad_TD[np.setdiff1d(np.arange(10), sees)].any()


def test_a_segment_does_not_depend_on_where_it_stands() -> None:
    """Rotations begin anew: alone, or behind seven other positions."""
    llama = Llama(LLAMA, jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (1, 10, LLAMA.hidden_size))
    alone = llama.hidden(x_BTD[:, 7:])
    behind = llama.hidden(x_BTD, segments_BT=jnp.array([[1] * 4 + [2] * 3 + [3] * 3]))
    np.testing.assert_allclose(behind[:, 7:], alone, atol=1e-5)
    assert jnp.abs(llama.hidden(x_BTD)[:, 7:] - alone).max() > 1e-2


def test_one_segment_is_the_plain_pass() -> None:
    llama = Llama(LLAMA, jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 6, LLAMA.hidden_size))
    one = llama.hidden(x_BTD, segments_BT=jnp.ones((2, 6), jnp.int32))
    np.testing.assert_allclose(one, llama.hidden(x_BTD), atol=1e-6)


def test_packed_rows_have_no_single_end() -> None:
    with pytest.raises(ValueError, match="packed rows are for `loss`"):
        make("full").last_hidden(sequences(text=False)[0])
