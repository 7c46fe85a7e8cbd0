"""Templates: what they make of an item's columns, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from efficientids.data.texts import templates
from efficientids.errors import UserError

ITEMS = pl.DataFrame(
    {
        "title": ["Red  hat\n", "Blue hat", None, "  "],
        "brand": ["Acme", None, "Best", "Best"],
        "genres": [["a", " b "], [], ["", None], None],
        "price": [1.5, float("nan"), None, 2.0],
        "year": [1999, 2000, None, 2002],
        "description": ["hello big world", "unbroken" * 3, "hello big", None],
        "sizes": pl.Series([[1, 2]] * 4, dtype=pl.Array(pl.Int64, 2)),
    }
)


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("{title}", ["Red hat", "Blue hat", "", ""]),
        ("{title}[ by {brand}]", ["Red hat by Acme", "Blue hat", "", ""]),
        ("[{title}][ by {brand}]", ["Red hat by Acme", "Blue hat", "by Best", "by Best"]),
        ("[{title}][ ({genres})]", ["Red hat (a, b)", "Blue hat", "", ""]),
        ("[{brand}, {price}]!", ["Acme, 1.5!", "!", "!", "Best, 2.0!"]),
        ("{title} {brand}", ["Red hat Acme", "", "", ""]),
        ("{title}: {sizes}, {year}", ["Red hat: 1, 2, 1999", "Blue hat: 1, 2, 2000", "", ""]),
        ("[{description:9}]", ["hello big", "unbrokenu", "hello big", ""]),
        ("[{description:8}]", ["hello", "unbroken", "hello", ""]),
        ("[{description:24}]", ["hello big world", "unbroken" * 3, "hello big", ""]),
        (r"[\[{brand}\] \{x\} \\]", [r"[Acme] {x} \\"[:-1], "", r"[Best] {x} \\"[:-1], r"[Best] {x} \\"[:-1]]),
    ],
)
def test_render(template: str, texts: list[str]) -> None:
    parsed = templates.parse(template)
    parsed.check(ITEMS, "items")
    rendered = parsed.render(ITEMS)
    assert rendered.dtype == pl.String
    assert rendered.to_list() == texts


def test_what_stands_in_a_value_is_not_read_as_a_template() -> None:
    items = pl.DataFrame({"title": ["{brand} [x] \\{"], "brand": ["no"]})
    assert templates.parse("{title}").render(items).to_list() == ["{brand} [x] \\{"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{title", "'{' at character 1"),
        ("title}", "'}' at character 6"),
        ("a{ti{tle}", "'{' at character 2"),
        ("{}", "{} at character 1: expected {column}"),
        ("{ title}", "{ title} at character 1"),
        ("{title:0}", "{title:0} at character 1"),
        ("{title:-3}", "{title:-3}"),
        ("{title:3!r}", "{title:3!r}"),
        ("[{title}", "'[' without its ']' at character 1"),
        ("{title}]", "']' without its '[' at character 8"),
        ("[{title}[{brand}]]", "a part inside a part at character 9"),
        ("{title}[ by]", "the part [...] at character 8"),
        ("{title}[]", "the part [...] at character 8"),
        ("only text", "names no column"),
        ("\\n{title}", "at character 1"),
    ],
)
def test_what_does_not_parse_is_refused_with_its_place(template: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        templates.parse(template)
    assert message in str(error.value)


@pytest.mark.parametrize("template", ["{title.__class__}", "{title[0]}", "{0.__init__.__globals__}"])
def test_nothing_is_looked_up_but_columns(template: str) -> None:
    with pytest.raises(UserError):
        templates.parse(template).check(ITEMS, "items.parquet")


def test_an_unknown_column_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"items\.parquet has no column 'color'; it has title, brand, genres, price"):
        templates.parse("{title}[ {color}]").check(ITEMS, "items.parquet")
    nested = ITEMS.select(pl.struct("title", "brand").alias("both"))
    with pytest.raises(UserError, match=r"'both' of items is Struct.*no text"):
        templates.parse("{both}").check(nested, "items")


def test_load_takes_a_text_a_name_or_a_file(tmp_path: Path) -> None:
    assert templates.load("[{brand}]") == templates.parse("[{brand}]")
    assert templates.load("title") == templates.parse("{title}")
    file = tmp_path / "mine.yaml"
    file.write_text("description: for hats\ntemplate: '{title}[ by {brand}]'\n")
    assert templates.load(str(file)).render(ITEMS).to_list()[0] == "Red hat by Acme"
    with pytest.raises(UserError, match=r"no such file.*names title, title_brand"):
        templates.load(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "expected `template: TEXT`"),
        ("template: 3", "expected `template: TEXT`"),
        ("template: '{title}'\nlimit: 3", "unknown key 'limit'; known keys: template, description"),
        ("template: '{title'", "mine.yaml: '{' at character 1"),
        ("template: {title}", "expected `template: TEXT`"),
        ("template: '{title", "cannot be read"),
        ("template: !!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        templates.load(str(file))
    assert message in str(error.value)


def test_every_shipped_template_parses_and_begins_with_the_title() -> None:
    files = sorted(templates.SHIPPED.glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        assert templates.load(file.stem).columns[0] == "title"
