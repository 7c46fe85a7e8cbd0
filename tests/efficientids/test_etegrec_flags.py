"""ETEGRec's flags: what is chosen where none is given, what earlier runs and semantic IDs decide, what is refused."""

from __future__ import annotations

import typing
from typing import Any

import jax
import pytest
from flax import nnx

from efficientids import systems
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.options import RunOptions, TrainConfig
from efficientids.systems.base import Scale

pytestmark = pytest.mark.usefixtures("quick_compile")

NAMES = typing.get_args(typing.get_type_hints(RunOptions)["recommender"])
SMALL: dict[str, Any] = {"levels": "6,6", "suffix_size": 32, "code_dim": 8, "max_seq_len": 6, "pretrain_epochs": 1}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """What a run without --data_dir trains on, with fewer users."""
    return generate(num_users=100).write(tmp_path_factory.mktemp("generated") / "data")


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_command_of_every_system_can_be_planned(name: typing.Any, catalogue: Dataset) -> None:
    """Its model and phases, on its default data; whole runs of the others are in `test_demo` and `test_systems`."""
    system, scale = systems.get(name), Scale.of(catalogue)
    config = system.resolve(TrainConfig(recommender=name), scale)
    planned = system.planned(config, scale)
    assert jax.tree.leaves(nnx.state(nnx.eval_shape(planned.init, jax.random.key(0))))
    assert bool(planned.plan()) == (config.num_steps is not None)


def test_default_levels_fit_the_catalogue(catalogue: Dataset) -> None:
    system = systems.get("etegrec")

    def levels(num_items: int) -> str | None:
        return system.resolve(TrainConfig(recommender="etegrec"), Scale(num_items=num_items)).levels

    assert [levels(count) for count in (10**6, 1024, 1023, 250, 9)] == [f"{n},{n},{n}" for n in (256, 256, 128, 32, 2)]
    assert catalogue.catalogue_size == 250 and levels(250) == "32,32,32"  # more codes than items: refused
