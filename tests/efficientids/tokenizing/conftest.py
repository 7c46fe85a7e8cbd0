"""Item vectors for tests: a few directions with noise about them."""

from __future__ import annotations

import numpy as np
import pytest

from efficientids.tokenizing.settings import TokenizerSettings
from efficientids.tokenizing.vectors import ItemVectors
from tests.efficientids.tiny import NUM_ITEMS

TINY = TokenizerSettings(
    levels=(4, 4, 4), suffix_size=16, hidden=(12,), latent_dim=6, epochs=4, batch_size=8,
    learning_rate=1e-2,
)  # fmt: skip
WIDTH = 10


def some_vectors(num_items: int, seed: int = 0) -> ItemVectors:
    """Vectors of items around four directions; further items come behind the same first ones."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, WIDTH))
    rows = [centres[rng.integers(4)] + 0.3 * rng.normal(size=WIDTH) for _ in range(num_items)]
    return ItemVectors(np.stack([np.zeros(WIDTH), *rows]).astype(np.float32), (("some", WIDTH),))


@pytest.fixture(scope="session")
def vectors() -> ItemVectors:
    """Of the tiny data set's items."""
    return some_vectors(NUM_ITEMS)
