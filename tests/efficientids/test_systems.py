"""Every value of --recommender: trained or counted, restored, evaluated and asked, all through the same commands."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from efficientids import systems
from efficientids.config import parse
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.cli import main as evaluate
from efficientids.loading import open_run
from efficientids.options import READS, RunOptions, TrainConfig
from efficientids.planning.candidates import Candidates
from efficientids.planning.memory import Estimate
from efficientids.recommenders.base import Histories
from efficientids.serving.cli import main as recommend
from efficientids.systems.base import Scale, refuse_unread
from efficientids.train import main as train
from tests.efficientids.planning.targets import gpu_target
from tests.efficientids.tiny import events, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

NAMES = typing.get_args(typing.get_type_hints(RunOptions)["recommender"])
SASREC = flags(recommender="sasrec", num_steps=4, batch_size=8, seq_len=8, eval_every=2, width=8, num_heads=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Dataset) -> dict[str, Path]:
    """A run of each system that needs no Llama."""
    folder = tmp_path_factory.mktemp("systems")
    given = {"sasrec": SASREC, "item_knn": ["--recommender=item_knn"], "popularity": ["--recommender=popularity"]}
    for name, arguments in given.items():
        assert train([*arguments, *flags(data_dir=tiny_data.path, checkpoint_dir=folder / name)]) == 0
    return {name: folder / name for name in given}


def test_every_name_has_a_system() -> None:
    assert set(NAMES) == {"efficientids", "etegrec", "sasrec", "item_knn", "popularity"}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(READS) == set(NAMES)
    for name in NAMES:
        assert systems.get(name) is not None
        assert {"recommender", "data_dir", "checkpoint_dir"} <= READS[name] <= known
    assert frozenset.union(*READS.values()) == known  # no flag that nothing reads


@pytest.mark.parametrize("name", ["sasrec", "item_knn", "popularity"])
def test_evaluate_and_recommend_read_the_run_alone(
    name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(["--run", str(runs[name]), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["metrics"]["ndcg@10"] <= result["metrics"]["hr@10"] <= 1
    (logged,) = events(runs[name], "test")
    assert logged["hr@10"] == result["metrics"]["hr@10"]  # the checkpoint restores to what was evaluated
    output = tmp_path / "recs.parquet"
    assert recommend(["--run", str(runs[name]), "--output", str(output), "--k", "3"]) == 0
    table = pl.read_parquet(output)
    assert table.group_by("user_id").len()["len"].max() == 3


def test_a_counted_run_says_so(runs: dict[str, Path]) -> None:
    config = yaml.safe_load((runs["item_knn"] / "config.yaml").read_text())
    assert "num_steps" not in config and config["neighbours"] == 100  # what it does not read does not stand there
    (line,) = events(runs["item_knn"], "validation")
    assert line["phase"] == "counted" and line["step"] == 0
    assert not events(runs["item_knn"], "step")


@pytest.mark.parametrize("name", ["sasrec", "item_knn", "popularity"])
def test_the_written_configuration_trains_again(name: str, runs: dict[str, Path], tiny_data: Dataset) -> None:
    """What a run folder's config.yaml says is taken as it stands: nothing refused, nothing resolved anew."""
    config = parse(["--config", str(runs[name] / "config.yaml")])
    refuse_unread(config)
    assert systems.get(name).resolve(config, Scale.of(tiny_data)) == config


def test_an_epoch_of_packed_rows_is_an_epoch(tiny_data: Dataset) -> None:
    """With several histories a row an epoch has fewer steps; --epochs counts those."""
    system, scale = systems.get("efficientids"), Scale.of(tiny_data)
    config = system.resolve(TrainConfig(pack_sequences=True, epochs=3, batch_size=4, seq_len=40), scale)
    (phase,) = system.recommender(config, tiny_data, None).plan()
    assert config.num_steps == 3 * phase.steps_per_epoch < 3 * 60 / 4
    with pytest.raises(UserError, match="--length_buckets 2: rows of --pack_sequences have one shape"):
        system.resolve(TrainConfig(pack_sequences=True, length_buckets=2), scale)


def test_sasrec_trains_in_every_bucket(runs: dict[str, Path]) -> None:
    (line,) = events(runs["sasrec"], "step")
    assert line["loss"] < 1.2 * np.log(31) and line["items_per_s"] > 0
    assert line["learning_rate"] > 0 and 0 <= line["input_wait"] <= 1
    loaded = open_run(runs["sasrec"])
    assert loaded.config.length_buckets == 4 and loaded.recommender.max_items == 8


def test_sasrec_goes_on_from_a_checkpoint(runs: dict[str, Path], tiny_data: Dataset, tmp_path: Path) -> None:
    before = open_run(runs["sasrec"])
    stage = flags(load_checkpoint=runs["sasrec"], data_dir=tiny_data.path, checkpoint_dir=tmp_path / "next")
    assert train([*SASREC, *stage, "--dropout=0.1", "--learning_rate=1e-9"]) == 0
    histories = Histories(np.array([[1, 2, 3]], np.int32), np.array([3], np.int32))
    after = open_run(tmp_path / "next")
    first, second = (run.recommender.recommend(run.model, histories, 5, None) for run in (before, after))
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-4)
    with pytest.raises(UserError, match=r"model\.width: 8 ≠ 16"):
        train([*SASREC, *flags(load_checkpoint=runs["sasrec"], data_dir=tiny_data.path, width=16)])
    with pytest.raises(UserError, match="is a checkpoint of --recommender sasrec"):
        train(flags(load_checkpoint=runs["sasrec"], data_dir=tiny_data.path, checkpoint_dir=tmp_path / "other"))


@pytest.mark.parametrize(
    ("recommender", "flag", "value"),
    [("sasrec", "llama_size", "1b"), ("sasrec", "item_dim", 8), ("efficientids", "width", 32),
     ("item_knn", "learning_rate", 0.1), ("item_knn", "temperature", 1.0), ("popularity", "neighbours", 3),
     ("popularity", "seq_len", 5), ("efficientids", "neighbours", 3)],
)  # fmt: skip
def test_a_flag_that_would_do_nothing_is_refused(recommender: typing.Any, flag: str, value: typing.Any) -> None:
    config = dataclasses.replace(TrainConfig(recommender=recommender), **{flag: value})
    with pytest.raises(UserError, match=f"--{flag} has no meaning with --recommender {recommender}"):
        refuse_unread(config)


def test_a_plan_of_each() -> None:
    def estimate(recommender: typing.Any, **more: typing.Any) -> Estimate:
        candidates = Candidates(systems.get(recommender), Scale(num_items=100), gpu_target(compiles=False))
        return candidates.need(TrainConfig(recommender=recommender, **more)).estimate

    sasrec = estimate("sasrec", seq_len=50)
    width, per_layer = 64, 12 * 64 * 64 + 13 * 64
    assert sasrec.parameters == 101 * width + 50 * width + 101 + 2 * per_layer + 2 * width
    assert sasrec.parts["Llama, trained"] == 0 and sasrec.parts["optimiser"] >= 8 * sasrec.parameters
    with pytest.raises(UserError, match="trains nothing"):
        estimate("popularity")
