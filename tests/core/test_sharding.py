"""The mesh, and the table of shardings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from core import sharding
from core.config import TINY
from core.llama import Llama
from core.models import ETEGRecConfig, LlamaETEGRecModel
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


def test_what_etegrec_has_beside_its_llama_is_divided() -> None:
    config = ETEGRecConfig(TINY, (8, 4, 2), code_dim=8, latent_dim=8, item_dim=6)
    state = nnx.state(nnx.eval_shape(lambda: LlamaETEGRecModel(config, jax.random.key(0))))
    assert sharding.left_whole(state, make_mesh(MIXED)) == []
    assert axes_of(("tables", "1")) == axes_of(("0", "mu", "tables", "1")) == (None, "fsdp")


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
