"""The step on 8 virtual devices against the same on one: loss, gradients, what lies where, what is donated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from core import sharding
from core.clustering import by_popularity, from_assignment
from core.config import TINY
from core.layers import Init
from core.lora import TARGETS, LoRAConfig
from core.models.efficientids import EfficientIDSConfig
from core.models.sasrec import SASRecConfig
from core.sharding import MeshShape, make_mesh
from efficientids.recommenders.base import OptimizerConfig, Training
from efficientids.recommenders.efficientids import EfficientIDS, EfficientIDSSpec
from efficientids.recommenders.sasrec import SASRecRecommender, SASRecSpec
from efficientids.systems.base import history_spec
from efficientids.training.step import Program, build_program
from tests.efficientids.test_step import model_of, no_batches

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, ITEMS, NUM_ITEMS = 16, 6, 23
LLAMA = dataclasses.replace(
    TINY, vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    tie_word_embeddings=False,
)  # fmt: skip
KEY = jax.random.key(3)
MESHES = [MeshShape(8), MeshShape(fsdp=8), MeshShape(tensor=2), MeshShape(2, 2, 2)]


def recommender(name: str) -> Any:
    # Behind a large epsilon Adam's first step is nearly the gradient's own: near zero its sign would be rounding's.
    adam = OptimizerConfig(0.1, 0, 0.1, eps=1e-3)
    own = None if name == "frozen" else adam
    training = Training(10, 1.0, [history_spec(ITEMS, ROWS)], adam, no_batches, own)
    if name == "sasrec":
        sizes = SASRecConfig(NUM_ITEMS, max_items=ITEMS, width=32, num_heads=4, dropout=0.2)
        return SASRecRecommender(SASRecSpec(sizes), training)
    lora = LoRAConfig(4, 8.0, TARGETS, dropout=0.1) if name in ("lora", "nf4") else None
    init = Init(quantize="nf4" if name == "nf4" else None)
    two_level = text = name == "two_level"  # and titles: words ∪ clusters
    clusters = from_assignment(by_popularity(np.arange(NUM_ITEMS), 5), 5) if two_level else None
    model = EfficientIDSConfig(
        LLAMA, NUM_ITEMS, item_dim=16, head="two_level" if two_level else "full", dropout=0.1, lora=lora
    )
    spec = EfficientIDSSpec(model, 16, ITEMS, title_tokens=2 * text, text_loss_weight=0.5 * text)
    titles = np.random.default_rng(0).integers(-1, 64, (NUM_ITEMS + 1, 2)).astype(np.int32) if text else None
    return EfficientIDS(spec, clusters=clusters, titles=titles, training=training, init=init)


def model(name: str) -> nnx.Module:
    """The model, filled by NumPy, with the buffers of its own."""
    system = recommender(name)
    filled = model_of(system)
    if name == "two_level":
        for buffer, value in vars(from_assignment(by_popularity(np.arange(NUM_ITEMS), 5), 5)).items():
            filled.clusters[buffer][...] = jnp.asarray(value)
        filled.titles_NK[...] = jnp.asarray(system.titles)
    return filled


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, ITEMS + 1, ROWS).astype(np.int32)
    ids = rng.integers(1, NUM_ITEMS + 1, (ROWS, ITEMS)).astype(np.int32)
    return {"item_ids": np.where(np.arange(ITEMS) < lengths[:, None], ids, 0), "lengths": lengths}


def program(name: str, shape: MeshShape | None, accumulation: int = 1) -> Program:
    mesh = None if shape is None else make_mesh(shape)
    return build_program(model(name), recommender(name).plan()[0], accumulation=accumulation, grad_clip=1.0, mesh=mesh)


def outcome(made: Program) -> tuple[Any, Any, Any]:
    """Metrics of a step, its gradients (Adam's first moment: a tenth of each) and the parameters after it."""
    state, metrics = made.step(made.state, made.frozen, made.on_devices(batch()), KEY)
    return jax.tree.map(np.asarray, (metrics, [optax.tree.get(o, "mu") for o in state.opt_states], state.params))


@functools.cache
def on_one_device(name: str, accumulation: int = 1) -> tuple[Any, Any, Any]:
    return outcome(program(name, None, accumulation))


def close(found: Any, wanted: Any) -> None:
    """Equal to 1e-5 of the largest value of each array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(np.abs(b).max()), 1e-6))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        # One mixed mesh and one without tensor here; the rest for `make test-real`.
        *(pytest.param("full", shape, marks=pytest.mark.slow) for shape in MESHES),
        pytest.param("two_level", MeshShape(2, 2, 2), marks=pytest.mark.slow),
        pytest.param("nf4", MeshShape(1, 4, 2), marks=pytest.mark.slow),
        pytest.param("lora", MeshShape(2, 2, 2), marks=pytest.mark.slow),
        ("frozen", MeshShape(1, 4, 2)), ("sasrec", MeshShape(2, 4, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_loss_and_gradients_equal_one_devices(name: str, shape: MeshShape) -> None:
    """With dropout, too: which values are dropped is a matter of the key alone."""
    found, wanted = outcome(program(name, shape)), on_one_device(name)
    close(found, wanted)
    assert float(wanted[0]["grad_norm"]) > 1e-3


def test_accumulation_on_a_mesh_equals_accumulation_on_one_device() -> None:
    close(outcome(program("full", MeshShape(2, 2), accumulation=2)), on_one_device("full", 2))


def test_state_lies_by_the_table_and_is_written_over() -> None:
    made = program("full", MeshShape(fsdp=4, tensor=2))
    mesh = made.mesh
    assert mesh is not None
    for path, leaf in jax.tree_util.tree_leaves_with_path((made.state, made.frozen)):
        assert leaf.sharding.is_equivalent_to(sharding.sharding_of(sharding.names(path), leaf.shape, mesh), leaf.ndim)
    moment = optax.tree.get(made.state.opt_states[1], "nu")["llama"]["layers"]["attention"]["q"]["weight"][...]
    assert moment.addressable_shards[0].data.shape == (2, 32 // 4, 4 // 2, 8)
    compiled = made.step.lower(made.state, made.frozen, made.on_devices(batch()), KEY).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made.state))
    assert memory.alias_size_in_bytes > 0.9 * held
    assert held < 0.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(made.state))
    before = jax.tree.map(lambda leaf: leaf.sharding, made.state)
    state, _ = made.step(made.state, made.frozen, made.on_devices(batch()), KEY)
    kept = jax.tree.map(lambda leaf, laid: leaf.sharding.is_equivalent_to(laid, leaf.ndim), state, before)
    assert all(jax.tree.leaves(kept))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made.state))


def test_shapes_get_their_shardings_and_lower() -> None:
    """What the planner does: no array is made."""
    system, mesh = recommender("full"), make_mesh(MeshShape(2, 4))
    abstract = nnx.eval_shape(system.init, jax.random.key(0))
    made = build_program(abstract, system.plan()[0], accumulation=1, grad_clip=1.0, mesh=mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path((made.state, made.frozen)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert leaf.sharding == sharding.sharding_of(sharding.names(path), leaf.shape, mesh)
    made.step.lower(made.state, made.frozen, dict(system.plan()[0].batch_specs[0]), jax.eval_shape(lambda: KEY))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"item_ids has 16 rows, .* 4 micro-batches on data 4 × fsdp 2"):
        program("full", MeshShape(4, 2), accumulation=4)
