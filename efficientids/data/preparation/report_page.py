"""A data set's report as a page with plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efficientids.data.layout import PAGE, REPORT
from efficientids.data.preparation.report import DataReport
from efficientids.pages.figures import Series, bar_plot, line_plot
from efficientids.pages.page import Cell, Facts, Plot, Section, Table, Text, page


def files(report: DataReport) -> dict[str, str]:
    """File name → text of what stands beside a data set: JSON, and a page for the browser."""
    return {REPORT: report.to_json() + "\n", PAGE: to_html(report)}


def to_html(report: DataReport) -> str:
    """One HTML document that needs nothing else; the same report gives the same bytes."""
    subtitle = f"{report.users:,} users, {report.items:,} items, {report.interactions:,} interactions"
    return page(
        f"Data set {report.name}",
        subtitle,
        [
            Section("In numbers", [Facts(_numbers(report))]),
            Section("How it looks", plots(report)),
            Section("How it came about", [*_origin(report)]),
            Section("Unreadable rows", _bad_rows(report.bad_rows)),
            Section("The same as text", [Text(report.to_text(), "pre")]),
        ],
    )


def plots(report: DataReport) -> list[Plot]:
    """What the report has the numbers for: lengths, popularity, interactions a month."""
    found = []
    if report.length_histogram:
        labels = [f"{low}" if low == high else f"{low}–{high}" for low, high, _ in report.length_histogram]
        users = [number for _, _, number in report.length_histogram]
        found.append(
            bar_plot("How long histories are", labels, users, x_label="interactions of a user", y_label="users")
        )
    if report.popularity:
        items, rows = ([point[axis] for point in report.popularity] for axis in (0, 1))
        series = [Series("this data set", items, rows), Series("all items equally popular", [0.0, 1.0], [0.0, 1.0])]
        found.append(
            line_plot(
                "How popularity is shared out",
                series,
                x_label="share of items, the most popular first",
                y_label="share of interactions",
            )
        )
    if report.by_month:
        months, counts = ([month[part] for month in report.by_month] for part in (0, 1))
        found.append(
            bar_plot(
                "When",
                [str(month) for month in months],
                [int(count) for count in counts],
                x_label="month",
                y_label="interactions",
            )
        )
    return found


def _numbers(report: DataReport) -> dict[str, Cell]:
    return {
        "users": report.users,
        "items with an interaction": report.items,
        "items in the catalogue": report.catalogue,
        "interactions": report.interactions,
        "density": f"{report.density:.4%}",
        "interactions of a user": f"{report.length_min} to {report.length_max}, median {report.length_median:g}, "
        f"mean {report.length_mean:.1f}",
        **({"rows that share their time with another of the user": f"{report.tied_share:.1%}"} if report.timed else {}),
        "rows that repeat an item of the user": report.repeats,
        "items without a title": report.untitled_items,
        "users who are never evaluated": report.train_only_users,
        **{f"{split} targets that no training row has": count for split, count in report.cold_targets.items()},
    }


def _origin(report: DataReport) -> list[Facts | Table | Text]:
    blocks: list[Facts | Table | Text] = [
        Facts({**_worded("order", report.order), **_worded("filter", report.filters), **_worded("split", report.split)})
    ]
    if report.dropped:
        rows: list[list[Cell]] = [[name.replace("_", " "), number] for name, number in report.dropped.items()]
        blocks.append(Table("Rows taken out", ["by", "rows"], rows))
    blocks += [Text(note) for note in report.notes]
    return blocks


def _worded(what: str, facts: Mapping[str, Any]) -> dict[str, Cell]:
    """`facts` with plain names; what is nested is written out, what is None is left out."""
    cells: dict[str, Cell] = {}
    for key, value in facts.items():
        name = f"{what}: {key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            cells |= _worded(name, value)
        elif value is not None:
            cells[name] = value if isinstance(value, int | float | str) else ", ".join(map(str, value))
    return cells


def _bad_rows(bad_rows: Mapping[str, Any]) -> list[Table | Text]:
    if not bad_rows.get("count"):
        return []
    blocks: list[Table | Text] = [
        Text(f"{bad_rows['count']:,} rows could not be read and were passed over.", "warning")
    ]
    first = [[str(row)] for row in bad_rows.get("first", [])]
    return [*blocks, Table("The first of them", ["file, line and reason"], first)] if first else blocks
