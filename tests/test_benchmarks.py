"""What benchmarks promise of their own numbers, and that the jobs in `examples/` give flags that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.train_step import believe
from efficientids.config import parse
from tests.conftest import ROOT


def test_a_figure_above_the_hardwares_peak_is_refused() -> None:
    believe("ours", 989.0, 989.4)
    with pytest.raises(SystemExit, match=r"ours: 990 TFLOP/s is above the hardware's 989\.4: not believed"):
        believe("ours", 990.0, 989.4)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.*")), ids=lambda file: file.name)
def test_the_jobs_give_flags_that_there_are(file: Path) -> None:
    text = re.sub(r"\\\n", " ", file.read_text())
    (line,) = re.findall(r"python train_llama\.py (.*)", text)
    values = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    line = re.sub(r"\$\((.*)\)", "head", re.sub(r"\$(\w+)", lambda name: values.get(name[1], "x"), line))
    config = parse(shlex.split(re.sub(r"\$\{[^}]*\}", "x", line)))
    assert config.llama_size == "8b" and config.checkpoint_dir is not None
