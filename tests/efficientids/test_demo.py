"""The embedded default, as `make demo` runs it: how near it comes to the best possible."""

import re
from pathlib import Path

import pytest

from efficientids.train import main


@pytest.mark.slow
def test_the_default_job_reaches_80_percent_of_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint_dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"test HR@10 (\S+); best possible on these users (\S+) ", printed)
    assert found is not None
    reached, best = map(float, found.groups())
    assert 0.5 < best < 1
    assert reached >= 0.8 * best
    # Then three users' histories and recommendations by title.
    assert len(re.findall(r"^user \S+ chose … .*\(\d{4}\)", printed, re.MULTILINE)) == 3
    assert len(re.findall(r"^ +[1-5]\. .*\(\d{4}\)", printed, re.MULTILINE)) == 15
