"""Fixtures of the application's tests: a data set, a Llama's weight folder and trained runs, all tiny and made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.train import main
from tests.core.checkpoints import tensors_of, write
from tests.efficientids.tiny import LLAMA, NUM_ITEMS, NUM_USERS, SMALL_JOB, flags

# name, flags → the folder of a finished run
Trained = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A generated data set."""
    generated = generate(num_users=NUM_USERS, num_items=NUM_ITEMS, shortest=5, longest=12)
    return generated.write(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pretrained weights as Hugging Face writes it."""
    return write(tmp_path_factory.mktemp("weights") / "llama", LLAMA, tensors_of(LLAMA))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Dataset, weights: Path) -> Trained:
    """Trains a run on the tiny data from the tiny weights; the same flags train once a session. Read only."""
    folder, done = tmp_path_factory.mktemp("runs"), dict[tuple[str, ...], Path]()

    def train(*more: str) -> Path:
        if more not in done:
            run = folder / str(len(done))
            given = flags(data_dir=tiny_data.path, weights=weights, checkpoint_dir=run, **SMALL_JOB)
            assert main([*given, *more]) == 0
            done[more] = run
        return done[more]

    return train


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a run, for a test to damage."""
    return lambda run: Path(shutil.copytree(run, tmp_path / "copy"))
