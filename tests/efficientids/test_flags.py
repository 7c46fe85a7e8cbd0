"""Flags from dataclasses: the same values as without the nicer help, and no None in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from efficientids.config import parse
from efficientids.data.preparation.cli import PrepareConfig
from efficientids.evaluation.compare_cli import CompareConfig
from efficientids.flags import command_line
from efficientids.options import TrainConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    """Of another file."""

    columns: tuple[str, ...] | None = None
    """Some columns."""
    header: bool | None = None
    """Whether there is a header."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """All kinds of flags."""

    path: Path
    """Where."""
    kind: Literal["a", "b"] | None = None
    """Which. Default: a."""
    count: int = 3
    """How many."""
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_values_and_types() -> None:
    assert command_line(Outer, ["--path", "p"]) == Outer(Path("p"))
    given = ["--path", "p", "--kind", "b", "--inner.columns", "x", "y", "--inner.header", "False"]
    assert command_line(Outer, given) == Outer(Path("p"), "b", inner=Inner(("x", "y"), False))
    assert parse([]) == TrainConfig()


@pytest.mark.parametrize("options", [Outer, TrainConfig, PrepareConfig, CompareConfig])
def test_the_help_has_no_none(options: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(options, ["--help"], prog="tried")
    text = capsys.readouterr().out
    assert "None" not in text and "usage: tried" in text
    if options is Outer:
        assert "--kind {a,b}" in text and "Which. Default: a." in text and "(default: 3)" in text
        assert "--inner.columns TEXT [TEXT …]" in text and "--inner.header True|False" in text
