"""The commands beside training: evaluate, recommend, and the console script that finds them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from efficientids import __main__ as application
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.evaluation import cli as evaluate_cli
from efficientids.serving import cli as recommend_cli
from tests.conftest import ROOT
from tests.efficientids.conftest import Trained
from tests.efficientids.tiny import FROZEN, NUM_ITEMS, NUM_USERS, events

pytestmark = pytest.mark.usefixtures("quick_compile")


def evaluated(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate_cli.main(["--run", str(run), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_command(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(*FROZEN)
    result = evaluated(run, capsys)
    assert {name: events(run, "test")[0][name] for name in result["metrics"]} == pytest.approx(result["metrics"])
    assert result["users"] == NUM_USERS and result["dataset"] == "generated-0" and result["run"] == str(run)
    protocol = {"split": "leave-one-out, test", "seen": "mask", "unit": "fractions", "ties": "against the model"}
    assert protocol.items() <= result["protocol"].items()
    assert 0 < result["best_possible"]["hr@10"] <= 1
    kept = evaluated(run, capsys, "--seen", "keep", "--batch_size", "16")
    assert kept["metrics"] != result["metrics"] and kept["protocol"]["seen"] == "keep"
    for line in events(run, "validation"):
        found = evaluated(run, capsys, "--split", "validation", "--step", str(line["step"]))
        assert found["metrics"]["ndcg@10"] == pytest.approx(line["ndcg@10"])
    assert evaluate_cli.main(["--run", str(run / "2")]) == 0
    text = capsys.readouterr().out
    assert "leave-one-out, test: 60 users; ranked over the full catalogue, 30 items" in text
    assert "order of interactions: rule as generated, tie-break none needed: times rise; history the model" in text


def test_evaluate_refreshes_the_report(
    trained: Trained, copy_of: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(trained(*FROZEN))
    report = run / "report.html"
    report.unlink()
    asked = ["--run", str(run), "--split", "validation", "--seen", "keep"]
    capsys.readouterr()
    assert evaluate_cli.main(asked) == 0
    assert f"refreshed {report}" in capsys.readouterr().err.splitlines()
    assert "seen items: keep" in report.read_text()
    report.unlink()
    assert evaluate_cli.main([*asked, "--json"]) == 0
    told = capsys.readouterr()
    assert "refreshed" not in told.err and json.loads(told.out)["protocol"]["seen"] == "keep" and report.exists()
    # A page that cannot be drawn is told, and the evaluation is there.
    (run / "evaluation" / "test-keep-step1.json").write_text("{")
    assert evaluate_cli.main(asked) == 0
    told = capsys.readouterr()
    assert "was not refreshed" in told.err and "test-keep-step1.json" in told.err and "seen items: keep" in told.out


def recommended(run: Path, output: Path, *more: str) -> pl.DataFrame:
    assert recommend_cli.main(["--run", str(run), "--output", str(output), *more]) == 0
    return pl.read_parquet(output)


def test_recommend_command(trained: Trained, tiny_data: Dataset, tmp_path: Path) -> None:
    run, users = trained(*FROZEN), tmp_path / "users.txt"
    wanted = ["user-0031", "user-0002", "user-0060"]
    users.write_text("\n".join(wanted) + "\n")
    table = recommended(run, tmp_path / "recs.parquet", "--users", str(users), "--k", "4")
    assert table.columns == ["user_id", "rank", "item_id", "title", "score"]
    assert table["user_id"].to_list() == [user for user in wanted for _ in range(4)]
    assert table["rank"].to_list() == [1, 2, 3, 4] * 3
    titles = dict(tiny_data.items.select("item_id", "title").iter_rows())
    assert table["title"].to_list() == [titles[item] for item in table["item_id"]]
    for user in wanted:
        rows = table.filter(pl.col("user_id") == user)
        assert rows["score"].is_sorted(descending=True) and (rows["score"] < 0).all()
        seen = tiny_data.history(tiny_data.users["user_id"].to_list().index(user), "all")
        assert not set(rows["item_id"]) & {f"film-{item:04d}" for item in seen}


def test_recommend_for_all_with_fewer_items_left_than_asked_for(
    trained: Trained, tiny_data: Dataset, tmp_path: Path
) -> None:
    table = recommended(trained(*FROZEN), tmp_path / "all.parquet", "--k", str(NUM_ITEMS), "--batch_size", "32")
    left = NUM_ITEMS - np.diff(tiny_data.offsets)  # nothing is watched twice
    counts = table.group_by("user_id", maintain_order=True).len()
    assert counts["user_id"].to_list() == tiny_data.users["user_id"].to_list()
    assert counts["len"].to_list() == left.tolist()
    whole = recommended(trained(*FROZEN), tmp_path / "seen.parquet", "--k", str(NUM_ITEMS), "--seen", "keep")
    assert len(whole) == NUM_USERS * NUM_ITEMS
    # All items of a user: their probabilities sum to one.
    sums = whole.group_by("user_id").agg(pl.col("score").exp().sum())["score"].to_numpy()
    np.testing.assert_allclose(sums, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("users", "more", "message"),
    [
        ("user-0001\nnobody\nno-one\n", [], r"2 ids are not in .*, first nobody, no-one"),
        ("user-0001\nuser-0001\n", [], "user-0001 stands there more than once"),
        ("\n", [], "the file names no user"),
        (None, [], "expected `all` or a file"),
        ("user-0001\n", ["--k", "0"], "--k 0"),
        ("user-0001\n", ["--k", "31"], "the catalogue has 30 items"),
        ("user-0001\n", ["--output", "{here}/none/recs.parquet"], "no folder"),
        ("user-0001\n", ["--output", "{here}/users.txt"], r"exists; give another file, or --overwrite"),
    ],
)
def test_recommend_refuses(trained: Trained, tmp_path: Path, users: str | None, more: list[str], message: str) -> None:
    file = tmp_path / "users.txt"
    if users is not None:
        file.write_text(users)
    given = [word.format(here=tmp_path) for word in more]
    with pytest.raises(UserError, match=message):
        recommended(trained(*FROZEN), tmp_path / "recs.parquet", "--users", str(file), *given)
    assert not (tmp_path / "recs.parquet").exists()


def test_the_console_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["efficientids", "trian"])
    assert application.main() == 2
    known = "prepare, embed-items, tokenize, train, plan, evaluate, compare, recommend, export, report"
    assert capsys.readouterr().err == f"error: unknown command 'trian'; one of {known}\n"
    monkeypatch.setattr("sys.argv", ["efficientids", "evaluate", "--run", "nowhere"])
    assert application.main() == 2
    assert capsys.readouterr().err.startswith("error: nowhere is not a run folder")
    monkeypatch.setattr("sys.argv", ["efficientids"])
    assert application.main() == 0
    assert "recommend" in capsys.readouterr().out


def test_only_what_a_person_can_mend_loses_its_traceback() -> None:
    def raises(error: BaseException) -> Callable[[Sequence[str]], int]:
        def command(arguments: Sequence[str]) -> int:
            raise error

        return command

    assert application.run(raises(UserError("mend this")), []) == 2
    assert application.run(raises(KeyboardInterrupt()), []) == 130
    with pytest.raises(RuntimeError, match="a bug"):
        application.run(raises(RuntimeError("a bug")), [])


def test_a_reader_that_goes_away_is_no_error() -> None:
    line = f"{sys.executable} {ROOT / 'train_llama.py'} --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage: train_llama.py") and "Traceback" not in done.stderr
