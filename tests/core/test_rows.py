"""Losses and look-ups whose rows lie on several devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import hierarchical_softmax, rows, sharding, softmax
from core.clustering import by_popularity, from_assignment
from core.sharding import MeshShape, make_mesh

MIXED = MeshShape(2, 2, 2)
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


def test_a_look_up_moves_columns_for_rows_and_never_the_whole_batch() -> None:
    mesh = make_mesh(MeshShape(2, 4))
    rng = np.random.default_rng(0)
    table_ND, ids_BT = rng.standard_normal((N + 1, D)).astype(np.float32), rng.integers(0, N + 1, (16, 3))
    weights_BTD = rng.standard_normal((16, 3, D)).astype(np.float32)

    def on_mesh(table: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
        with rows.on(mesh):
            return jax.value_and_grad(lambda table: (rows.lookup(table, ids) * weights).sum())(table)

    program = jax.jit(on_mesh)
    by_rows = jax.device_put((ids_BT, weights_BTD), sharding.rows(mesh))
    placed = sharding.place({"table_NE": table_ND}, mesh)["table_NE"], *by_rows
    total, grad_ND = program(*placed)
    wanted = np.zeros_like(table_ND)
    np.add.at(wanted, ids_BT, weights_BTD)
    np.testing.assert_allclose(total, (table_ND[ids_BT] * weights_BTD).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad_ND, wanted, atol=1e-5)
    text = program.lower(*placed).compile().as_text()
    assert f"f32[16,3,{D}]" not in text  # of all rows with all columns
