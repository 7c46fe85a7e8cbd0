"""What a page is made of, and how it is written: one HTML file that needs nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jinja2
from markupsafe import Markup

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers under named columns; numbers stand to the right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Plot:
    """A drawing (`svg`: markup that is trusted), in words (`alt`) and in numbers (`table`)."""

    title: str
    alt: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Facts:
    """Names and values, one a line; long lists fold away under `summary` where that is given."""

    values: Mapping[str, Cell]
    summary: str | None = None


@dataclass(frozen=True)
class Text:
    """A paragraph; `warning` stands out, `pre` keeps its lines and columns."""

    text: str
    kind: Literal["text", "warning", "pre"] = "text"


@dataclass(frozen=True)
class Entry:
    """One line of a list; `mark` says in words what sets it apart."""

    text: str
    mark: str | None = None


@dataclass(frozen=True)
class Lists:
    """Something with two lists side by side: a user's history, and what was recommended."""

    heading: str
    left_title: str
    left: Sequence[Entry]
    right_title: str
    right: Sequence[Entry]


Block = Table | Plot | Facts | Text | Lists


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    heading: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """One HTML document. Every text is escaped; sections without a block are left out."""
    used = [section for section in sections if section.blocks]
    return _template().render(title=title, subtitle=subtitle, sections=used)


def write(file: Path, html: str) -> None:
    """Writes a page whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(file)


def number(value: Cell) -> str:
    """For people: 1234567 → '1,234,567', 0.012345678 → '0.01235', None → '–'."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.1f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "kind": _kind, "trusted": Markup}
    environment.tests["numeric"] = _is_number
    return environment.get_template("page.html")
