"""The semantic IDs that LETTER and MiniOneRec publish, on the data sets that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.preparation.cli import PrepareConfig, prepare
from efficientids.tokenizing import cli
from efficientids.tokenizing.tokenizer import open_tokenizer

# Folder, log, source; items, different codes, alphabets (the suffix level last), whether 1 is added to ids.
PUBLISHED = [
    ("amazon-beauty-2014", "Beauty", "sequences", 12101, 12088, (256, 256, 256, 256, 4), True),
    ("amazon-instruments-2018", "Instruments", "sequences", 9922, 9897, (256, 256, 256, 256, 4), False),
    ("amazon-industrial-2018", "Industrial_and_Scientific", "table", 3686, 3670, (252, 256, 256, 4), False),
    ("yelp", "Yelp", "sequences", 20033, 19201, (256, 256, 256, 256, 128), True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "name", "source", "items", "distinct", "sizes", "shifted"), PUBLISHED)
def test_published_codes_are_imported(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    folder: str, name: str, source: str, items: int, distinct: int, sizes: tuple[int, ...], shifted: bool,
) -> None:  # fmt: skip
    assert prepare(PrepareConfig(output=tmp_path / "data", source=source, input=(real_data / folder,))) == 0  # type: ignore[arg-type]
    capsys.readouterr()
    given = ["--data_dir", str(tmp_path / "data"), "--output", str(tmp_path / "T")]
    assert cli.main([*given, "--import_codes", str(real_data / folder / f"{name}.index.json")]) == 0
    tokenizer = open_tokenizer(tmp_path / "T", Dataset.open(tmp_path / "data"))
    assert tokenizer.metrics["items"] == items and tokenizer.metrics["distinct"] == distinct
    assert tokenizer.level_sizes == sizes
    assert ("counts items from 0" in capsys.readouterr().out) == shifted
