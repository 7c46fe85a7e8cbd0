"""Popularity and item-kNN against plain loops, and that they count nothing that is held out."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from flax import nnx

from core.functional import Buffer
from efficientids.data.dataset import Dataset
from efficientids.data.layout import Contents
from efficientids.data.writing import write_dataset
from efficientids.recommenders import item_knn
from efficientids.recommenders.base import Histories
from efficientids.recommenders.item_knn import ItemKNN, ItemKNNSpec, neighbour_table
from efficientids.recommenders.popularity import Popularity, PopularitySpec, popularity_scores

ITEMS, USERS, LONGEST = 15, 12, 9
SPEC = ItemKNNSpec(
    ITEMS, neighbours=4, max_items=6, window=3, distance_power=0.7, backward=0.4, source_power=0.6, target_power=0.2,
    recency=0.8, popularity_weight=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def histories() -> list[list[int]]:
    """Training histories; items repeat, one user has a single item, and the last item is in none."""
    rng = np.random.default_rng(3)
    lengths = [1, *rng.integers(2, LONGEST + 1, USERS - 1)]
    return [rng.integers(1, ITEMS, n).tolist() for n in lengths]


def flat(histories: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(histories).astype(np.int32), np.cumsum([0, *map(len, histories)])


def padded(rows: list[list[int]]) -> Histories:
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), max(1, *lengths)), np.int32)
    for row, items in enumerate(rows):
        ids[row, : len(items)] = items
    return Histories(ids, lengths)


def similarities(spec: ItemKNNSpec, histories: list[list[int]]) -> dict[int, dict[int, float]]:
    """s_ij of the module's head, one pair at a time, the `neighbours` largest of each i."""
    counts = np.bincount(np.concatenate(histories), minlength=ITEMS + 1)
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    for items in histories:
        for i, one in enumerate(items):
            for j, other in enumerate(items):
                if i != j and abs(i - j) <= spec.window:
                    pairs[one, other] += abs(i - j) ** -spec.distance_power * (1 if j > i else spec.backward)
    table: dict[int, dict[int, float]] = defaultdict(dict)
    for (one, other), value in pairs.items():
        if value:
            table[one][other] = value / (counts[one] ** spec.source_power * counts[other] ** spec.target_power)
    return {
        one: dict(sorted(row.items(), key=lambda pair: (-pair[1], pair[0]))[: spec.neighbours])
        for one, row in table.items()
    }


@pytest.mark.parametrize("backward", [0.0, 0.4])
@pytest.mark.parametrize("block", [1, 20, 1 << 20])
def test_neighbours_equal_plain_loops(
    histories: list[list[int]], backward: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of any size: one item at a time, a few, all."""
    monkeypatch.setattr(item_knn, "_BLOCK_PAIRS", block)
    spec = dataclasses.replace(SPEC, backward=backward)
    table, expected = neighbour_table(spec, *flat(histories)), similarities(spec, histories)
    assert any(len(row) == spec.neighbours for row in expected.values())
    assert any(len(row) < spec.neighbours for row in expected.values())
    for item in range(ITEMS + 1):
        row = expected.get(item, {})
        kept = table.weights[item] > 0
        assert dict(zip(table.item_ids[item, kept], table.weights[item, kept], strict=True)) == pytest.approx(row)
        assert not table.item_ids[item, ~kept].any()


def test_knn_ranks_by_the_formula(histories: list[list[int]]) -> None:
    system = ItemKNN(SPEC, flat(histories))
    rows = [[1, 2, 3], [4], [1, 2, 3, 4, 5, 6, 7, 8], [ITEMS], []]
    seen = [[1, 2, 3], [4, 9], [], [], []]
    k = ITEMS + 2
    ranked = system.recommend(system.init(jax.random.key(0)), padded(rows), k, padded(seen).item_ids)
    assert ranked.item_ids.shape == ranked.scores.shape == (5, k)
    near, popularity = similarities(SPEC, histories), popularity_scores(flat(histories)[0], ITEMS)
    for row, exclude, ids, scores in zip(rows, seen, *ranked, strict=True):
        expected = {item: SPEC.popularity_weight * popularity[item] for item in range(1, ITEMS + 1)}
        for age, item in enumerate(reversed(row[-SPEC.max_items :])):
            for other, weight in near.get(item, {}).items():
                expected[other] += SPEC.recency**age * weight
        left = {item: score for item, score in expected.items() if item not in exclude}
        assert dict(zip(ids[: len(left)].tolist(), scores[: len(left)].tolist(), strict=True)) == pytest.approx(left)
        assert (np.diff(scores[: len(left)]) <= 0).all()
        assert not ids[len(left) :].any() and np.isneginf(scores[len(left) :]).all()


def test_ranking_in_chunks_of_rows_is_the_same(histories: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    system = ItemKNN(SPEC, flat(histories))
    model = system.init(jax.random.key(0))
    whole = system.recommend(model, padded(histories), 5, None)
    monkeypatch.setattr(item_knn, "_CHUNK_ELEMENTS", 50)
    jax.clear_caches()
    chunked = system.recommend(model, padded(histories), 5, None)
    assert np.array_equal(whole.item_ids, chunked.item_ids) and np.array_equal(whole.scores, chunked.scores)


def test_popularity_never_ties() -> None:
    """Items 2 and 4 occur twice, 1 once, 3 and 5 never: equal counts stand in the order of the index."""
    system = Popularity(PopularitySpec(5), np.array([2, 4, 1, 4, 2]))
    ranked = system.recommend(system.init(jax.random.key(0)), padded([[3], []]), 5, np.array([[0], [4]], np.int32))
    assert ranked.item_ids.tolist() == [[2, 4, 1, 3, 5], [2, 1, 3, 5, 0]]
    assert ranked.scores[0].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def held_out_systems(train: list[list[int]]) -> list[tuple[ItemKNN | Popularity, ItemKNN | Popularity]]:
    """(counted, blank) of both kinds."""
    spec = PopularitySpec(ITEMS)
    return [(ItemKNN(SPEC, flat(train)), ItemKNN(SPEC)), (Popularity(spec, flat(train)[0]), Popularity(spec))]


def test_a_blank_model_has_the_shapes_of_a_counted_one(histories: list[list[int]]) -> None:
    """What a checkpoint is restored into, and everything in it a buffer: nothing to train."""
    for counted, blank in held_out_systems(histories):
        states = [nnx.state(nnx.eval_shape(system.init, jax.random.key(0))) for system in (counted, blank)]
        shapes = [[(path, leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(s)] for s in states]
        assert shapes[0] == shapes[1] and shapes[0]
        assert all(isinstance(v, Buffer) for _, v in nnx.to_flat_state(states[0]))
        assert counted.plan() == []


def test_nothing_held_out_is_counted(tmp_path: Path) -> None:
    """Other validation and test items: the same models to the bit; another training item: not."""
    rng = np.random.default_rng(8)
    histories = [rng.integers(1, ITEMS + 1, n).tolist() for n in rng.integers(4, LONGEST + 1, USERS)]

    def states(name: str, held: int, train: int) -> list[list[np.ndarray]]:
        """The two models' buffers, with each user's last two items and the first one moved on by so many ids."""
        rows = [[i % ITEMS + 1 if at < train else (i + 6) % ITEMS + 1 if at >= len(h) - held else i
                 for at, i in enumerate(h)] for h in histories]  # fmt: skip
        items, offsets = written(tmp_path / name, rows).training_histories()
        systems = ItemKNN(SPEC, (items, offsets)), Popularity(PopularitySpec(ITEMS), items)
        return [jax.tree.leaves(nnx.state(system.init(jax.random.key(0)))) for system in systems]

    as_is, held_out, trained = states("a", 0, 0), states("b", 2, 0), states("c", 0, 1)
    for one, two, three in zip(as_is, held_out, trained, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))
        assert not all(np.array_equal(x, y) for x, y in zip(one, three, strict=True))


def written(path: Path, histories: list[list[int]]) -> Dataset:
    lengths = [len(history) for history in histories]
    items = pl.DataFrame(
        {"item": np.arange(1, ITEMS + 1, dtype=np.int32), "item_id": [f"i{i}" for i in range(1, ITEMS + 1)]}
    )
    users = pl.DataFrame(
        {"user": np.arange(len(lengths), dtype=np.int32), "user_id": [f"u{u}" for u in range(len(lengths))]}
    )
    flat_ids, offsets = flat(histories)
    times = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    order = {"rule": "time", "tie_break": "none"}
    return write_dataset(path, Contents("held", "test", items, users, flat_ids, times, offsets, order, {}))


def test_specs_survive_json() -> None:
    assert ItemKNNSpec.from_json(SPEC.to_json()) == SPEC
    assert PopularitySpec.from_json(PopularitySpec(7).to_json()) == PopularitySpec(7)
    with pytest.raises(TypeError):
        ItemKNNSpec.from_json({**SPEC.to_json(), "unknown": 1})


@pytest.mark.parametrize(("field", "value"), [("neighbours", 0), ("recency", 0.0), ("recency", 1.1), ("backward", -1)])
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SPEC, **{field: value})


def test_ids_and_offsets_out_of_range_are_refused(histories: list[list[int]]) -> None:
    items, offsets = flat(histories)
    with pytest.raises(ValueError, match="item ids"):
        neighbour_table(ItemKNNSpec(ITEMS - 3), items, offsets)
    with pytest.raises(ValueError, match="offsets"):
        neighbour_table(SPEC, items, offsets[:-1])
    system = ItemKNN(SPEC, (items, offsets))
    with pytest.raises(ValueError, match="histories"):
        system.recommend(system.init(jax.random.key(0)), padded([[ITEMS + 1]]), 3, None)
