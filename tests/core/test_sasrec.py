"""SASRec: causal, right-padded, its loss the dense softmax's, its ranking the exact order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.models.sasrec import SASRec, SASRecConfig

CONFIG = SASRecConfig(num_items=11, max_items=6, width=8, num_layers=2, num_heads=2, dropout=0.3, init_std=0.5)
ROTARY = SASRecConfig(
    num_items=11, max_items=6, width=8, num_layers=2, num_heads=2, positions="rotary", dropout=0.3, init_std=0.5
)
COSINE = SASRecConfig(num_items=11, max_items=6, width=8, num_layers=1, num_heads=1, temperature=0.2, init_std=0.5)


@pytest.fixture(params=[CONFIG, ROTARY, COSINE], ids=["plain", "rotary", "cosine"])
def model(request: pytest.FixtureRequest) -> SASRec:
    made = SASRec(request.param, jax.random.key(0))
    if made.item_bias_N is not None:
        made.item_bias_N[...] = jax.random.normal(jax.random.key(1), made.item_bias_N.shape)
    return made


@pytest.fixture
def batch() -> tuple[jax.Array, jax.Array]:
    """Items [3, 6] right-padded, lengths 6, 3, 1 and an empty row."""
    ids = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0], [8, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    return ids, jnp.array([6, 3, 1, 0])


def _log_probs(model: SASRec, hidden_D: np.ndarray) -> np.ndarray:
    """The plainest form: one row, all items 1 … N, in float64."""
    table = np.asarray(model.items_ND[...], np.float64)
    if model.config.temperature is None:
        assert model.item_bias_N is not None
        scores = table @ hidden_D + np.asarray(model.item_bias_N[...], np.float64)
    else:
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
        scores = unit @ (hidden_D / np.linalg.norm(hidden_D)) / model.config.temperature
    scores[0] = -np.inf
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_the_loss_is_the_dense_softmax(model: SASRec, batch: tuple[jax.Array, jax.Array]) -> None:
    ids, lengths = batch
    total, targets = model.loss(ids, lengths)
    hidden = np.asarray(model.hidden(ids), np.float64)
    expected = [
        -_log_probs(model, hidden[row, t])[int(ids[row, t + 1])]
        for row in range(len(ids))
        for t in range(int(lengths[row]) - 1)
    ]
    assert targets == len(expected) == 7
    assert total == pytest.approx(sum(expected), rel=1e-5)


def test_the_ranking_is_the_exact_order_without_what_is_excluded(
    model: SASRec, batch: tuple[jax.Array, jax.Array]
) -> None:
    ids, lengths = batch
    exclude = jnp.array([[3, 1, 0], [0, 0, 0], [8, 2, 7], [0, 0, 0]])
    scores, items = model.top_k(ids, lengths, 4, exclude)
    hidden = np.asarray(model.hidden(ids), np.float64)
    for row in range(3):
        expected = _log_probs(model, hidden[row, int(lengths[row]) - 1])
        left = [i for i in np.argsort(-expected) if i > 0 and i not in exclude[row].tolist()]
        assert items[row].tolist() == left[:4]
        np.testing.assert_allclose(scores[row], expected[left[:4]], rtol=1e-4)


def test_later_items_have_exactly_zero_gradient_on_earlier_states(model: SASRec) -> None:
    graphdef, state = nnx.split(model)
    row = jnp.arange(1, 7)[None]  # every position reads a row of the table of its own, so its gradient shows it

    def states(state: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, state).hidden(row)[0] @ jnp.arange(8.0)  # a plain sum is constant after the norm

    gradients_TND = jax.jacobian(states)(state)["items_ND"][...]
    reached_TN = np.abs(np.asarray(gradients_TND)).sum(axis=-1) > 0
    for t in range(6):
        assert reached_TN[t, 1 : t + 2].all() and not reached_TN[t, t + 2 :].any()


def test_padding_changes_nothing(model: SASRec, batch: tuple[jax.Array, jax.Array]) -> None:
    ids, lengths = batch
    padded, narrow = model.hidden(ids), model.hidden(ids[1:3, :3])
    np.testing.assert_allclose(padded[1, :3], narrow[0], atol=1e-6)
    np.testing.assert_allclose(padded[2, 0], narrow[1, 0], atol=1e-6)
    whole = jnp.concatenate([ids[:2], ids[:2] + 1 * (ids[:2] == 0)])  # other items where row 1 is padded
    padded_loss, other_loss = (float(model.loss(rows, lengths[:2])[0]) for rows in (whole[:2], whole[2:]))
    assert padded_loss == pytest.approx(other_loss, rel=1e-6)


def test_dropout_needs_a_key_and_changes_the_loss(batch: tuple[jax.Array, jax.Array]) -> None:
    model = SASRec(CONFIG, jax.random.key(0))
    plain, again = model.loss(*batch)[0], model.loss(*batch)[0]
    dropped = [float(model.loss(*batch, jax.random.key(seed))[0]) for seed in (1, 2)]
    assert plain == again and len({float(plain), *dropped}) == 3


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 8 does not divide among 3 heads"):
        SASRecConfig(num_items=3, max_items=4, width=8, num_heads=3)


def test_rotary_positions_know_the_order_by_distance_alone() -> None:
    """Without a table of positions: another order is another state, and one item alone has no position."""
    model = SASRec(ROTARY, jax.random.key(0))
    assert model.positions_TD is None
    swapped = model.hidden(jnp.array([[1, 2, 3], [2, 1, 3]]))[:, 2]
    assert np.abs(np.asarray(swapped[0] - swapped[1])).max() > 1e-3
    with pytest.raises(ValueError, match="heads of 3 are odd"):
        SASRecConfig(num_items=3, max_items=4, width=6, num_heads=2, positions="rotary")
