"""A tokenizer's page: how its codes are used, and how that came about over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficientids.pages.figures import Series, bar_plot, line_plot
from efficientids.pages.page import Block, Cell, Facts, Plot, Section, Table, page

_BY_LEVEL = {
    "used": ("Codes that some item has", "share of a level's codes"),
    "perplexity": ("Perplexity of codes", "perplexity"),
    "collisions": ("Items that share their codes up to a level with an earlier one", "share of items"),
}
_LOSSES = ("loss", "reconstruction", "quantization")


def to_html(described: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One HTML document; `described`: `tokenizer.fill`'s; `rows`: an epoch each, none without an RQ-VAE."""
    sizes, metrics = described["level_sizes"], described["metrics"]
    levels = [
        [level + 1, sizes[level], *(metrics[name][level] for name in _BY_LEVEL)] for level in range(len(sizes) - 1)
    ]
    table = Table("Real levels", ["level", "codes", *_BY_LEVEL], levels)
    facts: dict[str, Cell] = {
        "items": metrics["items"],
        "different real codes": metrics["distinct"],
        "items that share the most common ones": metrics["largest_bucket"],
        "codes of the suffix level": sizes[-1],
        "version": described["version"],
    }
    settings: dict[str, Cell] = {name: str(value) for name, value in described["settings"].items()}
    drawn: Sequence[Block] = _over_epochs(rows) if rows else _by_level(metrics)
    return page(
        f"Tokenizer of {described['dataset']}",
        f"{described['method']}, levels of {', '.join(map(str, sizes))} codes, the last a suffix",
        [
            Section("Codes", [Facts(facts), table]),
            Section("How they came about" if rows else "How they are used", drawn),
            Section("Made with", [Facts(settings)]),
        ],
    )


def _over_epochs(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    epochs = [row["epoch"] for row in rows]
    losses = [Series(name, epochs, [row[name] for row in rows]) for name in _LOSSES]
    plots = [line_plot("Losses", losses, x_label="epoch", y_label="loss")]
    for name, (title, y_label) in {**_BY_LEVEL, "revived": ("Dead codes revived", "codes")}.items():
        series = [
            Series(f"level {level + 1}", epochs, [row[name][level] for row in rows])
            for level in range(len(rows[0][name]))
        ]
        plots.append(line_plot(title, series, x_label="epoch", y_label=y_label, from_zero=True))
    return plots


def _by_level(metrics: Mapping[str, Any]) -> list[Plot]:
    labels = [f"level {level + 1}" for level in range(len(metrics["used"]))]
    return [
        bar_plot(title, labels, metrics[name], x_label="level", y_label=y_label)
        for name, (title, y_label) in _BY_LEVEL.items()
    ]
