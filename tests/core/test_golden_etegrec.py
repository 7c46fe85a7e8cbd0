"""ETEGRec's released code against ours: RQ-VAE, losses, gradients, both alignments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.alignment import psa_loss, sia_loss
from core.rqvae import RQVAE, RQVAEConfig

Values = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def values(golden: Path) -> Values:
    with np.load(golden / "etegrec_rqvae.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(values: Values) -> RQVAE:
    """The released parameters; every size is the file's."""
    found = dict(_by_ours(values, "param/"))
    num_layers = 1 + max(path[2] for path in found if path[0] == "encoder")
    widths = [found["encoder", "layers", i, "weight"].shape[1] for i in range(num_layers)]
    sizes = [found[path].shape[0] for path in sorted(path for path in found if path[0] == "quantizer")]
    config = RQVAEConfig(
        values["x"].shape[1], level_sizes=tuple(sizes), hidden_sizes=tuple(widths[:-1]), latent_dim=widths[-1]
    )
    model = RQVAE(config, jax.random.key(0))
    state = nnx.to_flat_state(nnx.state(model))
    assert {path for path, _ in state} == set(found)
    for path, variable in state:
        assert variable.shape == found[path].shape
        variable[...] = jnp.asarray(found[path])
    nnx.update(model, nnx.from_flat_state(state))
    return model


def _by_ours(values: Values, prefix: str) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """(our path, value): linear maps are numbered among dropouts and activations, their weights (out, in)."""
    names = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]
    numbers = sorted({int(found[1]) for name in names if (found := re.search(r"mlp_layers\.(\d+)\.", name))})
    for name in names:
        value, parts = values[prefix + name], name.split(".")
        if parts[0] == "rq":
            yield ("quantizer", "codebooks", int(parts[2])), value
        else:
            place = numbers.index(int(parts[2]))
            yield (parts[0], "layers", place, parts[3]), value.T if parts[3] == "weight" else value


def _difference(got: Any, expected: np.ndarray) -> float:
    assert np.shape(got) == expected.shape
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def test_golden_etegrec_rqvae_forward(model: RQVAE, values: Values) -> None:
    out = model(jnp.asarray(values["x"]))
    np.testing.assert_array_equal(out.quantized.codes_BL, values["indices"])
    np.testing.assert_array_equal(model.codes(jnp.asarray(values["x"])), values["indices"])
    assert _difference(out.reconstruction_BI, values["recon"]) <= 1e-4
    assert _difference(jnp.stack(out.quantized.distances, axis=1), values["distances"]) <= 1e-4
    assert _difference(out.quantization_loss_B.mean(), values["rq_loss"]) <= 1e-4
    assert _difference(out.loss_B.mean(), values["total_loss"]) <= 1e-4


def test_golden_etegrec_rqvae_gradients(model: RQVAE, values: Values) -> None:
    graphdef, params = nnx.split(model)

    def loss(params: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, params)(jnp.asarray(values["x"])).loss_B.mean()

    got = dict(nnx.to_flat_state(jax.grad(loss)(params)))
    expected = dict(_by_ours(values, "grad/"))
    assert set(got) == set(expected)
    for path, value in expected.items():
        assert _difference(got[path][...], value) <= 1e-3, path


def test_golden_etegrec_rqvae_sia(model: RQVAE, values: Values) -> None:
    """Latents straight into the quantiser against the items' distances; every row counts."""
    levels = values["distances"].shape[1]
    items, rows_B = [jnp.asarray(values["distances"][:, i]) for i in range(levels)], jnp.ones(len(values["x"]))

    def loss(latents_Bd: jax.Array, sign: Any) -> jax.Array:
        total, weight = sia_loss(model.quantizer.quantize(latents_Bd).distances, items, rows_B, sign)
        return total / weight

    latents_Bd = jnp.asarray(values["sia/latents"])
    distances = jnp.stack(model.quantizer.quantize(latents_Bd).distances, axis=1)
    assert _difference(distances, values["sia/seq_distances"]) <= 1e-4
    assert _difference(loss(latents_Bd, "released"), values["sia/loss_released"]) <= 1e-4
    assert _difference(loss(latents_Bd, "paper"), values["sia/loss_paper"]) <= 1e-4
    assert _difference(jax.grad(loss)(latents_Bd, "paper"), values["sia/grad_latents_paper"]) <= 1e-3


def test_golden_etegrec_rqvae_psa(values: Values) -> None:
    reconstructions, rows = jnp.asarray(values["recon"]), jnp.ones(len(values["x"]), bool)

    def loss(preferences_BE: jax.Array) -> jax.Array:
        total, weight = psa_loss(preferences_BE, reconstructions, rows)
        return total / weight

    got, gradient = jax.value_and_grad(loss)(jnp.asarray(values["psa/decoded_latents"]))
    assert _difference(got, values["psa/loss"]) <= 1e-4
    assert _difference(gradient, values["psa/grad_decoded_latents"]) <= 1e-3
