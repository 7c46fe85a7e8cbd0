"""Item vectors → codes: pretraining, k-means, suffixes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from core.rqvae import RQVAE
from efficientids.errors import UserError
from efficientids.tokenizing import pretraining
from efficientids.tokenizing.making import make_tokenizer, suffixed
from efficientids.tokenizing.settings import TokenizerSettings
from efficientids.tokenizing.tokenizer import Tokenizer
from efficientids.tokenizing.vectors import ItemVectors
from efficientids.training import optimizer
from tests.efficientids.tiny import NUM_ITEMS
from tests.efficientids.tokenizing.conftest import TINY, some_vectors

pytestmark = pytest.mark.usefixtures("quick_compile")


def made(vectors: ItemVectors, **changes: Any) -> tuple[Tokenizer, list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    tokenizer = make_tokenizer(vectors, dataclasses.replace(TINY, **changes), lines.append, rows.append)
    return tokenizer, rows, lines


def test_an_rqvae_learns_and_gives_distinct_codes(vectors: ItemVectors) -> None:
    tokenizer, rows, lines = made(vectors, epochs=30)
    assert tokenizer.codes_NL.shape == (NUM_ITEMS + 1, 4) and tokenizer.codes_NL.dtype == np.int32
    assert not tokenizer.codes_NL[0].any() and len(np.unique(tokenizer.codes_NL[1:], axis=0)) == NUM_ITEMS
    assert tokenizer.level_sizes == (4, 4, 4, 16) and tokenizer.path is None
    assert [row["epoch"] for row in rows] == list(range(1, 31))
    assert rows[-1]["reconstruction"] < 0.8 * rows[0]["reconstruction"]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["reconstruction"] + rows[-1]["quantization"], rel=1e-5)
    assert rows[-1]["revived"] == [0, 0, 0] and rows[-1]["collisions"] == tokenizer.metrics["collisions"]
    assert "ETA" in lines[-1] and "epoch 30/30" in lines[-1]
    # The same seed, the same tokenizer; another, another.
    assert made(vectors, epochs=30)[0].version == tokenizer.version
    assert made(vectors, epochs=30, seed=1)[0].version != tokenizer.version
    # The codes are those of the model that is kept, and of the vectors that are kept with it.
    model = tokenizer.rqvae_model()
    assert tokenizer.vectors_NI is not None
    np.testing.assert_array_equal(model.codes(jnp.asarray(tokenizer.vectors_NI[1:])), tokenizer.codes_NL[1:, :3])
    np.testing.assert_array_equal(tokenizer.real_codes(vectors), tokenizer.codes_NL[1:, :3])


def test_an_epoch_is_the_plain_loop(vectors: ItemVectors) -> None:
    """One scan over the epoch against AdamW with clipping, batch by batch, written out."""
    settings = dataclasses.replace(TINY, epochs=1, batch_size=7)  # 30 items: the last batch is of 2
    x_NI = vectors.vectors_NI
    phase = pretraining._phase(NUM_ITEMS, settings)
    model = pretraining._at_start(x_NI, settings)
    graphdef, params = nnx.split(model.rqvae)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer.build(phase.groups[0][1], phase.num_steps))
    state, batches, seen = tx.init(params), phase.batches(settings.seed, 0), []

    @jax.jit
    def step(params: Any, state: Any, x_BI: jax.Array) -> Any:
        grads = jax.grad(lambda p: nnx.merge(graphdef, p)(x_BI).loss_B.mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        items = next(batches)["items"]
        real = items[items > 0]
        seen.extend(real.tolist())
        params, state = step(params, state, jnp.asarray(x_NI[real]))
    assert sorted(seen) == list(range(1, NUM_ITEMS + 1))
    found = pretraining.pretrain(x_NI, settings, lambda line: None, lambda row: None)
    expected = nnx.merge(graphdef, params)
    for ours, theirs in zip(jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_dead_codes_are_revived_between_epochs() -> None:
    vectors = some_vectors(40)
    x_NI = vectors.vectors_NI
    settings = dataclasses.replace(TINY, levels=(8,), epochs=3, learning_rate=1e-6)
    start = pretraining._at_start(x_NI, settings)
    far = start.rqvae.quantizer.codebooks[0][...].at[2:].set(1e3)
    rows: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        start.rqvae.quantizer.replace([np.asarray(far)])
        patch.setattr(pretraining, "_at_start", lambda *_: start)
        pretraining.pretrain(x_NI, settings, lambda line: None, rows.append)
    assert rows[0]["used"] == [0.25] and rows[0]["revived"] == [6]
    assert rows[1]["used"][0] > 0.25 and rows[2]["revived"] == [0]


def test_codes_are_revived_among_items_alone(vectors: ItemVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    pools, programs = [], pretraining._programs

    def watched(*given: Any) -> Any:
        run_epoch, look = programs(*given)
        return run_epoch, lambda state, frozen, pool_P, key: pools.append(pool_P) or look(state, frozen, pool_P, key)

    monkeypatch.setattr(pretraining, "_programs", watched)
    settings = dataclasses.replace(TINY, epochs=1, batch_size=7)  # 30 items: the last batch has 5 rows of padding
    pretraining.pretrain(vectors.vectors_NI, settings, lambda line: None, lambda row: None)
    assert sorted(pools[0].tolist()) == list(range(1, NUM_ITEMS + 1))


def test_kmeans_and_sinkhorn(vectors: ItemVectors) -> None:
    tokenizer, rows, _ = made(vectors, method="kmeans")
    assert not rows and tokenizer.rqvae is None and tokenizer.parameters is not None
    assert [tokenizer.parameters[f"codebooks.{level}"].shape for level in range(3)] == [(4, 10)] * 3
    np.testing.assert_array_equal(tokenizer.real_codes(vectors), tokenizer.codes_NL[1:, :3])
    with pytest.raises(ValueError, match="method kmeans has no RQ-VAE"):
        tokenizer.rqvae_model()
    spread, _, _ = made(vectors, method="kmeans", sinkhorn=True)
    np.testing.assert_array_equal(spread.codes_NL[:, :2], tokenizer.codes_NL[:, :2])
    assert spread.metrics["distinct"] >= tokenizer.metrics["distinct"] and spread.version != tokenizer.version


def test_what_cannot_be_tokenized_is_refused(vectors: ItemVectors) -> None:
    with pytest.raises(UserError, match=r"--levels 4,31: the catalogue has 30 items"):
        made(vectors, levels=(4, 31))
    equal = dataclasses.replace(vectors, vectors_NI=np.ones_like(vectors.vectors_NI))
    with pytest.raises(UserError, match="source some: they are all equal"):
        made(equal)
    unknown = dataclasses.replace(vectors, vectors_NI=vectors.vectors_NI * (np.arange(NUM_ITEMS + 1) < 8)[:, None])
    with pytest.raises(UserError, match=r"--suffix_size 22: 23 items have one and the same vector.*at least 23"):
        made(unknown, suffix_size=22)
    made(unknown, suffix_size=23)
    with pytest.raises(UserError, match=r"--suffix_size 2: .*3 items share the codes \[1, 1\].*give it at least 3"):
        suffixed(np.array([[1, 1], [0, 1], [1, 1], [1, 1]]), (2, 2), 2)
    with pytest.raises(UserError, match="lower --learning_rate"):
        made(vectors, learning_rate=1e30)
    for name, value in (("levels", (1,)), ("epochs", 0), ("hidden", (0,)), ("learning_rate", 0.0), ("grad_clip", -1.0)):
        with pytest.raises(UserError, match=f"--{name} "):
            TokenizerSettings(**{name: value})


def test_the_trained_model_is_an_rqvae_of_the_settings(vectors: ItemVectors) -> None:
    tokenizer, _, _ = made(vectors, residual_grad="passthrough", epochs=1)
    model = tokenizer.rqvae_model()
    assert isinstance(model, RQVAE) and model.config == tokenizer.rqvae
    assert model.config.widths == (10, 12, 6) and model.quantizer.residual_grad == "passthrough"
