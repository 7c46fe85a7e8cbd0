"""Weaving titles between items, and item vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.embeddings import ItemVectors, items_only, weave
from core.layers import Init

BOS = 9
# Title of item 1: two tokens; of item 2: none; of item 3: three.
TITLES_NK = np.array([[-1, -1, -1], [11, 12, -1], [-1, -1, -1], [31, 32, 33]])


def plain_weave(items: list[int], seq_len: int) -> tuple[list[int], list[int]]:
    """The oracle: builds the sequence with lists."""
    blocks = [[(0, item)] + [(int(t), 0) for t in TITLES_NK[item] if t >= 0] for item in items]
    while sum(map(len, blocks)) > seq_len - 1:
        blocks.pop(0)
    row = [(BOS, 0)] + [pair for block in blocks for pair in block]
    return [token for token, _ in row], [item for _, item in row]


@pytest.mark.parametrize("seq_len", [2, 4, 5, 7, 9, 16])
def test_weave_equals_lists(seq_len: int) -> None:
    histories = [[1, 2, 3], [3], [], [2, 1, 1, 3], [3, 3, 2, 2]]
    items_BH = np.zeros((len(histories), 4), np.int32)
    for row, history in enumerate(histories):
        items_BH[row, : len(history)] = history
    lengths_B = np.array([len(history) for history in histories])
    woven = weave(jnp.asarray(items_BH), jnp.asarray(lengths_B), jnp.asarray(TITLES_NK), BOS, seq_len)
    for row, history in enumerate(histories):
        tokens, items = plain_weave(history, seq_len)
        padding = [0] * (seq_len - len(tokens))
        assert woven.input_ids[row].tolist() == tokens + padding
        assert woven.item_ids[row].tolist() == items + padding
        assert woven.lengths[row] == len(tokens)
        assert woven.item_mask[row].tolist() == [item > 0 for item in items + padding]


@pytest.mark.parametrize("seq_len", [16, 20])
def test_weave_of_segments_is_one_history_behind_the_other(seq_len: int) -> None:
    rows = [[[1, 2, 3], [3]], [[2], [2, 2], [1]], [[]], [[3, 3, 2]]]
    items_BH, segments_BH = np.zeros((len(rows), 5), np.int32), np.zeros((len(rows), 5), np.int32)
    for row, histories in enumerate(rows):
        flat = [(item, s) for s, history in enumerate(histories, start=1) for item in history]
        for place, (item, segment) in enumerate(flat):
            items_BH[row, place], segments_BH[row, place] = item, segment
    lengths_B = jnp.asarray((items_BH > 0).sum(1))
    woven = weave(jnp.asarray(items_BH), lengths_B, jnp.asarray(TITLES_NK), BOS, seq_len, jnp.asarray(segments_BH))
    assert woven.segments is not None
    for row, histories in enumerate(rows):
        whole = [plain_weave(history, seq_len) for history in histories if history]
        tokens = [token for tokens, _ in whole for token in tokens]
        items = [item for _, items in whole for item in items]
        segments = [s for s, (tokens, _) in enumerate(whole, start=1) for _ in tokens]
        padding = [0] * (seq_len - len(tokens))
        assert woven.input_ids[row].tolist() == tokens + padding
        assert woven.item_ids[row].tolist() == items + padding
        assert woven.segments[row].tolist() == segments + padding
        assert woven.lengths[row] == len(tokens)


def test_what_does_not_fit_a_packed_row_is_dropped_from_its_end() -> None:
    items_BH, segments_BH = jnp.array([[1, 2, 3, 2]]), jnp.array([[1, 1, 2, 3]])
    woven = weave(items_BH, jnp.array([4]), jnp.asarray(TITLES_NK), BOS, 9, segments_BH)
    assert woven.input_ids[0].tolist() == [BOS, 0, 11, 12, 0, 0, 0, 0, 0]
    assert woven.item_ids[0].tolist() == [0, 1, 0, 0, 2, 0, 0, 0, 0]
    assert woven.segments is not None and woven.segments[0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert woven.lengths[0] == 5


def test_items_only_is_the_history() -> None:
    items_BH = jnp.array([[4, 5, 0], [6, 0, 0]])
    woven = items_only(items_BH, jnp.array([2, 1]))
    assert woven.segments is None
    assert woven.item_mask.tolist() == [[True, True, False], [True, False, False]]
    assert woven.item_ids is items_BH


@pytest.mark.parametrize("rank", [None, 3])
def test_item_vectors_rows_are_the_table(rank: int | None) -> None:
    vectors = ItemVectors(2000, 8, rank, jax.random.key(0), Init(std=0.5))
    ids = jnp.array([[0, 7], [2000, 1]])
    np.testing.assert_allclose(vectors(ids), vectors.table()[ids], rtol=1e-6)
    assert vectors.table().shape == (2001, 8)
    assert vectors.table().std() == pytest.approx(0.5, rel=0.2)
