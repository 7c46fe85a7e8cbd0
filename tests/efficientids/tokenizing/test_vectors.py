"""Item vectors on disk, and how they are made alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.errors import UserError
from efficientids.tokenizing.vectors import (
    ItemVectors,
    Standard,
    from_histories,
    joined,
    read_vectors,
    write_vectors,
)  # fmt: skip
from tests.efficientids.tiny import NUM_ITEMS
from tests.efficientids.tokenizing.conftest import WIDTH


def test_vectors_come_back_from_disk(vectors: ItemVectors, tiny_data: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "V.npy"
    write_vectors(file, vectors, tiny_data)
    again = read_vectors(file, tiny_data)
    np.testing.assert_array_equal(again.vectors_NI, vectors.vectors_NI)
    assert again.sources == (("some", WIDTH),) and again.num_items == NUM_ITEMS
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["V.json", "V.npy"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_plain_file_may_lack_the_row_of_padding(
    vectors: ItemVectors, tiny_data: Dataset, tmp_path: Path, first: int
) -> None:
    file = tmp_path / "given.npy"
    given = vectors.vectors_NI.astype(np.float64)
    given[0] = 7.0  # whatever it holds
    np.save(file, given[first:])
    again = read_vectors(file, tiny_data)
    np.testing.assert_array_equal(again.vectors_NI, vectors.vectors_NI)
    assert again.sources == (("given", WIDTH),)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file, rows: np.save(file, rows[:-1]), "30 rows; the 30 items of .* need 31"),
        (lambda file, rows: np.save(file, rows.astype(int)), "expected floats"),
        (lambda file, rows: np.save(file, rows[:, 0]), "expected floats"),
        (lambda file, rows: file.write_text("no array"), r"not a readable \.npy"),
        (lambda file, rows: file.unlink(), "no such file"),
        (lambda file, rows: np.save(file, np.where(np.arange(31)[:, None] == 4, np.nan, rows)), r"item 4 .* \(1 items"),
        (lambda file, rows: np.save(file, rows[:, :-1]), "does not describe V.npy of 9 columns"),
        (lambda file, rows: file.with_suffix(".json").write_text("{}"), "does not describe"),
    ],
)
def test_bad_vectors_are_refused(
    vectors: ItemVectors, tiny_data: Dataset, tmp_path: Path, edit: Callable[..., object], message: str
) -> None:
    file = tmp_path / "V.npy"
    write_vectors(file, vectors, tiny_data)
    edit(file, vectors.vectors_NI)
    with pytest.raises(UserError, match=message):
        read_vectors(file, tiny_data)


def test_vectors_of_other_items_are_refused(vectors: ItemVectors, tiny_data: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "V.npy"
    write_vectors(file, vectors, tiny_data)
    described = json.loads((tmp_path / "V.json").read_text())
    (tmp_path / "V.json").write_text(json.dumps({**described, "items_sha256": "other"}))
    with pytest.raises(UserError, match=r"vectors of other items \(30 of generated-0\)"):
        read_vectors(file, tiny_data)


def test_sources_count_alike() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(size=(6, 2)) + 50, 100 * rng.normal(size=(6, 8))
    narrow[0] = wide[0] = 0
    wide[3] = 0  # of this item the second source knows nothing
    both = joined([("a", narrow), ("b", wide)])
    assert both.sources == (("a", 2), ("b", 8))
    np.testing.assert_allclose(np.linalg.norm(both.vectors_NI[1:, :2], axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(both.vectors_NI[[0, 3], 2:], 0)
    standard = Standard.of(both)
    x = standard.apply(both)
    known = [1, 2, 4, 5]
    squares = [(x[1:, :2] ** 2).mean() * 2, (x[known][:, 2:] ** 2).mean() * 8]
    np.testing.assert_allclose(squares, [5, 5], rtol=1e-4)  # of 10 columns each source has half
    np.testing.assert_allclose(x[known][:, 2:].mean(0), 0, atol=1e-6)
    np.testing.assert_array_equal(x[3, 2:], 0)
    # One source: distances keep their ratios. And no item's depends on which others are there.
    one = ItemVectors(narrow.astype(np.float32), (("a", 2),))
    made = Standard.of(one)
    before, after = (np.linalg.norm(v[1:4] - v[2:5], axis=1) for v in (narrow, made.apply(one)))
    np.testing.assert_allclose(after / before, (after / before)[0], rtol=1e-4)
    fewer = ItemVectors(one.vectors_NI[:3], one.sources)
    np.testing.assert_array_equal(made.apply(fewer), made.apply(one)[:3])
    with pytest.raises(UserError, match=r"2 columns, where the tokenizer was made from 2 \+ 8 columns"):
        standard.apply(one)


def test_histories_give_vectors_of_the_training_part_alone(tmp_path: Path) -> None:
    data = generate(num_users=20, num_items=16, shortest=4, longest=8).write(tmp_path / "data")
    found = from_histories(data, 5, seed=0)
    assert found.shape == (17, 5) and not found[0].any()
    held_out = data.path / "item_ids.npy"
    items = np.load(held_out, allow_pickle=False)
    last = data.offsets[1:] - 1
    items[last] = items[last] % 16 + 1  # other test targets
    data.item_ids = items
    np.testing.assert_array_equal(from_histories(data, 5, seed=0), found)
