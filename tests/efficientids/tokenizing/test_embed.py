"""`embed-items`: vectors of a run, of texts, of histories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import tokenizers
from flax import nnx

from core.llama_loader import LlamaLoader
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.errors import UserError
from efficientids.loading import open_run
from efficientids.tokenizing import embed_cli
from efficientids.tokenizing.texts import pooled, text_vectors
from efficientids.tokenizing.vectors import ItemVectors, from_histories, read_vectors, unit_rows
from efficientids.train import main as train
from tests.efficientids.conftest import Trained
from tests.efficientids.data.texts.test_text_cache import write_tokenizer
from tests.efficientids.tiny import FROZEN, LLAMA, NUM_ITEMS, flags
from tests.efficientids.tokenizing.conftest import some_vectors

pytestmark = pytest.mark.usefixtures("quick_compile")


def embedded(data: Dataset, output: Path, *more: str | Path) -> ItemVectors:
    words = ["--data_dir", str(data.path), "--output", str(output), *map(str, more)]
    assert embed_cli.main(words) == 0
    return read_vectors(output, data)


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the titles' words, as many as the Llama has tokens for."""
    words = sorted({word for title in tiny_data.items["title"].to_list() for word in title.split()})
    known = ["<s>", "<unk>", *words][: LLAMA.vocab_size]
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), {word: token for token, word in enumerate(known)})


def test_texts_are_pooled_as_if_each_stood_alone(tiny_data: Dataset, weights: Path, tokenizer: Path) -> None:
    titles = [None, "x", *tiny_data.items["title"].to_list()[2:]]

    class Titled:
        path = tiny_data.path
        items = tiny_data.items.with_columns(pl.Series("title", titles))

    told: list[tuple[int, int]] = []
    options: Any = {
        "tokenizer": tokenizer, "max_tokens": 3, "batch_size": 7, "progress": lambda *seen: told.append(seen)
    }  # fmt: skip
    loader, data = LlamaLoader(path=weights), Titled()
    mean, slot = (text_vectors(data, loader, pooling=pooling, **options) for pooling in ("mean", "slot"))  # type: ignore[arg-type]
    assert mean.shape == (NUM_ITEMS + 1, LLAMA.hidden_size) and mean.dtype == np.float32
    assert not mean[:2].any() and not slot[:2].any()  # padding, and the item without a title
    assert told[-1] == (NUM_ITEMS - 1, NUM_ITEMS - 1)
    model, params, _ = loader.load_model()
    llama = nnx.merge(model.graphdef, params)
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    hidden = jax.jit(lambda ids: llama.hidden(llama.embed(ids))[0])
    for item in (2, 3, NUM_ITEMS):
        ids = encoder.encode(titles[item - 1]).ids[:3]
        states = np.asarray(hidden(jnp.array([[0, *ids]])))
        np.testing.assert_allclose(mean[item], states[1:].mean(axis=0), rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(slot[item], states[-1], rtol=2e-4, atol=2e-5)


def test_pooling_sees_no_padding() -> None:
    hidden = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    lengths = jnp.array([1, 3])
    np.testing.assert_allclose(pooled(jnp.asarray(hidden), lengths, "slot"), [hidden[0, 1], hidden[1, 3]])
    np.testing.assert_allclose(pooled(jnp.asarray(hidden), lengths, "mean"), [hidden[0, 1], hidden[1, 1:].mean(axis=0)])


def test_sources_stand_side_by_side(
    trained: Trained, tiny_data: Dataset, weights: Path, tokenizer: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = trained(*FROZEN)
    np.save(tmp_path / "given.npy", some_vectors(NUM_ITEMS).vectors_NI[1:])
    text = ["--weights", weights, "--tokenizer", tokenizer, "--max_tokens", "3", "--batch_size", "16"]
    given = ["--vectors", tmp_path / "given.npy"]
    capsys.readouterr()
    found = embedded(tiny_data, tmp_path / "V.npy", "--run", run, *text, *given, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["sources"] == {"run": 16, "text": 16, "given": 10} == dict(found.sources)
    assert told["items"] == NUM_ITEMS and told["width"] == 42 and told["unknown_items"] == 0
    model: Any = open_run(run).model
    table = np.asarray(model.items.table())
    np.testing.assert_allclose(found.vectors_NI[1:, :16], unit_rows(table[1:]), rtol=1e-5, atol=1e-6)
    assert not found.vectors_NI[0].any()
    # The file may be a source again; nothing is replaced unasked.
    again = embedded(tiny_data, tmp_path / "W.npy", "--vectors", tmp_path / "V.npy")
    np.testing.assert_allclose(again.vectors_NI, found.vectors_NI / 3**0.5, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match=r"V\.npy exists"):
        embedded(tiny_data, tmp_path / "V.npy")


def test_histories_alone(tiny_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = embedded(tiny_data, tmp_path / "V.npy", "--dim", "6", "--seed", "3")
    assert "30 items, cooccurrence (6 columns); 0 items about which nothing is known" in capsys.readouterr().out
    np.testing.assert_array_equal(found.vectors_NI, unit_rows(from_histories(tiny_data, 6, 3)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--output", "V.txt"], r"ends in \.npy"),
        (["--output", "{here}/none/V.npy"], "no folder"),
        (["--pooling", "slot"], "--pooling has a meaning only with --weights"),
        (["--step", "3"], "--step has a meaning only with --run"),
        (["--dim", "3", "--run", "nowhere"], "--dim has a meaning only with no other source"),
        (["--dim", "0"], "--dim 0"),
        (["--run", "nowhere"], "nowhere is not a run folder"),
        (["--weights", "nowhere"], "nowhere: no such folder"),
        (["--llama_size", "tiny"], "no published weights"),
        (["--llama_size", "huge"], "huge"),
        (["--llama_size", "1b", "--weights", "there"], "model_size or path"),
        (["--vectors", "nowhere.npy"], "no such file"),
    ],
)
def test_flags_that_are_refused(tiny_data: Dataset, tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        embedded(tiny_data, tmp_path / "V.npy", *[flag.format(here=tmp_path) for flag in given])
    assert not list(tmp_path.iterdir())


def test_runs_of_other_systems_and_items(trained: Trained, tiny_data: Dataset, tmp_path: Path) -> None:
    runs = {}
    for name, more in (("sasrec", {"num_steps": 1, "batch_size": 8, "seq_len": 8, "width": 8}), ("popularity", {})):
        runs[name] = tmp_path / name
        job = {"recommender": name, "data_dir": tiny_data.path, "checkpoint_dir": runs[name], **more}
        assert train(flags(**job)) == 0
    found = embedded(tiny_data, tmp_path / "V.npy", "--run", runs["sasrec"])
    model: Any = open_run(runs["sasrec"]).model
    np.testing.assert_allclose(found.vectors_NI[1:], unit_rows(np.asarray(model.items_ND[...])[1:]), rtol=1e-5)
    with pytest.raises(UserError, match="a popularity has no item vectors"):
        embedded(tiny_data, tmp_path / "W.npy", "--run", runs["popularity"])
    other = generate(num_users=20, num_items=16, shortest=4, longest=8).write(tmp_path / "other")
    with pytest.raises(UserError, match="has other items than the data set of"):
        embedded(other, tmp_path / "W.npy", "--run", runs["sasrec"])
    assert not (tmp_path / "W.npy").exists()
