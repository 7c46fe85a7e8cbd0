"""The beam search against plain loops, over a model that is a table of logits for every prefix."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.beam_search import Normalise, beam_search
from core.code_tables import build
from core.semantic_ids import SemanticIDs

from .test_semantic_ids import unique_codes

SIZES = (4, 3, 5, 2)
ROWS = 3


class Tables:
    """Random logits of every prefix, and what follows from them by plain loops."""

    def __init__(self, seed: int, spread: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        shapes = [(ROWS, *SIZES[: level + 1]) for level in range(4)]
        self.logits = [(spread * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]

    def score(self, row: int, codes: np.ndarray, catalogue: np.ndarray, normalise: Normalise) -> float:
        return sum(self._gain(row, codes, level, catalogue, normalise) for level in range(4))

    def plain(
        self, row: int, catalogue: np.ndarray, beams: int, k: int, excluded: set[int], normalise: Normalise = "alphabet"
    ) -> list[tuple[float, int]]:
        """Beam search over prefixes as tuples: (score, item) best first."""
        left = {tuple(c): i + 1 for i, c in enumerate(catalogue.tolist()) if i + 1 not in excluded}
        kept = [(0.0, ())]
        for level in range(4):
            longer = {codes[: level + 1] for codes in left}
            longer = {codes for codes in longer if any(codes[:level] == prefix for _, prefix in kept)}
            scored = [(self.prefix_score(row, codes, catalogue, normalise), codes) for codes in longer]
            kept = sorted(scored, key=lambda x: -x[0])[: beams if level < 3 else k]
        return [(score, left[codes]) for score, codes in kept]

    def prefix_score(self, row: int, codes: tuple[int, ...], catalogue: np.ndarray, normalise: Normalise) -> float:
        whole = catalogue[(catalogue[:, : len(codes)] == codes).all(1)][0]
        return sum(self._gain(row, whole, level, catalogue, normalise) for level in range(len(codes)))

    def _gain(self, row: int, codes: np.ndarray, level: int, catalogue: np.ndarray, normalise: Normalise) -> float:
        logits = self.logits[level][(row, *codes[:level])].astype(np.float64)
        siblings = catalogue[(catalogue[:, :level] == codes[:level]).all(1), level]
        over = logits if normalise == "alphabet" else logits[np.unique(siblings)]
        return float(logits[codes[level]] - np.log(np.exp(over).sum()))


def advance(logits: list[jax.Array], carry: jax.Array | None, level: int, parents: jax.Array, codes: jax.Array) -> Any:
    """A model whose carry is the prefix that each beam stands at."""
    prefix = codes[..., None]
    if carry is not None:
        kept = jnp.take_along_axis(carry, parents[..., None], axis=1)
        prefix = jnp.concatenate([kept, prefix], axis=2)
    return logits[level][(jnp.arange(ROWS)[:, None], *jnp.moveaxis(prefix, 2, 0))], prefix


@functools.partial(jax.jit, static_argnames=("k", "beams", "normalise"))
def search(ids: SemanticIDs, logits: list[jax.Array], exclude: jax.Array | None, **options: Any) -> Any:
    model = functools.partial(advance, logits)
    return beam_search(ids, logits[0], None, model, exclude_BX=exclude, **options)


def results(tables: Tables, ids: SemanticIDs, exclude: np.ndarray | None = None, **options: Any) -> Iterator[Any]:
    scores, items = search(ids, tables.logits, exclude, **options)
    return zip(np.asarray(scores), np.asarray(items), strict=True)


@pytest.mark.parametrize("normalise", ["alphabet", "children"])
def test_enough_beams_equal_scoring_every_item(normalise: Normalise) -> None:
    codes = unique_codes(SIZES, 60)
    tables = Tables(0)
    for row, (scores, items) in enumerate(results(tables, build(codes, SIZES), k=60, beams=60, normalise=normalise)):
        expected = np.array([tables.score(row, code, codes, normalise) for code in codes])
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_array_equal(items, order + 1)
        np.testing.assert_allclose(scores, expected[order], atol=1e-5)


@pytest.mark.parametrize("normalise", ["alphabet", "children"])
@pytest.mark.parametrize(("beams", "k"), [(1, 1), (3, 2), (7, 7)])
def test_few_beams_equal_a_plain_beam_search(beams: int, k: int, normalise: Normalise) -> None:
    codes = unique_codes(SIZES, 60)
    tables, ids = Tables(1, spread=2.0), build(codes, SIZES)
    for row, (scores, items) in enumerate(results(tables, ids, k=k, beams=beams, normalise=normalise)):
        expected = tables.plain(row, codes, beams, k, set(), normalise)
        assert items.tolist() == [item for _, item in expected]
        np.testing.assert_allclose(scores, [score for score, _ in expected], atol=1e-5)
        assert len(set(items.tolist())) == k


@pytest.mark.parametrize("beams", [4, 60])
def test_excluded_items_never_come_out_and_take_no_beam(beams: int) -> None:
    codes = unique_codes(SIZES, 60)
    tables, ids = Tables(2, spread=2.0), build(codes, SIZES)
    best = [items for _, items in results(tables, ids, k=4, beams=4)]
    # The best of each row, with everything that shares its first code; unordered, one twice, padded with 0.
    whole = np.flatnonzero(codes[:, 0] == codes[best[0][0] - 1, 0]) + 1
    exclude = np.zeros((ROWS, 32), np.int32)
    exclude[0, : len(whole)] = whole[::-1]
    exclude[1, :5] = [*best[1], best[1][0]]
    for row, (scores, items) in enumerate(results(tables, ids, exclude, k=4, beams=beams)):
        expected = tables.plain(row, codes, beams, 4, set(exclude[row].tolist()))
        assert items.tolist() == [item for _, item in expected]
        np.testing.assert_allclose(scores, [score for score, _ in expected], atol=1e-5)


def test_what_is_left_comes_out_however_few_the_beams() -> None:
    codes = unique_codes(SIZES, 60)
    exclude = np.stack([np.delete(np.arange(1, 61), left) for left in ([3, 40], [7, 8], [20, 59])]).astype(np.int32)
    for row, (scores, items) in enumerate(results(Tables(3), build(codes, SIZES), exclude, k=3, beams=3)):
        left = sorted(set(range(1, 61)) - set(exclude[row].tolist()))
        assert sorted(items[:2].tolist()) == left and items[2] == 0
        assert np.isfinite(scores[:2]).all() and scores[2] == -np.inf
    nothing = np.broadcast_to(np.arange(1, 61, dtype=np.int32), (ROWS, 60))
    for scores, items in results(Tables(3), build(codes, SIZES), nothing, k=3, beams=3, normalise="children"):
        assert not items.any() and (scores == -np.inf).all()


def test_more_results_than_items_are_padded() -> None:
    codes = unique_codes(SIZES, 5)
    for scores, items in results(Tables(4), build(codes, SIZES), k=40, beams=40):
        assert sorted(items[:5].tolist()) == [1, 2, 3, 4, 5] and not items[5:].any()
        assert np.isfinite(scores[:5]).all() and (scores[5:] == -np.inf).all()


@pytest.mark.parametrize("k", [5, 60])
def test_equal_scores_come_by_item_id(k: int) -> None:
    codes = unique_codes(SIZES, 60)
    for _, items in results(Tables(0, spread=0.0), build(codes, SIZES), k=k, beams=60):
        assert items.tolist() == list(range(1, k + 1))


def test_codes_follow_their_parents() -> None:
    # The seed's beams kept codes of one parent under the prefix of another: (0, 1) and (1, 0) would come out.
    codes = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 2, 0]])
    tables = Tables(5)
    for logits in tables.logits:
        logits[...] = 0.0
    tables.logits[0][:, 0] = 1.0  # the first code leads at first,
    tables.logits[1][:, 1, 1] = 9.0  # the second from the second level on: the beams change places.
    # What comes next depends on the prefix: under the other beam's the order would be another.
    tables.logits[2][:, 1, 1, 2], tables.logits[2][:, 0, 0, 1] = 2.0, 5.0
    tables.logits[3][:, 1, 1, 2, 0], tables.logits[3][:, 1, 1, 1, 1] = 0.0, 1.0
    for row, (scores, items) in enumerate(results(tables, build(codes, SIZES), k=3, beams=3)):
        assert items.tolist() == [3, 2, 1]
        expected = [tables.score(row, codes[item - 1], codes, "alphabet") for item in items]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_more_results_than_beams_are_the_last_beams_other_items() -> None:
    """Of one beam, the items below the best prefix; none else."""
    codes, tables = unique_codes(SIZES, 60), Tables(5)
    for row, (scores, items) in enumerate(results(tables, build(codes, SIZES), k=4, beams=1)):
        expected = tables.plain(row, codes, 1, 4, set())
        assert items.tolist() == [item for _, item in expected] + [0] * (4 - len(expected))
        assert (scores[len(expected) :] == -np.inf).all()


def test_bad_requests_are_refused() -> None:
    ids, tables = build(unique_codes(SIZES, 5), SIZES), Tables(0)
    first = jnp.asarray(tables.logits[0])
    for k, beams in ((1, 0), (0, 4)):
        with pytest.raises(ValueError, match=rf"{k} results of {beams} beams"):
            beam_search(ids, first, None, advance, k=k, beams=beams)
    with pytest.raises(ValueError, match="'all': choose alphabet or children"):
        beam_search(ids, first, None, advance, k=1, beams=1, normalise="all")  # type: ignore[arg-type]
