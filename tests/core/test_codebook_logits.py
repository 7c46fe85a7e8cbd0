"""Logits over codes against plain products; the table that embeds a code is the one that predicts it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.codebook_logits import CodebookLogits, code_loss
from core.embeddings import SoftEmbedding
from core.layers import Init

WIDTH, DIM = 6, 4
RNG = np.random.default_rng(0)
TABLES = [RNG.standard_normal((size, DIM)).astype(np.float32) for size in (5, 3, 7)]


def test_a_code_is_its_levels_row_through_the_projector() -> None:
    embedding = SoftEmbedding(DIM, WIDTH, jax.random.key(0), Init(1.0))
    weight = np.asarray(embedding.scid_projector.weight[...])
    assert embedding.scid_projector.bias is None and weight.shape == (DIM, WIDTH)
    levels, codes = np.array([[0, 1, 2, 2]]), np.array([[4, 0, 0, 6]])
    found = embedding(TABLES, levels, codes, jnp.float32)
    expected = [TABLES[level][code] @ weight for level, code in zip(levels[0], codes[0], strict=True)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
    assert embedding(TABLES, levels, codes, jnp.bfloat16).dtype == jnp.bfloat16


def test_logits_and_loss_are_over_all_codes_of_the_level() -> None:
    head = CodebookLogits(WIDTH, DIM, jax.random.key(0), Init(1.0))
    weight = np.asarray(head.output_projector.weight[...])
    assert head.output_projector.bias is None and weight.shape == (WIDTH, DIM)
    hidden = RNG.standard_normal((2, 3, WIDTH)).astype(np.float32)
    logits = np.asarray(head.logits(hidden, TABLES[2]))
    np.testing.assert_allclose(logits, hidden @ weight @ TABLES[2].T, rtol=1e-4, atol=1e-4)
    codes, weights = np.array([[0, 6, 2], [3, 3, 5]]), np.array([[1, 1, 0], [0.5, 1, 1]], np.float32)
    wide = logits.astype(np.float64)
    nll = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, codes[..., None], axis=-1)[..., 0]
    projected = head.project(hidden).reshape(-1, DIM)
    for chunk in (None, 14):  # at once, and two positions at a time
        loss = code_loss(
            projected, TABLES[2], jnp.asarray(codes.ravel()), jnp.asarray(weights.ravel()), chunk_elements=chunk
        )
        assert float(loss) == pytest.approx(float((weights * nll).sum()), rel=1e-5)
    live = np.arange(7) % 3 != codes.reshape(-1, 1) % 3 - 1  # each label's own code is live, some others are not
    among = np.log((np.exp(wide.reshape(-1, 7)) * live).sum(-1)).reshape(nll.shape)
    nll += among - np.log(np.exp(wide).sum(-1))
    for chunk in (None, 14):
        loss = code_loss(
            projected, TABLES[2], jnp.asarray(codes.ravel()), jnp.asarray(weights.ravel()),
            live_TK=jnp.asarray(live), chunk_elements=chunk,
        )  # fmt: skip
        assert float(loss) == pytest.approx(float((weights * nll).sum()), rel=1e-5)
