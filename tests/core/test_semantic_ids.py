"""The code table and its trie against plain loops over the codes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.code_tables import build, verify, version_of
from core.functional import Buffer
from core.semantic_ids import SemanticIDs, TableShape

SIZES = (5, 4, 6, 3)
# Two dense levels; three levels of real codes; one level alone; one dense level because two would be too large.
ALPHABETS = [SIZES, (3, 7), (9,), (2**12, 2**11, 5, 2)]

step = jax.jit(SemanticIDs.step, static_argnums=1)
first_leaf = jax.jit(SemanticIDs.first_leaf, static_argnums=1)


def unique_codes(sizes: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray:
    """Distinct random codes [count, L] in random order."""
    rng = np.random.default_rng(seed)
    drawn = np.unique(np.stack([rng.integers(0, size, 6 * count) for size in sizes], axis=1), axis=0)
    return rng.permutation(drawn)[:count]


@pytest.mark.parametrize("sizes", ALPHABETS)
def test_walking_the_trie_finds_the_children_of_every_prefix(sizes: tuple[int, ...]) -> None:
    codes = unique_codes(sizes, 40)
    ids = build(codes, sizes)
    assert ids.shape.dense_levels == (1 if len(sizes) == 1 or sizes[0] > 1000 else 2)
    prefixes = {(): 0}  # → node
    for level in range(len(sizes)):
        nodes = np.array(list(prefixes.values()), np.int32)[None]
        labels, children = (np.asarray(x)[0] for x in step(ids, level, nodes))
        assert labels.shape[1] == ids.shape.widths[level]
        assert labels.min() >= 0 and labels.max() < sizes[level]
        longer = {}
        for row, prefix in enumerate(prefixes):
            found = {(*prefix, int(c)): int(n) for c, n in zip(labels[row], children[row], strict=True) if n >= 0}
            expected = {tuple(c[: level + 1]) for c in codes.tolist() if tuple(c[:level]) == prefix}
            assert found.keys() == expected
            assert (children[row] >= 0).sum() == len(expected)  # none twice
            longer |= found
        prefixes = longer
    items = np.asarray(ids.items_at(jnp.array(list(prefixes.values()))))
    assert {tuple(codes[item - 1]): item for item in items} == dict(zip(prefixes, items, strict=True))
    assert sorted(items) == list(range(1, len(codes) + 1))


@pytest.mark.parametrize("sizes", ALPHABETS)
def test_siblings_are_the_codes_that_lead_to_an_item_from_the_same_prefix(sizes: tuple[int, ...]) -> None:
    codes = unique_codes(sizes, 40 if len(sizes) > 1 else 6)
    found = jax.jit(SemanticIDs.siblings)(build(codes, sizes), np.array([[3, 0], [1, len(codes)]]))
    for level, size in enumerate(sizes):
        assert found[level].shape == (2, 2, size) and found[level].dtype == bool
        for place, item in (((0, 0), 3), ((1, 0), 1), ((1, 1), len(codes))):
            prefix = codes[item - 1][:level]
            expected = codes[(codes[:, :level] == prefix).all(axis=1)][:, level]
            assert set(np.flatnonzero(found[level][place])) == set(expected)
        assert found[level][0, 1].all()  # padding


def test_no_node_has_no_children_and_no_item() -> None:
    ids = build(unique_codes(SIZES, 30), SIZES)
    for level in range(4):
        assert (np.asarray(step(ids, level, jnp.array([[-1, -1]]))[1]) == -1).all()
    assert jax.jit(SemanticIDs.items_at)(ids, jnp.array([-1])).tolist() == [0]


@pytest.mark.parametrize("sizes", ALPHABETS)
def test_ancestors_and_leaf_ranges(sizes: tuple[int, ...]) -> None:
    codes = unique_codes(sizes, 40)
    ids = build(codes, sizes)
    leaves = ids.leaf_of_item[...][: len(codes) + 1]
    path = [np.asarray(nodes) for nodes in jax.jit(SemanticIDs.ancestors)(ids, leaves)]
    assert leaves[0] == -1 and all(nodes[0] == -1 for nodes in path)
    for level in range(len(sizes)):
        node = path[level][1:]
        first, after = (np.asarray(first_leaf(ids, level, at)) for at in (node, node + 1))
        below = [(codes[:, :level] == own[:level]).all(1).sum() for own in codes]
        np.testing.assert_array_equal(after - first, below)
        assert ((first <= leaves[1:]) & (leaves[1:] < after)).all()


def test_codes_are_looked_up_and_padding_has_none() -> None:
    codes = unique_codes(SIZES, 11)
    ids = build(codes, SIZES)
    found = jax.jit(SemanticIDs.codes_of)(ids, jnp.array([[3, 0], [11, 1]]))
    np.testing.assert_array_equal(found, [[codes[2], [0] * 4], [codes[10], codes[0]]])
    assert ids.num_items == 11


def test_a_catalogue_of_similar_size_compiles_nothing() -> None:
    compiled = []

    @jax.jit
    def step(ids: SemanticIDs, nodes: jax.Array) -> jax.Array:
        compiled.append(ids.shape)
        return sum(ids.step(level, nodes)[1].sum() for level in range(4))

    first = build(unique_codes(SIZES, 100), SIZES)
    step(first, jnp.zeros((1, 2), jnp.int32))
    for count, seed in ((99, 1), (110, 2), (3, 3)):
        other = build(unique_codes(SIZES, count, seed), SIZES, at_least=first.shape)
        assert other.shape == first.shape
        step(other, jnp.zeros((1, 2), jnp.int32))
        verify(other)
    assert len(compiled) == 1
    larger = build(unique_codes(SIZES, 200, 4), SIZES, at_least=first.shape)
    assert larger.shape.rows == 256 and larger.shape.joined(first.shape) == larger.shape
    verify(larger)


def test_everything_is_a_buffer_and_a_blank_one_has_the_same_structure() -> None:
    ids = build(unique_codes(SIZES, 30), SIZES)
    graphdef, buffers, rest = nnx.split(ids, Buffer, ...)
    assert not jax.tree.leaves(rest)
    shape = TableShape.from_json(json.loads(json.dumps(dataclasses.asdict(ids.shape))))
    blank_def, blank = nnx.split(SemanticIDs(shape))
    assert blank_def == graphdef
    assert jax.tree.map(lambda x: (x.shape, x.dtype), blank) == jax.tree.map(lambda x: (x.shape, x.dtype), buffers)
    with pytest.raises(ValueError, match="is empty; build it"):
        verify(SemanticIDs(shape))


def test_version_follows_from_codes_and_alphabets_alone() -> None:
    codes = unique_codes(SIZES, 30)
    ids, same = build(codes, SIZES), build(codes.astype(np.int64), SIZES, at_least=build(codes, SIZES).shape)
    np.testing.assert_array_equal(ids.version[...], same.version[...])
    swapped = codes[[1, 0, *range(2, 30)]]
    for other in (version_of(swapped, SIZES), version_of(codes[:-1], SIZES), version_of(codes, (5, 4, 6, 4))):
        assert (np.asarray(ids.version[...]) != other).any()


def test_a_trie_of_another_version_is_refused() -> None:
    codes = unique_codes(SIZES, 30)
    ids, other = build(codes, SIZES), build(codes[::-1], SIZES)
    verify(ids)
    ids.codes_RL[...] = other.codes_RL[...]
    with pytest.raises(ValueError, match=r"content is version \w{16}, but it says"):
        verify(ids)
    ids.version[...] = other.version[...]
    with pytest.raises(ValueError, match="the trie is not that of the code table"):
        verify(ids)
    ids.leaf_of_item[...], ids.item_of_leaf[...] = other.leaf_of_item[...], other.item_of_leaf[...]
    verify(ids)  # the same set of codes: the rest of the trie agrees


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((6, 2), 6, r"item 7 has code 6 at level 2, whose alphabet is 0 … 5; enlarge"),
        ((6, 0), -2, r"item 7 has code -2 at level 0, whose alphabet is 0 … 4"),
        ((6, 3), -1, r"item 7 has code -1 at level 3"),
        ((6,), -1, r"item 7 has no codes \(1 items have none\); tokenize"),
    ],
)
def test_codes_outside_their_alphabet_are_refused(place: tuple[int, ...], value: int, message: str) -> None:
    codes = unique_codes(SIZES, 12)
    codes[place] = value
    with pytest.raises(ValueError, match=message):
        build(codes, SIZES)


def test_other_bad_tables_are_refused() -> None:
    codes = unique_codes(SIZES, 12)
    codes[9] = codes[4]
    with pytest.raises(ValueError, match=r"items 5 and 10 both have the codes .* add a suffix level"):
        build(codes, SIZES)
    with pytest.raises(ValueError, match="no item"):
        build(codes[:0], SIZES)
    for bad in (codes[:, :3], codes[0], codes.astype(float)):
        with pytest.raises(ValueError, match=r"whole numbers of shape \[N, 4\]"):
            build(bad, SIZES)
    with pytest.raises(ValueError, match="do not join"):
        build(codes[:9], SIZES, at_least=build(codes[:9], (5, 5, 6, 3)).shape)
