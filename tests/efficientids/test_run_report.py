"""R/report.html: what it tells of a run, from the files of its folder alone."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from efficientids.__main__ import run as run_command
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation.samples import item_name
from efficientids.log import RunLog
from efficientids.pages import run_report
from efficientids.pages.curves import curves, event_curves, read_metrics
from efficientids.pages.samples import make_samples, read_samples, write_samples
from efficientids.recommenders.base import Histories, Phase, Ranked
from efficientids.runs import RunFolder
from tests.efficientids.test_pages import check_static, read

STEP = {"event": "step", "phase": "frozen", "epoch": 0.5, "items_per_s": 1e4, "loss": 3.0, "grad_norm": 1.0,
        "learning_rate": 1e-3, "input_wait": 0.1}  # fmt: skip


@dataclasses.dataclass
class Fixed:
    """Recommends items 1, 2, 3, …, without those excluded; the score of item i is −i."""

    max_items: int = 6
    history: str = "the newest 6 items"

    def init(self, key: jax.Array) -> nnx.Module:
        raise NotImplementedError

    def plan(self) -> Sequence[Phase]:
        return []

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        assert exclude is not None and histories.item_ids.shape[1] == self.max_items
        ids = np.zeros((len(exclude), k), np.int32)
        for row, seen in enumerate(exclude):
            left = [item for item in range(1, 31) if item not in set(seen.tolist())][:k]
            ids[row, : len(left)] = left
        return Ranked(ids, np.where(ids > 0, -ids, -np.inf).astype(np.float32))


def rows(*, steps: int = 5) -> list[dict[str, Any]]:
    """What a run of two phases records."""
    found = [{"time": 100.0 + i, **STEP, "step": i, "loss": 3.0 / i} for i in range(1, steps + 1)]
    found.append({"time": 200.0, **STEP, "phase": "tuned", "step": steps + 1, "text_loss": 0.7})
    for step, value in ((2, 0.25), (4, 0.5), (6, 0.5), (7, 0.375)):
        found.append({"time": 3800.0, "event": "validation", "phase": "frozen", "step": step, "hr@10": 0.75,
                      "ndcg@10": value})  # fmt: skip
    return found


@pytest.fixture
def folder(tmp_path: Path, tiny_data: Dataset) -> RunFolder:
    """A run folder with configuration, environment and metrics."""
    path = tmp_path / "the-run"
    path.mkdir()
    model = {"recommender": "sasrec", "spec": {}, "dataset": {"path": str(tiny_data.path), "fingerprint": "f"}}
    run = RunFolder(path)
    run.write({"learning_rate": 0.001, "data_dir": "<data>", "trackers": None}, model)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return run


def store_evaluation(run: RunFolder, **changes: Any) -> None:
    (run.path / "evaluation").mkdir(exist_ok=True)
    metrics = {f"{kind}@{cutoff}": 0.5 / cutoff for cutoff in (5, 10) for kind in ("hr", "ndcg", "coverage")}
    intervals = {f"{kind}@{cutoff}": [0.01, 0.0625] for cutoff in (5, 10) for kind in ("hr", "ndcg")}
    protocol = {"split": "leave-one-out, test", "candidates": "full catalogue, 30 items", "seen": "mask",
                "ties": "against the model", "unit": "fractions", "history": "newest 6",
                "unhittable_share": 0.125}  # fmt: skip
    group = {"group": "20–49", "examples": 41, "users": 40, "metrics": metrics, "intervals": intervals}
    stored = {"step": 6, "metrics": metrics, "intervals": intervals, "protocol": protocol, "users": 60, "examples": 60,
              "groups": {"history_length": [group]}, "best_possible": {"hr@10": 0.8125}} | changes  # fmt: skip
    (run.path / "evaluation" / "test-mask-step6.json").write_text(json.dumps(stored))


def test_what_the_report_tells(folder: RunFolder, tiny_data: Dataset) -> None:
    store_evaluation(folder, sampled={"negatives": 100, "metrics": {"hr@10": 0.9}, "warning": "do not compare"})
    html = run_report.to_html(folder)
    assert html == run_report.to_html(folder)
    text = check_static(html).text
    for words in (
        "Run the-run", f"sasrec on {tiny_data.manifest['name']}", "1h01m", "step 6", "best: 0.5", "Training loss",
        "Learning rate", "Gradient norm", "Throughput", "Waiting for input", "text_loss", "Validation",
        "0.0500 (0.0100–0.0625)", "12.5% of targets unhittable", "20–49", "0.8125", "do not compare", "<data>",
        f"{tiny_data.num_interactions:,}", "the bootstrap over users", "jaxlib", "frozen", "tuned",
    ):  # fmt: skip
        assert words in text, words
    assert "no intervals" not in text and "Recommendations that" not in text


def test_a_small_group_has_no_interval(folder: RunFolder) -> None:
    group = {"group": "1–4", "examples": 7, "users": 7, "metrics": {"hr@10": 0.25}, "intervals": None}
    store_evaluation(folder, groups={"history_length": [group]})
    text = read(run_report.to_html(folder)).text
    assert "no interval for fewer than 30 users" in text and "0.2500 (" not in text and "0.2500" in text


def test_each_metric_has_its_curve(folder: RunFolder) -> None:
    plots = {plot.title: plot for plot in curves(read_metrics(folder.metrics))}
    assert list(plots) == [
        "Training loss", "text_loss", "Validation", "Learning rate", "Gradient norm, before clipping", "Throughput",
        "Waiting for input",
    ]  # fmt: skip
    assert [list(row) for row in plots["Training loss"].table.rows][-2:] == [["frozen", 5, 0.6], ["tuned", 6, 3.0]]
    # Of equals the later checkpoint is the best.
    assert "Marked: best: 0.5, at 6" in plots["Validation"].alt


def test_other_events_have_their_curves(folder: RunFolder) -> None:
    with folder.metrics.open("a") as file:
        for step in (3, 6):
            row = {"time": 300.0, "event": "reindexed", "step": step, "perplexity": [50.0 + step, 7.0], "changed": 0.25,
                   "version": f"v{step}", "kept": False}  # fmt: skip
            file.write(json.dumps(row) + "\n")
            epoch = {"time": 1.0, "event": "pretraining", "step": 0, "epoch": step, "loss": 1 / step}
            file.write(json.dumps(epoch) + "\n")
        file.write(json.dumps({"time": 300.0, "event": "memory", "step": 0, "peak_bytes": 7}) + "\n")
    others = read_metrics(folder.metrics).others
    assert {kind: len(rows) for kind, rows in others.items()} == {"reindexed": 2, "pretraining": 2, "memory": 1}
    plots = {plot.title: plot for plot in event_curves(others["reindexed"])}
    assert list(plots) == ["perplexity", "changed"]
    assert [list(row) for row in plots["perplexity"].table.rows] == [
        ["level 1", 3, 53.0], ["level 1", 6, 56.0], ["level 2", 3, 7.0], ["level 2", 6, 7.0],
    ]  # fmt: skip
    (loss,) = event_curves(others["pretraining"])
    assert [list(row)[-2:] for row in loss.table.rows] == [[3, 1 / 3], [6, 1 / 6]]
    text = check_static(run_report.to_html(folder)).text
    assert "Events: reindexed" in text and "Events: pretraining" in text and "Events: memory" not in text


def test_without_an_evaluation_it_says_so(folder: RunFolder) -> None:
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"time": 4000.0, "event": "test", "step": 6, "hr@10": 0.4375, "ndcg@10": 0.25}) + "\n")
    text = read(run_report.to_html(folder)).text
    assert "so there are no intervals" in text and "python -m efficientids evaluate --run R" in text
    assert "0.4375" in text and "Test, step 6" in text


def test_a_run_that_has_only_begun(folder: RunFolder) -> None:
    folder.metrics.unlink()
    assert "Nothing is recorded yet" in read(run_report.to_html(folder)).text


def test_half_a_last_line_is_told_and_another_damaged_line_is_refused(folder: RunFolder) -> None:
    whole = folder.metrics.read_text()
    folder.metrics.write_text(whole + '{"time": 1, "ev')
    assert "was not written whole" in read(run_report.to_html(folder)).text
    folder.metrics.write_text("[1]\n" + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: .*mend or remove the line"):
        run_report.to_html(folder)


def test_damaged_files_are_named(folder: RunFolder) -> None:
    store_evaluation(folder)
    (folder.path / "evaluation" / "validation-keep-step2.json").write_text("{")
    with pytest.raises(UserError, match=r"validation-keep-step2\.json cannot be read"):
        run_report.to_html(folder)
    (folder.path / "evaluation" / "validation-keep-step2.json").write_text('{"step": 2}')
    with pytest.raises(UserError, match="metrics, protocol, users missing"):
        run_report.to_html(folder)
    (folder.path / "evaluation" / "validation-keep-step2.json").unlink()
    (folder.path / "samples.json").write_text('{"step": 1}')
    with pytest.raises(UserError, match=r"samples\.json: split, seen, k,"):
        run_report.to_html(folder)


def test_a_data_set_that_is_gone(folder: RunFolder) -> None:
    model = folder.read_model()
    model["dataset"]["path"] = "nowhere/films"
    (folder.path / "model.json").write_text(json.dumps(model))
    text = read(run_report.to_html(folder)).text
    assert "sasrec on films" in text and "is not there any more" in text


def expected_ranks(dataset: Dataset) -> dict[str, int]:
    """User id → the rank of the test target under `Fixed`."""
    found = {}
    for user in range(dataset.num_users):
        items = dataset.item_ids[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
        left = [item for item in range(1, dataset.catalogue_size + 1) if item not in items[:-1]]
        found[dataset.users["user_id"][user]] = left.index(items[-1]) + 1 if items[-1] in left else 10**6
    return found


def test_samples_are_of_users_hit_and_missed(tiny_data: Dataset) -> None:
    ranks = expected_ranks(tiny_data)
    samples = make_samples(Fixed(), nnx.Module(), tiny_data, step=6, each=100, k=4, batch_size=16)
    assert samples["examined"] == tiny_data.num_users == len(ranks)
    assert {sample["user"] for sample in samples["hits"]} == {user for user, rank in ranks.items() if rank == 1}
    assert {sample["user"] for sample in samples["misses"]} == {user for user, rank in ranks.items() if rank > 4}
    assert samples["first"] == len(samples["hits"]) > 0 and samples["missed"] == len(samples["misses"]) > 0
    name, ids = item_name(tiny_data), tiny_data.users["user_id"].to_list()
    for sample in samples["hits"] + samples["misses"]:
        items = tiny_data.history(ids.index(sample["user"]), "test").tolist()
        assert sample["history"] == [name(item) for item in items[-10:]] and sample["history_length"] == len(items)
        assert len(sample["recommended"]) == 4
        marked = [place for place, one in enumerate(sample["recommended"], start=1) if one["target"]]
        assert marked == ([1] if sample["rank"] == 1 else [])
        if marked:
            assert sample["recommended"][0]["title"] == sample["target"]


def test_few_samples_look_at_few_users_and_come_out_the_same(tiny_data: Dataset) -> None:
    few = [make_samples(Fixed(), nnx.Module(), tiny_data, step=6, each=1, k=4, batch_size=16) for _ in range(2)]
    assert few[0] == few[1] and len(few[0]["hits"]) == len(few[0]["misses"]) == 1
    assert few[0]["examined"] < tiny_data.num_users


def test_samples_are_kept_and_shown(folder: RunFolder, tiny_data: Dataset) -> None:
    samples = make_samples(Fixed(), nnx.Module(), tiny_data, step=6, each=2, k=4)
    samples["hits"][0]["target"] = "A <i>title</i> – 天"
    assert read_samples(folder.path) is None
    write_samples(folder.path, samples)
    assert read_samples(folder.path) == samples
    html = run_report.to_html(folder)
    text = check_static(html).text
    assert "who chose A <i>title</i> – 天" in text
    told = text[text.index("Users were looked at") : text.index("the metrics do.")]
    assert "without it among the 4" in told and "%" not in told and str(samples["examined"]) not in told
    assert text.count("← chosen next") == 2 and text.count("the target is not among them") == 2


def test_the_page_follows_a_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder.path / "report.html"
    log = RunLog(folder.metrics, 1)
    with log.followed_by({"report": run_report.ReportPage()}, folder.path, {}):
        log.record({**STEP, "step": 8})
        assert not file.exists()  # a step's time is not spent on it
        log.record({"event": "validation", "phase": "tuned", "step": 9, "hr@10": 0.75, "ndcg@10": 0.625})
        assert "best: 0.625" in file.read_text()
        log.record({**STEP, "step": 10, "loss": 0.0123})
        log.record({"event": "validation", "phase": "tuned", "step": 11, "hr@10": 0.75, "ndcg@10": 0.6875})
        assert "best: 0.625" in file.read_text()  # pages take seconds, and these validations come at once
        monkeypatch.setattr(run_report.time, "monotonic", lambda: 1e12)
        log.record({"event": "validation", "phase": "tuned", "step": 12, "hr@10": 0.75, "ndcg@10": 0.75})
        assert "best: 0.75" in file.read_text()
        log.record({"event": "validation", "phase": "tuned", "step": 13, "hr@10": 0.75, "ndcg@10": 0.8125})
        monkeypatch.undo()
    text = read(file.read_text()).text  # the last page comes whenever the run ends
    assert "0.0123" in text and "0.8125" in text


def test_the_command(folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(run_report.main, ["--run", str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.path / "report.html")
    assert (folder.path / "report.html").read_text() == run_report.to_html(folder)
    other = tmp_path / "other.html"
    assert run_command(run_report.main, ["--run", str(folder.path), "--output", str(other)]) == 0
    assert other.read_text() == run_report.to_html(folder)
    assert run_command(run_report.main, ["--run", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert run_command(run_report.main, ["--run", str(folder.path), "--output", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_long_run_is_told_in_little_time(folder: RunFolder) -> None:
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows(steps=20_000)))
    began = time.process_time()
    html = run_report.to_html(folder)
    # Far more than it takes (0.6 s), so that a busy machine does not fail it, and far less than a plot of all points.
    assert time.process_time() - began < 5 and len(html) < 1_000_000
