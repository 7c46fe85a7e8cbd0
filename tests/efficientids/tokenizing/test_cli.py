"""`tokenize`: made, imported, extended; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.data.writing import write_dataset
from efficientids.errors import UserError
from efficientids.tokenizing import cli
from efficientids.tokenizing.tokenizer import Tokenizer, external_ids, open_tokenizer
from efficientids.tokenizing.vectors import ItemVectors, read_vectors, write_vectors
from tests.efficientids.tiny import NUM_ITEMS
from tests.efficientids.tokenizing.conftest import some_vectors

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = ["--levels", "4,4", "--suffix_size", "16"]
RQVAE = [*SMALL, "--hidden", "12", "--latent_dim", "6", "--epochs", "3", "--batch_size", "16"]
Given = dict[str, list[str]]


@pytest.fixture(scope="module")
def given(vectors: ItemVectors, tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vectors of the tiny data set in a file."""
    file = tmp_path_factory.mktemp("vectors") / "V.npy"
    write_vectors(file, vectors, tiny_data)
    return file


def tokenized(data: Dataset, output: Path, *more: str | Path) -> Tokenizer:
    words = ["--data_dir", str(data.path), "--output", str(output), *map(str, more)]
    assert cli.main(words) == 0
    return open_tokenizer(output, data)


def test_an_rqvae_tokenizer(
    given: Path, tiny_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenized(tiny_data, tmp_path / "T", "--vectors", given, *RQVAE, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == tokenizer.version and told["level_sizes"] == [4, 4, 16] and told["num_items"] == NUM_ITEMS
    assert told["metrics"]["collisions"][-1] == pytest.approx(1 - told["metrics"]["distinct"] / NUM_ITEMS)
    assert {path.name for path in (tmp_path / "T").iterdir()} == {
        "tokenizer.json", "codes.npy", "items.parquet", "vectors.npy", "parameters.safetensors", "metrics.jsonl",
        "report.html",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "T" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and len(rows[0]["perplexity"]) == 2
    page = (tmp_path / "T" / "report.html").read_text()
    assert all(
        title in page for title in ("Perplexity of codes", "Dead codes revived", "collisions", tokenizer.version)
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["T"]  # nothing hidden is left


def test_without_vectors_histories_serve(
    tiny_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenized(tiny_data, tmp_path / "T", "--method", "kmeans", *SMALL, "--sinkhorn")
    out = capsys.readouterr().out
    assert "no --vectors: 256 columns" in out and "kmeans: 30 items, levels of 4/4 codes, a suffix of 16" in out
    assert tokenizer.vectors_NI is not None and tokenizer.vectors_NI.shape == (NUM_ITEMS + 1, 256)
    assert not (tmp_path / "T" / "metrics.jsonl").exists()
    assert "How they are used" in (tmp_path / "T" / "report.html").read_text()


def letter_codes(data: Dataset) -> Given:
    """Codes in LETTER's form; items 2 and 3 collide, and so do 5, 6 and 7."""
    codes = {item: [f"<a_{i % 5}>", f"<b_{i}>"] for i, item in enumerate(data.items["item_id"].to_list())}
    names = list(codes)
    codes[names[2]] = codes[names[1]]
    codes[names[5]] = codes[names[6]] = codes[names[4]]
    return codes


def test_import(tiny_data: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "codes.json"
    file.write_text(json.dumps({**letter_codes(tiny_data), "elsewhere": ["<a_9>", "<b_9>"]}))
    tokenizer = tokenized(tiny_data, tmp_path / "T", "--import_codes", file)
    assert tokenizer.method == "imported" and tokenizer.level_sizes == (5, 30, 4)  # 3 in a bucket: 4
    assert tokenizer.codes_NL[1:8].tolist() == [
        [0, 0, 0], [1, 1, 0], [1, 1, 1], [3, 3, 0], [4, 4, 0], [4, 4, 1], [4, 4, 2],
    ]  # fmt: skip
    assert tokenizer.rqvae is None and tokenizer.vectors_NI is None
    assert tokenizer.metrics["distinct"] == 27 and tokenizer.metrics["largest_bucket"] == 3
    declared = tokenized(tiny_data, tmp_path / "D", "--import_codes", file, "--levels", "8,32", "--suffix_size", 3)
    assert declared.level_sizes == (8, 32, 3)


def numbered(codes: Given, data: Dataset) -> Given:
    return {str(place): codes[item] for place, item in enumerate(data.items["item_id"].to_list())}


def test_ids_that_count_from_zero(tiny_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = generate(num_users=20, num_items=NUM_ITEMS, shortest=4, longest=8).contents
    names = pl.Series("item_id", [str(i) for i in range(1, NUM_ITEMS + 1)])
    data = write_dataset(tmp_path / "numbered", dataclasses.replace(contents, items=contents.items.with_columns(names)))
    file = tmp_path / "codes.json"
    file.write_text(json.dumps(numbered(letter_codes(tiny_data), tiny_data)))
    tokenizer = tokenized(data, tmp_path / "T", "--import_codes", file)
    assert tokenizer.codes_NL[2].tolist() == [1, 1, 0]
    assert "counts items from 0" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 of 30 items of .* have no codes, first 30"):
        tokenized(data, tmp_path / "N", "--import_codes", file, "--item_id_offset", 0)


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda codes, name: codes.pop(name), [], "1 of 30 items of .* have no codes, first film-0004"),
        (
            lambda codes, name: codes.update({name: ["<a_1>"]}),
            [],
            r"item film-0004 has \[\"<a_1>\"\]; expected <a_…> <b_",
        ),
        (lambda codes, name: codes.update({name: ["<b_1>", "<a_1>"]}), [], "film-0004 has .*; expected <a_…> <b_…>"),
        (lambda codes, name: codes.update({name: ["<a_1>", "<b_-1>"]}), [], "film-0004 has"),
        (lambda codes, name: codes.update({name: ["<a_1>", 7]}), [], "film-0004 has"),
        (lambda codes, name: None, ["--levels", "5,29"], r"code 29 at level 1, whose alphabet is 0 … 28"),
        (
            lambda codes, name: codes.update({name: ["<a_1>", "<b_999999999>"]}),
            [],
            r"codes.json: item film-0004 has <b_999999999> at level 1; codes are below 1,048,576: correct it",
        ),
        (lambda codes, name: None, ["--levels", "5,2000000"], "--levels 5,2000000: give at most 1,048,576 codes"),
        (
            lambda codes, name: None,
            ["--item_id_offset", "1"],
            r"--item_id_offset 1: item 'film-\d+' of .*codes.json is no whole number to add to; leave --item",
        ),
        (lambda codes, name: None, ["--levels", "5"], "1 levels, but items .* have 2 codes"),
        (lambda codes, name: None, ["--suffix_size", "2"], r"--suffix_size 2: .*3 items share .* give it at least 3"),
        (lambda codes, name: codes.update({name: "<a_1>"}), [], "expected one JSON object"),
        (lambda codes, name: codes.clear(), [], "expected one JSON object"),
    ],
)
def test_imports_that_are_refused(
    tiny_data: Dataset, tmp_path: Path, change: Callable[[Given, str], object], more: list[str], message: str
) -> None:
    codes = letter_codes(tiny_data)
    change(codes, "film-0004")
    file = tmp_path / "codes.json"
    file.write_text(json.dumps(codes))
    with pytest.raises(UserError, match=message):
        tokenized(tiny_data, tmp_path / "T", "--import_codes", file, *more)
    assert [entry.name for entry in tmp_path.iterdir()] == ["codes.json"]


@pytest.fixture(scope="module")
def grown(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A data set with ten more items, which are numbered before, among and behind the old ones; and its vectors."""
    path = tmp_path_factory.mktemp("grown")
    more = generate(num_users=20, num_items=40, shortest=4, longest=8).write(path / "data")
    vectors = some_vectors(40)
    np.testing.assert_array_equal(vectors.vectors_NI[1 : NUM_ITEMS + 1], np.load(given, allow_pickle=False)[1:])
    write_vectors(path / "V.npy", vectors, more)
    return more, path / "V.npy"


@pytest.mark.parametrize("method", ["rqvae", "kmeans"])
def test_new_items_get_codes_without_training(
    given: Path, tiny_data: Dataset, grown: tuple[Dataset, Path], tmp_path: Path, method: str
) -> None:
    more, more_vectors = grown
    flags = RQVAE if method == "rqvae" else [*SMALL, "--method", "kmeans"]
    first = tokenized(tiny_data, tmp_path / "T0", "--vectors", given, *flags)
    second = tokenized(more, tmp_path / "T1", "--tokenizer", tmp_path / "T0", "--vectors", more_vectors)
    assert second.codes_NL.shape == (41, 3) and second.level_sizes == first.level_sizes
    old = {item: codes for item, codes in zip(external_ids(first), first.codes_NL[1:].tolist(), strict=True)}
    new = {item: codes for item, codes in zip(external_ids(second), second.codes_NL[1:].tolist(), strict=True)}
    assert all(new[item] == codes for item, codes in old.items()) and len(new) == 40
    # New ones: the nearest codes, and suffixes that go on.
    real = second.real_codes(read_vectors(more_vectors, more))
    np.testing.assert_array_equal(real[NUM_ITEMS:], second.codes_NL[1 + NUM_ITEMS :, :2])
    table = np.array(list(new.values()))
    for bucket in np.unique(table[:, :2], axis=0):
        suffixes = table[(table[:, :2] == bucket).all(axis=1), 2]
        assert sorted(suffixes.tolist()) == list(range(len(suffixes)))
    assert second.metrics["new_items"] == 10 and second.metrics["known_items_first_code_again"] == 1.0
    again = tokenized(more, tmp_path / "T2", "--tokenizer", tmp_path / "T1", "--vectors", more_vectors)
    assert again.version == second.version


def test_what_cannot_be_extended(given: Path, tiny_data: Dataset, grown: tuple[Dataset, Path], tmp_path: Path) -> None:
    more, more_vectors = grown
    flags = ["--levels", "2,2", "--method", "kmeans"]
    first = tokenized(tiny_data, tmp_path / "wide", "--vectors", given, *flags)
    tight = first.metrics["largest_bucket"]
    tokenized(tiny_data, tmp_path / "tight", "--vectors", given, *flags, "--suffix_size", tight)
    extend = ["--tokenizer", tmp_path / "tight", "--vectors"]
    with pytest.raises(UserError, match=rf"its suffix level has {tight} codes; tokenize anew"):
        tokenized(more, tmp_path / "T", *extend, more_vectors)
    with pytest.raises(UserError, match="new items get their codes from --vectors"):
        tokenized(more, tmp_path / "T", *extend[:2])
    other = some_vectors(40)
    np.save(tmp_path / "other.npy", np.random.default_rng(1).permutation(other.vectors_NI[1:]))
    np.save(tmp_path / "turned.npy", -other.vectors_NI)
    with pytest.raises(UserError, match="of another kind"):
        tokenized(more, tmp_path / "T", *extend, tmp_path / "turned.npy")
    np.save(tmp_path / "narrow.npy", other.vectors_NI[:, :5])
    with pytest.raises(UserError, match="5 columns, where the tokenizer was made from 10 columns"):
        tokenized(more, tmp_path / "T", *extend, tmp_path / "narrow.npy")
    assert not (tmp_path / "T").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "kmeans", "--epochs", "3"], "--epochs has no meaning with --method kmeans"),
        (["--import_codes", "x.json", "--vectors", "v.npy"], "--vectors has no meaning with --import_codes"),
        (["--tokenizer", "T", "--levels", "4,4"], "--levels has no meaning with --tokenizer"),
        (["--item_id_offset", "1"], "--item_id_offset has no meaning with --method rqvae"),
        (["--levels", "4,x"], "--levels 4,x: give whole numbers"),
        (["--levels", ""], "--levels : give at least one level"),
        (["--levels", "31"], "the catalogue has 30 items"),
        (["--vectors", "nowhere.npy"], "nowhere.npy: no such file"),
        (["--import_codes", "nowhere.json"], "not a readable JSON file"),
        (["--tokenizer", "nowhere", "--vectors", "v.npy"], "--tokenizer nowhere: no tokenizer"),
        (["--output", "{here}/file"], "is a file"),
    ],
)
def test_flags_that_are_refused(tiny_data: Dataset, tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        tokenized(tiny_data, tmp_path / "T", *[flag.format(here=tmp_path) for flag in flags])
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
