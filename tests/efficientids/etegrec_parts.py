"""ETEGRec's recommender and model at the start of a tiny job, for its tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from efficientids import systems
from efficientids.data.dataset import Dataset
from efficientids.options import TrainConfig
from efficientids.recommenders.base import turns
from efficientids.recommenders.etegrec import ETEGRec
from efficientids.recommenders.etegrec_model import ETEGRecModel
from efficientids.systems.base import Scale
from tests.efficientids.tiny import ETEGREC_JOB as JOB

# Flags of a tokenizer to be made: refused where there is one.
OF_MAKING = ("levels", "suffix_size", "pretrain_epochs")


def made(dataset: Dataset, **more: Any) -> tuple[ETEGRec, ETEGRecModel, TrainConfig]:
    """The recommender of a job and its model at the start."""
    system = systems.get("etegrec")
    job = {name: value for name, value in JOB.items() if "semantic_ids" not in more or name not in OF_MAKING}
    config = system.resolve(TrainConfig(**{**job, "epochs": 2.0, **more}), Scale.of(dataset))
    recommender = system.recommender(config, dataset, None)
    model = system.start(recommender, config)
    assert isinstance(recommender, ETEGRec) and isinstance(model, ETEGRecModel)
    return recommender, model, config


def phase_of(recommender: ETEGRec, name: str) -> tuple[Any, int]:
    """(a phase of the plan, its turns)."""
    (found,) = [turn for turn in turns(recommender.plan()) if turn[0].name == name]
    return found


def with_turns(recommender: ETEGRec, **changes: Any) -> ETEGRec:
    assert recommender._turns is not None
    turns_ = dataclasses.replace(recommender._turns, **changes)
    return ETEGRec(recommender.spec, training=recommender._training, turns=turns_)
