"""A tokenizer's folder: written, opened, and refused where anything of it is not what it says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.rqvae import RQVAE
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.errors import UserError
from efficientids.tokenizing.making import suffixed
from efficientids.tokenizing.tokenizer import Tokenizer, fill, open_tokenizer, parameters_of
from efficientids.tokenizing.vectors import ItemVectors, Standard
from tests.efficientids.tokenizing.conftest import TINY, WIDTH, some_vectors

pytestmark = pytest.mark.usefixtures("quick_compile")
Edit = Callable[[Path], object]


def untrained(vectors: ItemVectors) -> Tokenizer:
    """A tokenizer whose RQ-VAE is as it started: nothing here trains."""
    standard = Standard.of(vectors)
    model = RQVAE(TINY.rqvae(WIDTH), jax.random.key(0))
    codes_NL = np.asarray(model.codes(jnp.asarray(standard.apply(vectors)[1:])))
    table, metrics = suffixed(codes_NL, TINY.levels, 32)
    return Tokenizer(
        None, "rqvae", table, (*TINY.levels, 32), model.config, parameters_of(model), standard, standard.apply(vectors),
        dataclasses.asdict(TINY), metrics,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(vectors: ItemVectors, tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the tiny data set. Read only."""
    path = tmp_path_factory.mktemp("tokenizer") / "T"
    path.mkdir()
    fill(path, untrained(vectors), tiny_data)
    return path


def test_a_folder_is_the_tokenizer_again(folder: Path, vectors: ItemVectors, tiny_data: Dataset) -> None:
    ours, theirs = untrained(vectors), open_tokenizer(folder, tiny_data)
    assert theirs.path == folder and theirs.method == "rqvae" and theirs.rqvae == ours.rqvae
    assert theirs.version == ours.version and theirs.level_sizes == (4, 4, 4, 32)
    for name in ("codes_NL", "vectors_NI"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
    assert ours.parameters is not None
    again = parameters_of(theirs.rqvae_model())
    assert again.keys() == ours.parameters.keys() and "encoder.layers.0.weight" in again
    for name, array in ours.parameters.items():
        np.testing.assert_array_equal(again[name], array)
    np.testing.assert_array_equal(theirs.real_codes(vectors), ours.codes_NL[1:, :3])
    assert theirs.metrics == json.loads(json.dumps(ours.metrics)) and theirs.settings["seed"] == 0
    assert theirs.rqvae_model().config == ours.rqvae
    # Nothing but a description of what is there.
    assert open_tokenizer(folder, None).version == ours.version


def array(name: str, change: Callable[[np.ndarray], None], dtype: type = np.int32) -> Edit:
    def edit(folder: Path) -> None:
        found = np.load(folder / name, allow_pickle=False).astype(dtype)
        change(found)
        np.save(folder / name, found, allow_pickle=False)

    return edit


def described(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def put(place: tuple[int, int] | int, value: object) -> Callable[[np.ndarray], None]:
    return lambda found: found.__setitem__(place, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (array("codes.npy", put((7, 1), 4)), r"codes\.npy: .*item 7 has code 4 at level 1, whose alphabet is 0 … 3"),
        (array("codes.npy", put(9, -1)), "item 9 has no codes"),
        (array("codes.npy", lambda codes: put(3, codes[5])(codes)), "items 3 and 5 both have the codes"),
        (array("codes.npy", put(0, 1)), "with zeros in row 0"),
        (array("codes.npy", lambda codes: None, np.int64), "int64 of shape"),
        (
            lambda f: np.save(f / "codes.npy", np.load(f / "codes.npy", allow_pickle=False)[:-1]),
            "30 rows, but .* 30 it",
        ),
        (array("codes.npy", put((4, 3), 31)), r"codes of version \w{16}, tokenizer\.json says \w{16}"),
        (array("vectors.npy", put((4, 3), 0.5), np.float32), r"vectors\.npy: its sha256"),
        (lambda f: (f / "parameters.safetensors").write_bytes(b"x"), r"parameters\.safetensors: its sha256"),
        (lambda f: (f / "parameters.safetensors").unlink(), r"parameters\.safetensors: missing"),
        (lambda f: (f / "tokenizer.json").unlink(), r"--semantic_ids .*: no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no description of a tokenizer"),
        (described(format_version=9), "version 9"),
        (described(rqvae=None, method="guess"), "damaged, or of another version"),
        (described(items_sha256="0" * 64), "codes of other items .* keep the codes of items that both have"),
    ],
)
def test_a_damaged_folder_is_refused(
    folder: Path, tiny_data: Dataset, tmp_path: Path, edit: Edit, message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "T"))
    edit(copy)
    with pytest.raises(UserError, match=message):
        open_tokenizer(copy, tiny_data)


def test_codes_of_another_data_set_are_refused(folder: Path, tmp_path: Path) -> None:
    other = generate(num_users=6, num_items=12, shortest=3, longest=4).write(tmp_path / "other")
    with pytest.raises(UserError, match=r"codes of other items \(30 of generated-0\) than those of .*other"):
        open_tokenizer(folder, other)


def test_parameters_of_another_shape_are_refused(vectors: ItemVectors, tiny_data: Dataset, tmp_path: Path) -> None:
    ours = untrained(vectors)
    assert ours.rqvae is not None
    wrong = dataclasses.replace(ours, rqvae=dataclasses.replace(ours.rqvae, latent_dim=5))
    fill(tmp_path, wrong, tiny_data)
    with pytest.raises(UserError, match="is not of this model"):
        open_tokenizer(tmp_path, tiny_data)


def test_imported_codes_have_no_way_to_new_items(vectors: ItemVectors) -> None:
    table, metrics = suffixed(np.arange(6).reshape(3, 2) % 2, (2, 2), 4)
    imported = Tokenizer(None, "imported", table, (2, 2, 4), metrics=metrics)
    assert table[1:, 2].tolist() == [0, 1, 2] and metrics["largest_bucket"] == 3
    with pytest.raises(UserError, match="its codes were imported"):
        imported.real_codes(vectors)


def test_parameters_are_taken_by_name() -> None:
    """A model's parameters survive the way through names, whatever their order."""
    model = RQVAE(TINY.rqvae(WIDTH), jax.random.key(3))
    shuffled = dict(sorted(parameters_of(model).items(), reverse=True))
    x = jnp.asarray(some_vectors(5).vectors_NI[1:])
    empty = np.zeros((1, 4), np.int32)
    again = Tokenizer(None, "rqvae", empty, (4, 4, 4, 1), model.config, shuffled).rqvae_model()
    np.testing.assert_array_equal(again(x).loss_B, model(x).loss_B)
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
