"""What a run says: its lines, what follows them, and that libraries keep quiet."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import absl.logging
import pytest

from efficientids import log as log_module
from efficientids.log import RunLog, duration, printable, progress, quiet_libraries
from efficientids.tracking.trackers import Status

METRICS = {"grad_norm": 2.0, "text_loss": 1.5, "input_wait": 0.25, "learning_rate": 5e-4, "loss": 3.0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Follower:
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def start(self, run_path: Path, config: Mapping[str, Any]) -> None:
        self.heard.append(("start", run_path, dict(config)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.heard.append((step, dict(metrics)))

    def finish(self, status: Status) -> None:
        self.heard.append(("finish", status))


def test_one_line_a_logged_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path / "m.jsonl", 2, stream)
    for step in range(1, 6):
        log.step("full", step, 5, step / 2, {**METRICS, "loss": float(step), "targets": 10.0}, earlier_steps=100)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # steps 2, 4 and the last
    assert re.fullmatch(
        r"full 2/5  epoch 1\.0  loss 1\.5  text_loss 1\.5  grad_norm 2  lr 0\.0005  [\d,]+ items/s  "
        r"input wait 25%  ETA \w+",
        lines[0],
    )
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["learning_rate"]) for row in rows] == [
        (102, 1.5, 5e-4), (104, 3.5, 5e-4), (105, 5.0, 5e-4)
    ]  # fmt: skip


def test_no_control_character_off_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path / "m.jsonl", 1, stream)
    log.step("full", 1, 2, 0.5, {**METRICS, "targets": 1.0})
    log.say("a title\x1b[2J with \r an \x07 escape\nand a line\x9b")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", stream.getvalue())
    assert "a title [2J with   an   escape\nand a line \n" in stream.getvalue()
    assert printable("Amélie – 天\n") == "Amélie – 天\n"


def test_on_a_terminal_the_line_stays_in_place_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    log = RunLog(tmp_path / "m.jsonl", 1, stream)
    with log.followed_by({}, tmp_path, {}):
        log.step("full", 1, 3, 0.5, {**METRICS, "targets": 1.0})
        log.step("full", 2, 3, 0.5, {**METRICS, "targets": 1.0})
        assert "\n" not in stream.getvalue()
        assert all(len(line) <= 59 for line in stream.getvalue().split("\r"))
        log.say("short\nsecond")
        # The rest of the line in place is overwritten with spaces.
        assert re.search(r"\rshort {54}\nsecond\n$", stream.getvalue())
        log.step("full", 3, 3, 0.5, {**METRICS, "targets": 1.0})
    assert stream.getvalue().endswith("\n")  # what comes next begins on its own line


def test_followers_hear_numbers_by_name(tmp_path: Path) -> None:
    follower = Follower()
    log = RunLog(tmp_path / "m.jsonl", 1, io.StringIO())
    log.record({"event": "validation", "step": 0, "ndcg@10": 0.5})  # before: to nobody
    with log.followed_by({"f": follower}, tmp_path, {"seed": 1}):
        log.step("full", 1, 1, 0.5, {"loss": 3.0, "targets": 2.0}, earlier_steps=10)
        log.record({"event": "validation", "phase": "full", "step": 11, "ndcg@10": 0.25, "odd": float("nan")})
        log.record({"event": "remark", "text": "without a step"})
    log.record({"event": "test", "step": 11, "hr@10": 0.5})  # after: to nobody
    start, (step, metrics), validation, finish = follower.heard
    assert start == ("start", tmp_path, {"seed": 1}) and finish == ("finish", "finished")
    assert step == 11 and metrics.pop("train/items_per_s") > 0 and metrics == {"train/loss": 3.0}
    assert validation == (11, {"validation/ndcg@10": 0.25})
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "killed"), (RuntimeError, "failed")])
def test_followers_hear_how_it_ended(error: type[BaseException], status: str, tmp_path: Path) -> None:
    follower = Follower()
    log = RunLog(tmp_path / "m.jsonl", 1, io.StringIO())
    with pytest.raises(error), log.followed_by({"f": follower}, tmp_path, {}):
        raise error
    assert follower.heard[-1] == ("finish", status)


@pytest.fixture
def loud() -> Iterator[None]:
    """Libraries that were told to say everything, and are told so again afterwards where they were."""
    names = (*log_module._LIBRARIES, "matplotlib.font_manager")
    before = {name: logging.getLogger(name).level for name in names}
    verbosity = absl.logging.get_verbosity()
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    absl.logging.set_verbosity(absl.logging.DEBUG)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
    absl.logging.set_verbosity(verbosity)


@pytest.mark.usefixtures("loud")
def test_libraries_speak_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger().addHandler(handler)
    try:
        logging.getLogger("orbax.checkpoint").info("heard before")
        quiet_libraries()
        for name in ("jax._src.dispatch", "orbax.checkpoint", "grain", "flax", "absl"):
            logging.getLogger(name).info("chatter of %s", name)
            logging.getLogger(name).warning("warning of %s", name)
        absl.logging.info("chatter of absl")
    finally:
        logging.getLogger().removeHandler(handler)
    said = stream.getvalue() + capsys.readouterr().err
    assert "heard before" in said and "chatter" not in said
    for name in ("jax._src.dispatch", "orbax.checkpoint", "grain", "flax", "absl"):
        assert f"warning of {name}" in said


def test_progress_names_what_it_counts() -> None:
    stream = Terminal()
    show = progress("evaluated", "examples", stream)
    show(1, 1200)
    show(1200, 1200)
    assert stream.getvalue().startswith("\revaluated 1/1,200 examples  ETA ")
    assert stream.getvalue().endswith("\revaluated 1,200/1,200 examples  ETA 0s   \n")


@pytest.mark.parametrize(("seconds", "text"), [(3661, "1h01m"), (75, "1m15s"), (9.2, "9s"), (0, "0s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
