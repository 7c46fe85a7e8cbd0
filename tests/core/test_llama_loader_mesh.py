"""Weights on a mesh: the same as on one device, each tensor read once, each device with its part."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from core import sharding
from core.hf_names import places
from core.llama_loader import LlamaLoader, random_model
from core.sharding import MeshShape, make_mesh
from core.weight_files import SafetensorsFile, open_weight_file
from tests.core.checkpoints import SMALL, assert_same, tensors_of, write

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("shape", [MeshShape(fsdp=4, tensor=2), MeshShape(fsdp=8)], ids=str)
def test_shards_on_a_mesh_hold_what_one_device_holds(tmp_path: Path, shape: MeshShape) -> None:
    """Axes that the mesh does not divide (24 of fsdp 8's; 3 of a sort) are whole; every tensor is read once."""
    folder, mesh = write(tmp_path / "sharded", SMALL, tensors_of(SMALL, ml_dtypes.bfloat16), shards=2), make_mesh(shape)
    reads: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        read = SafetensorsFile.read
        patch.setattr(SafetensorsFile, "read", lambda f, n, rows=slice(None): reads.update([n]) or read(f, n, rows))
        _, found, _ = LlamaLoader(path=folder).load_model(mesh=mesh)
    assert set(reads) == set(places(SMALL)) and set(reads.values()) == {1}
    _, wanted, _ = LlamaLoader(path=folder).load_model()
    assert_same(found, wanted)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        laid = sharding.sharding_of(sharding.names(path), leaf.shape, mesh)
        assert leaf.sharding.is_equivalent_to(laid, leaf.ndim), path


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", SMALL, tensors_of(SMALL))
    file = open_weight_file(folder / "model.safetensors")
    np.testing.assert_array_equal(file.read(Q0, slice(3, 7)), file.read(Q0)[3:7])
    assert file.read(Q0, slice(3, 3)).shape == (0, SMALL.hidden_size)


def test_a_random_llama_is_the_same_on_a_mesh() -> None:
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    _, wanted = random_model(SMALL, jax.random.key(1))
    _, found = random_model(SMALL, jax.random.key(1), mesh=mesh)
    assert_same(found, wanted)
    assert found["layers"]["mlp"]["up"]["weight"][...].addressable_shards[0].data.size * 8 == 2 * 24 * 20
