"""A whole training, as a person starts it: every line of its output is the project's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from efficientids.data.dataset import Dataset
from tests.conftest import ROOT
from tests.efficientids.test_pages import check_static
from tests.efficientids.test_trackers import only_file, read_events
from tests.efficientids.tiny import FROZEN, SMALL_JOB, flags

# What lines of libraries look like: absl's and glog's heads, Python's warnings, names and folders of packages.
FOREIGN = re.compile(
    r"^[IWEF]\d{4}[ \d]|^(WARNING|INFO|DEBUG|ERROR)[ :]|\w+Warning:|site-packages|\[process=\d|Traceback"
    r"|\b(absl|orbax|grain|xla|cuda|tokenizers|matplotlib|tensorboard)\b",
    re.IGNORECASE | re.MULTILINE,
)


def test_a_training_says_one_line_a_step_and_nothing_of_libraries(
    tiny_data: Dataset, weights: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = {**SMALL_JOB, "num_steps": 3, "log_every": 1, "eval_every": 2}
    given = flags(data_dir=tiny_data.path, weights=weights, checkpoint_dir=run, **job)
    quiet = ("JAX_", "XLA_", "TF_CPP", "GRPC_", "ABSL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(quiet)}
    # No compilation cache: XLA complains on stderr where it loads a program for this very CPU.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_llama.py"), *given, *FROZEN],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # The paths of a run may hold any word.
    said = done.stdout.replace(str(tmp_path), "").replace(str(weights), "").replace(str(tiny_data.path), "")
    assert not FOREIGN.search(said), FOREIGN.search(said)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
    steps = re.findall(r"^\w+ (\d)/3  epoch \S+  loss \S+ .*  lr \S+  [\d,]+ items/s .* ETA \w+$", said, re.MULTILINE)
    assert steps == ["1", "2", "3"]
    check_what_it_leaves(run)


def check_what_it_leaves(run: Path) -> None:
    """Curves in TensorBoard's form that agree with metrics.jsonl, samples, and the report."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _, *events = read_events(only_file(run))
    assert [event.step for event in events] == [row["step"] for row in rows if "step" in row]
    losses = {v.tag: v.simple_value for v in events[0].summary.value}
    assert abs(losses["train/loss"] - rows[0]["loss"]) < 1e-5 and losses["train/learning_rate"] > 0
    samples = json.loads((run / "samples.json").read_text())
    assert samples["examined"] > 0
    text = check_static((run / "report.html").read_text()).text
    for words in ("Training loss", "Learning rate", "Validation", "95% intervals", "Recommendations that missed"):
        assert words in text, words
    assert not list(run.glob("*.partial"))
