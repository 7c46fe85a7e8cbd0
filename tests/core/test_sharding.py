"""The mesh, the table of shardings, and losses whose rows lie on several devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from core import hierarchical_softmax, rows, sharding, softmax
from core.clustering import by_popularity, from_assignment
from core.config import TINY
from core.llama import Llama
from core.models.sasrec import SASRec, SASRecConfig
from core.sharding import MeshShape, axes_of, make_mesh, sharding_of

MIXED = MeshShape(2, 2, 2)


@pytest.mark.parametrize(
    ("text", "shape"),
    [("data=2,fsdp=4", MeshShape(2, 4)), ("tensor=2", MeshShape(tensor=2)), (" fsdp = 8 ", MeshShape(fsdp=8))],
)
def test_a_mesh_is_read_and_written(text: str, shape: MeshShape) -> None:
    assert MeshShape.parse(text) == shape
    assert MeshShape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "auto", "data", "data=0", "data=2,data=2", "model=2", "data=2;fsdp=2", "data=-1"])
def test_what_is_no_mesh_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="data=2,fsdp=4"):
        MeshShape.parse(text)


def test_processes_get_their_rows() -> None:
    assert [MeshShape(2, 4).part_of(i, 2) for i in range(2)] == [(0, 2), (1, 2)]
    assert [MeshShape(1, 2, 4).part_of(i, 4) for i in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [MeshShape(tensor=8).part_of(i, 2) for i in range(2)] == [(0, 1), (0, 1)]
    for shape, processes in ((MeshShape(3), 2), (MeshShape(2, 1, 3), 3)):
        with pytest.raises(ValueError, match="processes cannot share"):
            shape.part_of(0, processes)


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="mesh data=99 has 99 devices, and 8 are there"):
        make_mesh(MeshShape(99))


def test_an_adapter_and_a_moment_lie_as_their_base() -> None:
    assert axes_of(("llama", "layers", "attention", "o", "weight")) == ("tensor", None, "fsdp")
    assert axes_of(("0", "mu", "llama", "layers", "attention", "o", "weight")) == ("tensor", None, "fsdp")
    assert axes_of(("attention", "o", "adapter", "a")) == ("tensor", None, None)
    assert axes_of(("mu", "attention", "o", "adapter", "b")) == (None, "fsdp")
    assert axes_of(("attention", "o", "weight", "codes")) == ("tensor", None, "fsdp")
    assert axes_of(("mlp", "down", "weight", "scales")) == ("tensor", "fsdp")
    assert axes_of(("attention", "q", "bias")) == ("tensor", None)
    assert axes_of(("norm", "scale")) is None


def test_stacks_and_what_does_not_divide() -> None:
    mesh = make_mesh(MIXED)
    assert sharding_of(("q", "weight"), (5, 8, 4, 3), mesh).spec == P(None, "fsdp", "tensor", None)
    assert sharding_of(("q", "weight"), (8, 4, 3), mesh).spec == P("fsdp", "tensor", None)
    assert sharding_of(("q", "weight"), (5, 8, 3, 3), mesh).spec == P(None, "fsdp", None, None)
    assert sharding_of(("table_NE",), (31, 7), mesh).spec == P()
    assert sharding_of(("mu", "table_NE"), (31,), mesh).spec == P()  # another optimiser's statistics of it
    tree = {"items": {"table_NE": jax.ShapeDtypeStruct((31, 7), np.float32)}, "other": jnp.zeros((2, 2))}
    found = sharding.left_whole(tree, mesh)
    assert [(entry.path, entry.bytes) for entry in found] == [("items.table_NE", 31 * 7 * 4), ("other", 16)]
    assert found[0].reason == "7 does not divide by fsdp 2"
    assert sharding.left_whole(tree, make_mesh(MeshShape(8))) == []  # data divides no parameter


@pytest.mark.parametrize("model", ["llama", "sasrec"])
def test_every_matrix_of_the_models_has_a_rule(model: str) -> None:
    """Of a mixed mesh every device then holds a quarter of it: data alone keeps copies."""
    if model == "llama":
        config = dataclasses.replace(TINY, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
        state = nnx.state(nnx.eval_shape(lambda: Llama(config, jax.random.key(0))))
    else:
        sizes = SASRecConfig(num_items=7, max_items=8, width=8)
        state = nnx.state(nnx.eval_shape(lambda: SASRec(sizes, jax.random.key(0))))
    mesh = make_mesh(MIXED)
    assert sharding.left_whole(state, mesh) == []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = sharding.names(path)
        if names[-1] == "weight":
            shard = sharding_of(names, leaf.shape, mesh).shard_shape(leaf.shape)
            assert np.prod(shard) * 4 == np.prod(leaf.shape), names


T, D, N = 24, 8, 30


def case(head: str) -> tuple[Any, Any, Any]:
    """A loss as (function of float tables and rows, tables, rows)."""
    rng = np.random.default_rng(0)
    tables = {
        "items": rng.standard_normal((N + 1, D)), "bias": rng.standard_normal(N + 1),
        "words": rng.standard_normal((9, D)), "centroids": rng.standard_normal((5, D)),
        "centroid_bias": rng.standard_normal(5),
    }  # fmt: skip
    tables = {name: table.astype(np.float32) for name, table in tables.items()}
    h_TD = rng.standard_normal((T, D)).astype(np.float32)
    weights_T = jnp.asarray(rng.random(T) * (rng.random(T) > 0.4), jnp.float32)
    targets_T = jnp.asarray(9 + rng.integers(1, N + 1, T))
    clusters = from_assignment(by_popularity(np.arange(N), 5), 5)

    def loss(tables: Any, h_TD: jax.Array) -> jax.Array:
        words = softmax.Segment(h_TD, tables["words"])
        if head == "full":
            items = softmax.item_segment(h_TD, tables["items"], tables["bias"])
            return softmax.cross_entropy([words, items], targets_T, weights_T, chunk_elements=4 * N)
        params = hierarchical_softmax.TwoLevelParams(
            tables["centroids"], tables["centroid_bias"], tables["items"], tables["bias"]
        )
        return hierarchical_softmax.loss(
            h_TD, params, clusters, targets_T, weights_T, words=words, chunk_elements=4 * N
        )

    return loss, tables, h_TD


@pytest.mark.parametrize("head", ["full", "two_level"])
@pytest.mark.parametrize("shape", [MeshShape(8), MIXED, MeshShape(2, 2), MeshShape(5)], ids=str)
def test_a_loss_over_devices_equals_one_devices(head: str, shape: MeshShape) -> None:
    """Of five devices, which 24 rows do not divide among, XLA divides what it can."""
    loss, tables, h_TD = case(head)
    mesh = make_mesh(shape)

    def on_mesh(tables: Any, h_TD: jax.Array) -> Any:
        with rows.on(mesh):
            return jax.value_and_grad(loss, argnums=(0, 1))(tables, h_TD)

    here = jax.device_put(h_TD, sharding.whole(mesh) if T % shape.batch_shards else sharding.rows(mesh))
    found = jax.jit(on_mesh)(sharding.place(tables, mesh), here)
    wanted = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(tables, h_TD)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-6))


def test_a_loss_moves_no_rows_between_devices() -> None:
    """Sorting and gathering stay on a device: what crosses is sums and tables, nothing of T · D numbers."""
    loss, tables, h_TD = case("full")
    mesh = make_mesh(MeshShape(8))

    def on_mesh(tables: Any, h_TD: jax.Array) -> Any:
        with rows.on(mesh):
            return jax.value_and_grad(loss, argnums=1)(tables, h_TD)

    placed = (sharding.place(tables, mesh), jax.device_put(h_TD, sharding.rows(mesh)))
    text = jax.jit(on_mesh).lower(*placed).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_frozen_tables_cost_no_gradient_on_a_mesh() -> None:
    """Products of the chunk loop: with the tables frozen there are fewer of them."""
    loss, tables, h_TD = case("full")
    mesh = make_mesh(MeshShape(8))

    def products(argnums: Any) -> int:
        def on_mesh(tables: Any, h_TD: jax.Array) -> Any:
            with rows.on(mesh):
                return jax.grad(loss, argnums=argnums)(tables, h_TD)

        return jax.jit(on_mesh).lower(tables, h_TD).as_text().count("stablehlo.dot_general")

    # Logits and their gradient by h, of words and items; the tables' own gradients come on top.
    assert products(1) == 4
    assert products((0, 1)) == 6
