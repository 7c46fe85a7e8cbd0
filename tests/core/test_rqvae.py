"""`core.rqvae`: how it starts, that it learns, what it refuses. (`test_golden_etegrec` has the values.)"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from core import rqvae
from core.residual_kmeans import residual_kmeans
from core.rqvae import RQVAE, RQVAEConfig

CONFIG = RQVAEConfig(24, level_sizes=(8, 6), hidden_sizes=(64, 32), latent_dim=16)


def _items(rows: int = 200) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(20, 24))[rng.integers(0, 20, rows)] + 0.1 * rng.normal(size=(rows, 24)))


def test_shapes_by_default_are_the_papers() -> None:
    model = nnx.eval_shape(lambda: RQVAE(RQVAEConfig(256), jax.random.key(0)))
    shapes = [layer.weight.shape for layer in (*model.encoder.layers, *model.decoder.layers)]
    assert shapes == [(256, 512), (512, 256), (256, 128), (128, 256), (256, 512), (512, 256)]
    assert [book.shape for book in model.quantizer.codebooks] == [(256, 128)] * 3


def test_starts_xavier_normal_without_biases() -> None:
    for layer in RQVAE(RQVAEConfig(256), jax.random.key(1)).encoder.layers:
        assert not np.any(layer.bias[...])
        np.testing.assert_allclose(np.std(layer.weight[...]), np.sqrt(2 / sum(layer.weight.shape)), rtol=0.03)


def test_rows_are_independent() -> None:
    """A padded row can be left out of the sum: nothing of it is in the others."""
    model, x = RQVAE(CONFIG, jax.random.key(0)), _items(12)
    alone, beside = model(x[:5]), model(x)
    np.testing.assert_allclose(alone.loss_B, beside.loss_B[:5], rtol=1e-5)


def test_latents_of_a_catalogue_are_the_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rqvae, "INDEXED_AT_A_TIME", 5)
    model, x = RQVAE(CONFIG, jax.random.key(0)), _items(12)
    np.testing.assert_allclose(model.latents(x), model.encoder(x), atol=1e-5)
    np.testing.assert_array_equal(model.codes(x), model(x).quantized.codes_BL)


def test_learns_to_reconstruct_from_codes() -> None:
    model, x = RQVAE(CONFIG, jax.random.key(0)), _items()
    model.quantizer.replace(residual_kmeans(np.asarray(model.encoder(x)), CONFIG.level_sizes, jax.random.key(1)))
    graphdef, params = nnx.split(model)
    optimizer = optax.adam(3e-3)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        out = nnx.merge(graphdef, params)(x)
        return out.loss_B.mean(), out.reconstruction_loss_B.mean()

    def step(carry: tuple[nnx.State, optax.OptState], _: None) -> tuple[tuple[nnx.State, optax.OptState], jax.Array]:
        params, state = carry
        gradient, reconstruction = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), reconstruction

    _, errors = jax.lax.scan(step, (params, optimizer.init(params)), None, length=200)
    assert errors[-1] < 0.4 * errors[0]


@pytest.mark.parametrize("wrong", [{"level_sizes": ()}, {"level_sizes": (4, 0)}, {"latent_dim": 0}, {"beta": -1.0}])
def test_bad_config(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="give at least one level"):
        RQVAEConfig(24, **wrong)  # type: ignore[arg-type]
