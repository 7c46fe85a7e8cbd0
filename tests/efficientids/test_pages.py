"""Static pages: what they hold, that they need nothing else, and that the same data gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from efficientids.data.generated import generate
from efficientids.data.preparation import report_page
from efficientids.data.preparation.report import DataReport
from efficientids.pages.figures import Mark, Series, bar_plot, line_plot, thinned
from efficientids.pages.page import Block, Entry, Facts, Lists, Section, Table, Text, number, page, write

NASTY = '<b onload="x()">$\\frac{1}{2}$ & "co"'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects them with their texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def check_static(html: str) -> Reader:
    """Nothing runs, nothing is fetched, and each reference is to an id of the page that occurs once."""
    reader = read(html)
    assert "script" not in reader.tags and "link" not in reader.tags and "img" not in reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    addresses = set(re.findall(r"\w+://[^\"'\s<]+", html)) - {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert not addresses
    assert "default-src 'none'" in html
    assert len(reader.ids) == len(set(reader.ids))
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert referred and referred <= set(reader.ids)
    return reader


def sample_line() -> Series:
    return Series("a", list(range(1, 60)), [5 / i for i in range(1, 60)])


def test_the_same_data_gives_the_same_bytes_and_other_data_others() -> None:
    def plot(scale: float) -> str:
        series = [sample_line(), Series("b", [1, 30, 59], [scale, math.nan, 2.0])]
        return line_plot("Loss", series, x_label="step", y_label="loss", mark=Mark(30, 2.0, "best")).svg

    assert plot(1.0) == plot(1.0) != plot(1.5)
    bars = [bar_plot("Months", ["1", "2"], [3, 4], x_label="month", y_label="rows") for _ in range(2)]
    assert bars[0] == bars[1]
    assert not re.search(r"\d{4}-\d\d-\d\dT", bars[0].svg)  # no date


def test_colours_follow_the_page() -> None:
    plot = line_plot("Loss", [sample_line()], x_label="step", y_label="loss")
    assert "var(--series-0)" in plot.svg and "currentColor" in plot.svg and "var(--faint)" in plot.svg
    assert not re.search(r"#0[0-9][0-9a-f]{4}\b", plot.svg)


def test_a_plot_says_in_words_and_numbers_what_it_shows() -> None:
    series = [Series("train", [1, 2, 3], [4.0, 1.0, 2.0]), Series("other", [1], [math.nan])]
    plot = line_plot("Loss", series, x_label="step", y_label="loss", mark=Mark(2, 1.0, "lowest"))
    assert "train: 3 points from 4 to 2, lowest 1, highest 4" in plot.alt and "lowest, at 2" in plot.alt
    assert list(plot.table.columns) == ["series", "step", "loss"]
    assert [list(row) for row in plot.table.rows[:3]] == [["train", 1, 4.0], ["train", 2, 1.0], ["train", 3, 2.0]]
    bars = bar_plot("Users", ["1–4", "5–9"], [7, 12_000], x_label="items", y_label="users")
    assert "the highest is 5–9: 12,000" in bars.alt
    assert [list(row) for row in bars.table.rows] == [["1–4", 7], ["5–9", 12_000]]


def test_long_series_keep_their_spikes() -> None:
    y = np.ones(10_000)
    y[4321], y[7777] = 50.0, -3.0
    xs, ys = thinned(range(10_000), y.tolist(), 600)
    assert len(xs) <= 600 and xs[0] == 0 and xs[-1] == 9_999 and (np.diff(xs) > 0).all()
    assert dict(zip(xs, ys, strict=True))[4321] == 50 and dict(zip(xs, ys, strict=True))[7777] == -3
    plot = line_plot("Loss", [Series("a", range(10_000), y.tolist())], x_label="x", y_label="y")
    assert len(plot.table.rows) <= 62 and plot.table.rows[-1][0] == 9_999 and "every so many" in plot.table.caption


def test_what_cannot_be_drawn_is_refused() -> None:
    for series, logarithmic, words in (
        ([], False, "nothing to draw"),
        ([Series("a", [], [])], False, "nothing to draw"),
        ([Series("a", [1], [1, 2])], False, "1 x for 2 y"),
        ([Series("a", [1, 2], [1.0, 0.0])], True, "above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            line_plot("T", series, x_label="x", y_label="y", log_y=logarithmic)
    with pytest.raises(ValueError, match="1 labels for 2 values"):
        bar_plot("T", ["a"], [1, 2], x_label="x", y_label="y")
    assert line_plot("T", [Series("a", [1, 10], [1, 100])], x_label="x", y_label="y", log_x=True, log_y=True).svg


def test_a_page_escapes_what_it_is_given_and_needs_nothing_else() -> None:
    plots: list[Block] = [
        line_plot(NASTY, [Series(NASTY, [1, 2], [3, 4]), Series("b", [1], [2])], x_label=NASTY, y_label=NASTY),
        line_plot("Other", [Series("a", [1, 2], [3, 4])], x_label="x", y_label="y"),
        bar_plot(NASTY, [NASTY, "b"], [1, 2], x_label=NASTY, y_label=NASTY),
    ]
    more = [
        Table(NASTY, [NASTY, "n"], [[NASTY, 1234567]]), Facts({NASTY: NASTY, "none": None}, NASTY),
        Text(NASTY, "warning"), Lists(NASTY, NASTY, [Entry(NASTY)], NASTY, [Entry(NASTY, NASTY)]),
    ]  # fmt: skip
    html = page(NASTY, NASTY, [Section(NASTY, [*plots, *more]), Section("Empty")])
    reader = check_static(html)
    assert "<b onload" not in html and "b" not in reader.tags
    assert reader.text.count(NASTY) >= 20 and "1,234,567" in reader.text and "Empty" not in reader.text
    # Each plot has a name for screen readers and its numbers.
    assert html.count('role="img"') == html.count("<summary>Numbers</summary>") == 3
    assert len([1 for name, _ in reader.attributes if name == "aria-label"]) == 3


def test_a_page_has_both_themes_and_a_printed_one() -> None:
    html = page("T", "s", [Section("H", [Text("x")])])
    for words in ("prefers-color-scheme: dark", "@media print", 'lang="en"', '<meta charset="utf-8">'):
        assert words in html


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.html"
    write(file, "first")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            write(file, "second")
    assert file.read_text() == "first"
    write(file, "second")
    assert file.read_text() == "second" and [entry.name for entry in tmp_path.iterdir()] == ["p.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1234567, "1,234,567"), (0.0123456, "0.01235"), (3.0, "3"), (123456.78, "123,456.8"), ("a", "a"),
     (True, "True"), (math.inf, "inf"), (-2.5, "-2.5"), (1e300, "1e+300")],
)  # fmt: skip
def test_numbers_for_people(value: object, text: str) -> None:
    assert number(value) == text  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report() -> DataReport:
    contents = generate(num_users=40, num_items=30, shortest=5, longest=12).contents
    bad = {"count": 2, "first": ["ratings.csv:7: no time", "ratings.csv:9: <script>"]}
    return dataclasses.replace(DataReport.of(contents, dropped={"min_rating": 17}, bad_rows=bad), notes=["a note"])


def test_the_page_of_a_data_set(report: DataReport) -> None:
    months = [(f"20{year:02}-{month:02}", year + month) for year in range(4) for month in range(1, 13)]
    full = dataclasses.replace(report, by_month=months)
    html = report_page.to_html(full)
    assert html == report_page.to_html(full)
    text = check_static(html).text
    assert html.count("<svg") == 3
    for words in ("How long histories are", "How popularity is shared out", "When", "2003-12", "min rating", "17",
                  "a note", "ratings.csv:9: <script>", f"{report.interactions:,}", report.to_text()):  # fmt: skip
        assert words in text, words
    # The numbers of the length plot are the users.
    (lengths, *_) = report_page.plots(full)
    assert sum(int(str(row[1])) for row in lengths.table.rows) == report.users == 40


def test_a_data_set_without_times_or_anything_dropped(report: DataReport) -> None:
    bare = dataclasses.replace(
        report,
        by_month=[],
        popularity=[],
        length_histogram=[],
        dropped={},
        notes=[],
        bad_rows={"count": 0, "first": []},
    )
    html = report_page.to_html(bare)
    assert "<svg" not in html and "Unreadable rows" not in html and "Rows taken out" not in html
    read(html)
    # What comes back from report.json draws the same page.
    assert report_page.to_html(DataReport.from_json(bare.to_json())) == html
    assert json.loads(bare.to_json())["by_month"] == []
