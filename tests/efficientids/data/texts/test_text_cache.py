"""The token cache: what the key covers, and that an entry is whole or not there, whoever is killed and however many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tokenizers

from efficientids.data.texts import cache as token_cache
from efficientids.data.texts.templates import parse
from efficientids.data.texts.tokens import title_table
from efficientids.errors import UserError

TITLES = ["the red hat", "a hat", None, "", "hat red the a hat the", "red"]
WORDS = {"<unk>": 0, "<s>": 1, "the": 2, "a": 3, "red": 4, "hat": 5}
K = 4
TABLE = [[-1] * 4, [2, 4, 5, -1], [3, 5, -1, -1], [-1] * 4, [-1] * 4, [5, 4, 2, 3], [4, -1, -1, -1]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the folder of its entries."""
    monkeypatch.setenv(token_cache.VARIABLE, str(tmp_path / "cache"))
    token_cache._say_once.cache_clear()
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path, WORDS)


def write_tokenizer(folder: Path, words: dict[str, int]) -> Path:
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return folder / "tokenizer.json"


def table(tokenizer: Path, titles: list[str | None] = TITLES, columns: int = K) -> list[list[int]]:
    items = pl.DataFrame({"title": titles}, schema={"title": pl.String})
    result, bos = title_table(items, parse("{title}"), tokenizer, columns, len(WORDS))
    assert bos == 1 and result.dtype == np.int32
    return result.tolist()


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def no_more_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(token_cache, "_encode", fail)


def test_tokenised_once_whatever_the_length_kept(
    cache: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table(tokenizer) == TABLE
    no_more_tokenising(monkeypatch)
    assert table(tokenizer) == TABLE
    assert table(tokenizer, columns=2) == [row[:2] for row in TABLE]
    assert table(tokenizer, columns=7)[5] == [5, 4, 2, 3, 5, 2, -1]
    assert len(entries(cache)) == 1
    assert capsys.readouterr().err == ""


def test_the_table_is_what_the_tokenizer_makes_of_each_text(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the borders of chunks, of the table's and of the tokenizer's."""
    monkeypatch.setattr("efficientids.data.texts.tokens._CHUNK", 7)
    monkeypatch.setattr(token_cache, "_CHUNK", 3)
    rng = np.random.default_rng(0)
    titles: list[str | None] = [" ".join(rng.choice(list(WORDS)[2:], rng.integers(0, 6))) for _ in range(50)]
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    expected = [(encoder.encode(title).ids + [-1] * K)[:K] for title in titles]
    assert table(tokenizer, titles) == [[-1] * K, *expected]


def test_no_text_at_all(tokenizer: Path) -> None:
    assert table(tokenizer, [None, ""]) == [[-1] * K] * 3
    assert table(tokenizer, [None, ""]) == [[-1] * K] * 3


def test_other_texts_order_or_tokenizer_have_an_entry_of_their_own(cache: Path, tokenizer: Path) -> None:
    seen = set()
    for titles in (TITLES, TITLES[::-1], ["ab", "c"], ["a", "bc"], ["a", "b", "c"], ["abc"]):
        table(tokenizer, list(titles))
        seen.add(tuple(entries(cache)))
    assert len(seen) == 6
    write_tokenizer(tokenizer.parent, {**WORDS, "red": 5, "hat": 4})
    assert table(tokenizer)[1] == [2, 5, 4, -1]
    assert len(entries(cache)) == 7


def test_settings_of_the_tokenizer_file_do_not_cut_pad_or_let_markup_through(tokenizer: Path) -> None:
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.add_special_tokens(["<s>"])
    encoder.enable_truncation(2)
    encoder.enable_padding()
    encoder.save(str(tokenizer))
    assert table(tokenizer) == TABLE
    assert table(tokenizer, ["a<s> hat"])[1] == [3, 0, 0, 0]  # "<", "s", ">" and not BOS


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_made_anew_and_said(
    cache: Path, tokenizer: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table(tokenizer)
    file = entries(cache)[0] / name
    content = bytearray(file.read_bytes())
    content[-1 if name != "manifest.json" else 0] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    assert table(tokenizer) == TABLE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is damaged" in said and str(file.parent) in said
    assert table(tokenizer) == TABLE
    assert capsys.readouterr().err == "" and entries(cache) == [file.parent]


def test_a_cache_that_cannot_be_written_is_said_once(
    cache: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.write_text("a file in the way")
    assert table(tokenizer) == TABLE
    assert table(tokenizer) == TABLE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no token cache" in said and str(cache) in said and token_cache.VARIABLE in said


def test_a_full_disk_leaves_nothing(
    cache: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)  # the second file of the entry
    assert table(tokenizer) == TABLE
    assert "No space left on device" in capsys.readouterr().err
    assert entries(cache) == []


def test_what_killed_processes_left_goes_after_an_hour(cache: Path, tokenizer: Path) -> None:
    fresh, old = cache / ".new-fresh", cache / ".new-old"
    for folder in (fresh, old):
        folder.mkdir(parents=True)
        (folder / "tokens.npy").write_bytes(b"half")
    for path in (old / "tokens.npy", old):
        os.utime(path, (time.time() - 4000,) * 2)
    table(tokenizer)
    assert fresh.exists() and not old.exists()


def test_a_token_beyond_the_llamas_vocabulary_is_refused(tokenizer: Path) -> None:
    items = pl.DataFrame({"title": ["hat"]})
    with pytest.raises(UserError, match=r"token id 5, the Llama's vocabulary has 5"):
        title_table(items, parse("{title}"), tokenizer, K, 5)


# A process of its own, which waits at the point that its third argument names until the file `go` is there.
CHILD = f"""
import pathlib, sys, time
import polars as pl
from efficientids.data.texts import templates, tokens as text, cache as token_cache
here, at = pathlib.Path(sys.argv[1]), sys.argv[2]
def wait_in(module, name):
    plain = getattr(module, name)
    def waiting(*arguments, **named):
        if at == "after " + name:
            plain(*arguments, **named)
        print("waiting", flush=True)
        while not (here / "go").exists():
            time.sleep(0.005)
        return None if at == "after " + name else plain(*arguments, **named)
    setattr(module, name, waiting)
if at == "_encode":
    plain_encode = token_cache._encode
    def encode(*arguments):
        token_cache._CHUNK = 2
        for n, made in enumerate(plain_encode(*arguments)):
            yield made
            if n == 1:
                print("waiting", flush=True)
                while not (here / "go").exists():
                    time.sleep(0.005)
    token_cache._encode = encode
else:
    wait_in(token_cache.os if at.endswith("rename") else token_cache, at.split()[-1])
items = pl.DataFrame({{"title": {TITLES!r}}}, schema={{"title": pl.String}})
table, _ = text.title_table(items, templates.parse("{{title}}"), here / "tokenizer.json", {K}, {len(WORDS)})
print(table.tolist(), flush=True)
"""


def child(folder: Path, at: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder), at]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("at", "left"),
    [("_encode", "nothing"), ("_publish", "nothing"), ("rename", "nothing"), ("after rename", "an entry")],
)
def test_a_killed_process_leaves_a_whole_entry_or_none(
    cache: Path,
    tokenizer: Path,
    at: str,
    left: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = child(tokenizer.parent, at)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "waiting\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    found = [path for path in entries(cache) if not path.name.startswith(".")]
    assert len(found) == (left == "an entry")
    if found:
        no_more_tokenising(monkeypatch)
    assert table(tokenizer) == TABLE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_at_once(
    cache: Path, tokenizer: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are past their tokenising before either has published."""
    if damaged:
        table(tokenizer)
        (entries(cache)[0] / "tokens.npy").write_bytes(b"damaged")
    both = [child(tokenizer.parent, "_publish") for _ in range(2)]
    try:
        assert [process.stdout and process.stdout.readline() for process in both] == ["waiting\n"] * 2
        (tokenizer.parent / "go").touch()
        results = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [out for out, _ in results] == [f"{TABLE}\n"] * 2
    assert [("is damaged" in err, process.returncode) for (_, err), process in zip(results, both, strict=True)] == [
        (damaged, 0)
    ] * 2
    assert len(entries(cache)) == 1
    no_more_tokenising(monkeypatch)
    assert table(tokenizer) == TABLE
    assert capsys.readouterr().err == ""


def test_real_titles_and_tokenizer(real_data: Path, cache: Path) -> None:
    """Films' titles through the real Llama-2 tokenizer, against the tokenizer called one text at a time."""
    tokenizer = real_data / "tokenizers" / "llama2_hf" / "tokenizer.json"
    movies = (real_data / "ml-1m" / "movies.dat").read_bytes().decode("latin-1").splitlines()
    titles = [line.split("::")[1] for line in movies][:300]
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    items = pl.DataFrame({"title": titles})
    for _ in ("made", "read"):
        got, bos = title_table(items, parse("{title}"), tokenizer, 40, 32_000)
        assert bos == 1
        for row, title in zip(got[1:], titles, strict=True):
            assert row[row >= 0].tolist() == encoder.encode(title, add_special_tokens=False).ids[:40]
    assert len(entries(cache)) == 1


def test_a_tokenizer_without_bos_starts_as_its_model_says(cache: Path, tokenizer: Path) -> None:
    """Qwen's has none; its config.json names <|endoftext|> as bos_token_id."""
    tokenizer.with_name("tokenizer_config.json").write_text('{"bos_token": null}')
    with pytest.raises(UserError, match=r"has no bos_token, and .*config\.json no bos_token_id"):
        table(tokenizer)
    items = pl.DataFrame({"title": TITLES}, schema={"title": pl.String})
    tokenizer.with_name("config.json").write_text('{"bos_token_id": 2}')
    assert title_table(items, parse("{title}"), tokenizer, K, len(WORDS))[1] == 2
