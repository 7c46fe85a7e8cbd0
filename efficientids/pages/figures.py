"""Plots as inline SVG, each with a sentence for those who do not see it and a table of its numbers.

The same data gives the same bytes. Colours are CSS variables of the page (`page.html`), so a plot follows its theme; a
series is told apart by its dashes and marker as well as by its colour.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from efficientids.pages.page import Cell, Plot, Table, number

# Drawn in these colours, which are then replaced by variables of the page.
_INK, _FAINT, _SERIES = "#010101", "#020202", ("#030301", "#030302", "#030303", "#030304", "#030305")
_THEMED = {_INK: "currentColor", _FAINT: "var(--faint)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "path.simplify": True,
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SIZE = (6.4, 2.9)  # inches
_MOST_POINTS, _MOST_ROWS = 600, 60
_FEW = 30  # points up to which each is marked


@dataclass(frozen=True)
class Series:
    """One line: `x` and `y` have the same length; y that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """A point to point out, with its label."""

    x: float
    y: float
    label: str


def line_plot(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    mark: Mark | None = None,
) -> Plot:
    """One line a series. Long series are thinned to their extremes, so that no spike is lost.

    Args:
        log_x, log_y: logarithmic axes; their values must be above 0.
        from_zero: the y axis begins at 0.

    Raises:
        ValueError: no series, no point, lengths that differ, or a value of a logarithmic axis that is not above 0.
    """
    _check(title, series, log_x, log_y)

    def draw(axes: Axes) -> None:
        for i, one in enumerate(series):
            _draw_line(axes, one, i % len(_SERIES))
        if mark is not None:
            axes.plot([mark.x], [mark.y], color=_INK, marker="*", markersize=11, linestyle="none")
            axes.annotate(mark.label, (mark.x, mark.y), xytext=(0, 9), textcoords="offset points", ha="center")
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        axes.set_ylim(bottom=0 if from_zero else None)
        _short(axes.xaxis, log_x, [v for one in series for v in one.x])
        _short(axes.yaxis, log_y, [v for one in series for v in one.y])
        if len(series) > 1:
            axes.legend(frameon=False)

    said = "; ".join(filter(None, (_trend(one) for one in series)))
    marked = f" Marked: {mark.label}, at {number(mark.x)}." if mark else ""
    alt = f"Line plot of {y_label} over {x_label}. {said}.{marked}"
    return Plot(title, alt, _svg(title, alt, draw, x_label, y_label), _points(title, series, x_label, y_label))


def bar_plot(
    title: str, labels: Sequence[str], values: Sequence[float], *, x_label: str, y_label: str, log_y: bool = False
) -> Plot:
    """One bar a label. Raises ValueError: no bar, or lengths that differ."""
    if not labels or len(labels) != len(values):
        raise ValueError(f"plot {title!r}: {len(labels)} labels for {len(values)} values, at least one is needed")

    def draw(axes: Axes) -> None:
        axes.bar(range(len(labels)), values, color=_SERIES[0], width=0.9)
        # No more labels than can be read.
        shown = range(0, len(labels), math.ceil(len(labels) / 16))
        axes.set_xticks(list(shown), [labels[i] for i in shown], rotation=45 if len(labels) > 8 else 0,
                        ha="right" if len(labels) > 8 else "center")  # fmt: skip
        axes.set_yscale("log" if log_y else "linear")
        _short(axes.yaxis, log_y, values)

    top = int(np.argmax(np.asarray(values, float)))
    alt = f"Bars of {y_label} by {x_label}, {len(labels)} of them; the highest is {labels[top]}: {number(values[top])}."
    rows: list[list[Cell]] = [[label, value] for label, value in zip(labels, values, strict=True)]
    return Plot(title, alt, _svg(title, alt, draw, x_label, y_label), Table(title, [x_label, y_label], rows))


def thinned(x: Sequence[float], y: Sequence[float], most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` of the points, in their order: first, last, and of each stretch the lowest and the highest."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len(xs) <= most:
        return xs, ys
    kept = {0, len(xs) - 1}
    for stretch in np.array_split(np.arange(len(xs)), most // 2 - 1):
        values = ys[stretch]
        if np.isfinite(values).any():
            kept |= {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
    places = sorted(kept)
    return xs[places], ys[places]


def _check(title: str, series: Sequence[Series], log_x: bool, log_y: bool) -> None:
    if not any(len(one.x) for one in series):
        raise ValueError(f"plot {title!r}: there is nothing to draw")
    for one in series:
        if len(one.x) != len(one.y):
            raise ValueError(f"plot {title!r}, series {one.name!r}: {len(one.x)} x for {len(one.y)} y")
        for wanted, values in ((log_x, one.x), (log_y, one.y)):
            if wanted and len(values) and not np.min(np.asarray(values, float)) > 0:
                raise ValueError(f"plot {title!r}, series {one.name!r}: a logarithmic axis needs values above 0")


def _draw_line(axes: Axes, one: Series, style: int) -> None:
    x, y = thinned(one.x, one.y, _MOST_POINTS)
    marker = _MARKERS[style] if len(x) <= _FEW else None
    axes.plot(x, y, color=_SERIES[style], linestyle=_DASHES[style], marker=marker, markersize=3.5, linewidth=1.4,
              label=one.name)  # fmt: skip


def _short(axis: Axis, log: bool, values: Sequence[float]) -> None:
    """Writes large numbers as 20k and 3M."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    if not log and max(finite, default=0) >= 10_000:
        axis.set_major_formatter(EngFormatter(sep=""))


def _trend(one: Series) -> str:
    """A series in words: where it begins, ends, is lowest and highest."""
    y = np.asarray(one.y, float)
    finite = np.flatnonzero(np.isfinite(y))
    if not len(finite):
        return ""
    first, last = y[finite[0]], y[finite[-1]]
    low, high = np.min(y[finite]), np.max(y[finite])
    return (
        f"{one.name}: {len(finite)} points from {number(first)} to {number(last)}, "
        f"lowest {number(low)}, highest {number(high)}"
    )


def _points(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Table:
    rows: list[list[Cell]] = []
    cut = False
    for one in series:
        step = math.ceil(len(one.x) / _MOST_ROWS)
        cut |= step > 1
        places = sorted({*range(0, len(one.x), max(step, 1)), len(one.x) - 1}) if len(one.x) else []
        name: list[Cell] = [one.name] if len(series) > 1 else []
        rows += [[*name, one.x[i], one.y[i]] for i in places]
    heads = [*(["series"] if len(series) > 1 else []), x_label, y_label]
    return Table(f"{title}{' (every so many of the points)' if cut else ''}", heads, rows)


def _svg(title: str, alt: str, draw: Callable[[Axes], None], x_label: str, y_label: str) -> str:
    """One set of axes as SVG text to stand in a page."""
    slug = "p" + hashlib.sha256(f"{title}\n{alt}".encode()).hexdigest()[:10]
    # The salt makes ids repeatable, and different in each plot of a page.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": slug}):
        figure = Figure(figsize=_SIZE, layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.grid(True, color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        file = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), slug, alt)


def _inline(svg: bytes, slug: str, alt: str) -> str:
    """The drawing without its XML head: themed colours, no ids but those referred to, a name for screen readers."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(svg)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    text = ET.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    for node in root.iter():
        if node.get("id") not in used:
            node.attrib.pop("id", None)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    text = ET.tostring(root, encoding="unicode")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{slug}-", text)
    return re.sub("|".join(_THEMED), lambda found: _THEMED[found.group()], text)
