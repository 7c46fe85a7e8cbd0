"""SIGKILL anywhere in `prepare`: nothing half-made under the output's name, and the next run leaves no litter."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.preparation import encode
from efficientids.data.preparation.cli import main
from efficientids.data.preparation.core_filter import k_core
from efficientids.data.preparation.prepare import Recipe, prepare_files
from efficientids.data.preparation.progress import Progress
from efficientids.data.preparation.workplace import recover, tidy, workplace
from efficientids.data.sources.base import BadRows
from efficientids.errors import UserError
from tests.conftest import ROOT
from tests.efficientids.data.preparation.log import Log, Row

pytestmark = pytest.mark.usefixtures("no_page")

# Dies at the n-th time that it touches a file of the output or of its work folder; n = 0 counts the times instead.
KILLED = """
import os, signal, sys
from efficientids.data.preparation.cli import main
from efficientids.data.preparation import report_page
report_page.files = lambda report: {"report.json": report.to_json() + "\\n"}  # as the fixture no_page
output, n, touched = sys.argv[1], int(sys.argv[2]), 0

def watch(event, arguments):
    global touched
    if event not in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
        return
    paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike))]
    if any(os.path.basename(output) in path for path in paths):
        touched += 1
        if touched == n:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
main(sys.argv[3:])
print(touched)
"""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """An input of 40 rows, and the flags that prepare it with every filter."""
    log = tmp_path / "log.csv"
    rows = [f"u{n % 7},i{n * n % 11},{n}" for n in range(40)]
    log.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    return ["--source", "table", "--input", str(log), "--core", "2", "--repeats", "drop_immediate", "--split", "time"]


def _killed(output: Path, n: int, flags: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(output), str(n), *flags, "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _fingerprint(folder: Path) -> str:
    return Dataset.open(folder).fingerprint


@pytest.mark.slow
def test_killed_at_many_points(tmp_path: Path, flags: list[str]) -> None:
    output = tmp_path / "made" / "output"
    counted = _killed(tmp_path / "reference", 0, flags)
    assert counted.returncode == 0, counted.stderr
    touches = int(counted.stdout.splitlines()[-1])
    new = _fingerprint(tmp_path / "reference")
    assert main([*flags[:4], "--core", "0", "--output", str(output)]) == 0
    old = _fingerprint(output)
    states = set()
    # With --overwrite there are a few touches more, so the last number may be none: the run then comes to its end.
    for n in (touches * part // 6 for part in range(1, 7)):
        before = _fingerprint(output)
        process = _killed(output, n, [*flags, "--overwrite"])
        states.add(process.returncode)
        if output.exists():  # the moment between two renames has neither
            assert _fingerprint(output) in (before, new)
        shown = [entry.name for entry in output.parent.iterdir() if not entry.name.startswith(".")]
        assert shown in (["output"], [])
        assert main([*flags[:4], "--core", "0", "--output", str(output), "--overwrite"]) == 0
        assert _fingerprint(output) == old
        assert [entry.name for entry in output.parent.iterdir()] == ["output"]
    assert -signal.SIGKILL in states


def test_killed_between_the_two_renames(tmp_path: Path, flags: list[str]) -> None:
    output = tmp_path / "made" / "output"
    assert main([*flags, "--output", str(output)]) == 0
    first = _fingerprint(output)
    command = KILLED.replace(
        "touched == n", 'event == "os.rename" and os.path.basename(os.fsdecode(arguments[1])) == "output"'
    )
    other = [*flags[:4], "--core", "0", "--output", str(output), "--overwrite"]
    process = subprocess.run([sys.executable, "-c", command, str(output), "1", *other], cwd=ROOT, capture_output=True)
    assert process.returncode == -signal.SIGKILL and not output.exists()
    assert main([*flags, "--output", str(output)]) == 0  # the old one is back, and it is what is asked for
    assert _fingerprint(output) == first
    process = subprocess.run([sys.executable, "-c", command, str(output), "1", *other], cwd=ROOT, capture_output=True)
    assert process.returncode == -signal.SIGKILL and not output.exists()
    assert main(other) == 0
    assert _fingerprint(output) != first
    assert [entry.name for entry in output.parent.iterdir()] == ["output"]


def test_an_interrupted_run_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [(f"u{n % 3}", f"i{n % 4}", 1.0, n) for n in range(30)]
    output = tmp_path / "out"

    def run() -> None:
        with workplace(output, "key") as place:
            folder = prepare_files(Log(rows), Recipe(core=2), place, {}, BadRows(), Progress(quiet=True))
            place.put(folder, output)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("efficientids.data.preparation.prepare.k_core", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert os.listdir(tmp_path) == [".out.work-key"]
    assert set(json.loads((tmp_path / ".out.work-key" / "stages.json").read_text())) == {"spool", "order"}
    rounds = []

    def counted(*arguments: object) -> object:
        rounds.append(1)
        return k_core(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(encode, "spool", interrupted)
        patch.setattr("efficientids.data.preparation.prepare.order_rows", interrupted)
        patch.setattr("efficientids.data.preparation.prepare.k_core", counted)
        run()
    assert rounds == [1]
    taken_up = _fingerprint(output)
    assert os.listdir(tmp_path) == ["out"]
    output.rename(tmp_path / "first")
    run()
    assert _fingerprint(output) == taken_up


def test_what_was_replaced_stays_gone(tmp_path: Path, flags: list[str]) -> None:
    output = tmp_path / "made" / "output"
    other = [*flags[:4], "--core", "0", "--output", str(output), "--overwrite"]
    # Just before the work folder is removed: the new data set is in place, and the old one still there.
    command = KILLED.replace(
        "touched == n", 'event == "shutil.rmtree" and os.path.exists(os.path.join(paths[0], "old", "manifest.json"))'
    )
    for deleted in (False, True):
        assert main([*flags, "--output", str(output), "--overwrite"]) == 0
        first = _fingerprint(output)
        run = [sys.executable, "-c", command, str(output), "1", *other]
        assert subprocess.run(run, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
        assert _fingerprint(output) != first
        assert len(list(output.parent.glob(".output.work-*/old/manifest.json"))) == 1
        if deleted:
            shutil.rmtree(output)
            recover(output)
            assert not output.exists()
        # Already what is asked for, or to be made again: no litter either way.
        assert main(other[:-1]) == 0
        assert _fingerprint(output) != first
        assert [entry.name for entry in output.parent.iterdir()] == ["output"]


def test_two_at_once_are_refused_and_stale_work_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.work-stale").mkdir()
    (tmp_path / ".out.lock").touch()  # of a killed process: held by nobody
    (tmp_path / ".out.work-b.work-live").mkdir()  # of the output "out.work-b"
    with workplace(tmp_path / "out", "one") as place:
        assert not (tmp_path / ".out.work-stale").exists()
        for key in ("one", "other"):  # whatever the flags: both would put their result to the same place
            with pytest.raises(UserError, match="another process is making it"), workplace(tmp_path / "out", key):
                raise AssertionError
        tidy(tmp_path / "out")
        assert place.path.is_dir()
        with workplace(tmp_path / "elsewhere", "one"):
            pass
    assert os.listdir(tmp_path) == [".out.work-b.work-live"]


def test_a_lock_that_was_removed_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".out.lock"
    tries: list[str] = []

    def removed_meanwhile(file: IO[bytes], how: int) -> None:
        flock(file, how)
        tries.append(file.name)
        if len(tries) == 1:  # between our opening it and our locking it, its holder came to the end
            lock.unlink()

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with workplace(tmp_path / "out", "one"):
        assert len(tries) == 2 and lock.exists()
        with pytest.raises(UserError, match="another process is making it"), workplace(tmp_path / "out", "one"):
            raise AssertionError


def test_what_was_put_there_meanwhile_stays(tmp_path: Path, flags: list[str]) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match="not empty and not a prepared data set"), workplace(output, "key") as place:
        made = place.folder("made")
        output.mkdir()
        (output / "notes.txt").write_text("mine")
        place.put(made, output, overwrite=True)
    assert [entry.name for entry in output.iterdir()] == ["notes.txt"]
    shutil.rmtree(output)
    with pytest.raises(UserError, match="give --overwrite to replace it"), workplace(output, "key") as place:
        made = place.folder("made")
        assert main([*flags, "--output", str(tmp_path / "other")]) == 0
        (tmp_path / "other").rename(output)
        place.put(made, output)
    Dataset.open(output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, no part"), workplace(output, "key") as place:
        place.put(place.folder("made"), output, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "out"]


def test_a_file_that_comes_while_prepare_works_stays(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    assert main([*flags, "--output", str(output)]) == 0

    def meanwhile(*arguments: object) -> object:
        (output / "notes.txt").write_text("mine")
        return k_core(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("efficientids.data.preparation.prepare.k_core", meanwhile)
    with pytest.raises(UserError, match=r"holds notes\.txt, no part of the data set"):
        main([*flags, "--output", str(output), "--overwrite"])
    assert (output / "notes.txt").read_text() == "mine"
