"""`export`: every kind of run in every format that can hold it, by the programs that it is for."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from core.config import LlamaConfig
from core.llama_loader import LlamaLoader
from core.lora import is_adapter
from core.read_back import difference, logits
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.exporting import cli, tables
from efficientids.exporting.llama import open_llama
from efficientids.loading import load_run, open_run
from efficientids.train import main as train
from tests.core.test_hf_export import by_hugging_face
from tests.efficientids.conftest import Trained
from tests.efficientids.test_training_modes import LORA, QLORA
from tests.efficientids.tiny import FROZEN, LLAMA, NUM_ITEMS, SMALL_JOB, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

MODES: dict[str, tuple[str, ...]] = {"frozen": FROZEN, "lora": LORA, "qlora": QLORA, "full": ()}


def exported(run: Path, output: Path, format: str, *more: str) -> Path:
    assert cli.main(["--run", str(run), "--output", str(output), "--format", format, *more]) == 0
    return output


def ours(run: Path) -> np.ndarray:
    """The logits of a run's Llama in float32; a quantised base is read whole again."""
    _, llama = open_llama(run, None)
    return logits(llama.params(), llama.config, llama.added)


def in_training(run: Path) -> np.ndarray:
    """Those of the run as it trained, on an nf4 base."""
    loaded = open_run(run)
    params = nnx.State({"llama": loaded.params["llama"]})["llama"]
    added = open_llama(run, None)[1].added
    return logits(nnx.filter_state(params, nnx.Not(is_adapter)), LLAMA, added, "nf4")


def theirs(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """The same of Hugging Face's, perhaps with PEFT's adapter."""
    return by_hugging_face(folder, LLAMA, adapter)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return difference(a, b) <= 1e-4


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[pytest.mark.slow] * (mode == "qlora")) for mode in MODES])
def test_hugging_face_loads_the_merged_llama(
    trained: Trained, weights: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(*MODES[mode])
    capsys.readouterr()
    folder = exported(run, tmp_path / "out", "hf", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "hf" and facts["step"] == open_run(run).step
    assert facts["read_back"]["error"] <= facts["read_back"]["tolerance"] == 1e-4
    found = theirs(folder)
    assert close(found, ours(run))
    quantizing = facts["read_back"]["quantizing"]
    assert facts["quantize"] == "none" and facts["trained_with_quantize"] == ("nf4" if mode == "qlora" else "none")
    if mode == "qlora":
        assert quantizing == pytest.approx(difference(found, in_training(run)), rel=1e-2) and quantizing > 1e-3
        assert f"{quantizing:.1e} of the largest apart from those in training" in (folder / "README.md").read_text()
    else:
        assert quantizing is None
    # The pretrained one, where nothing of the Llama trained; another one elsewhere.
    assert close(found, theirs(weights)) == (mode == "frozen")
    assert LlamaConfig.from_hf(folder) == LLAMA
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "export.json", "model.safetensors", "recommender.safetensors",
    }  # fmt: skip
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_peft_loads_the_adapter(trained: Trained, weights: Path, tmp_path: Path, mode: str) -> None:
    run = trained(*MODES[mode])
    folder = exported(run, tmp_path / "out", "peft")
    found = theirs(weights, folder)
    assert close(found, ours(run)) and not close(found, theirs(weights))
    quantizing = json.loads((folder / "export.json").read_text())["read_back"]["quantizing"]
    assert (quantizing is None) == (mode == "lora") and (quantizing is None or quantizing > 1e-3)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert settings["base_model_name_or_path"] == str(weights) and settings["lora_dropout"] == 0.1
    assert "vLLM" in (folder / "README.md").read_text() and (folder / "recommender.safetensors").is_file()


def test_what_no_llama_holds_is_beside_it(trained: Trained, tmp_path: Path) -> None:
    run = trained(*LORA)
    folder = exported(run, tmp_path / "out", "hf")
    _, params, _ = load_run(run)
    expected = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(params) if path[0] != "llama"}
    found = load_file(folder / "recommender.safetensors")
    assert found.keys() == expected.keys() and "items.table_NE" in found
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    text = (folder / "README.md").read_text()
    described = open_run(run).description["dataset"]
    assert f"{NUM_ITEMS + 1}, 16]" in text and described["fingerprint"] in text
    assert "| `items.table_NE` |" in text and "One vector for each of the ids 0 … N" in text
    # The Llama of the folder and the tensors beside it are the whole recommender again.
    loaded = open_run(run)
    _, llama, _ = LlamaLoader(path=folder).load_model()
    plain = open_run(trained(*FROZEN))
    names = {path: ".".join(map(str, path)) for path, _ in nnx.to_flat_state(plain.params)}
    again = {
        path: leaf if path[0] == "llama" else leaf.replace(jnp.asarray(found[names[path]]))
        for path, leaf in nnx.to_flat_state(plain.params)
    }
    again.update({("llama", *path): leaf for path, leaf in nnx.to_flat_state(llama)})
    model = nnx.merge(plain.graphdef, nnx.from_flat_state([*again.items()]))
    one = tables.probe(plain.recommender, model)
    other = tables.probe(loaded.recommender, loaded.model)
    np.testing.assert_array_equal(one.item_ids, other.item_ids)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


@pytest.mark.parametrize("mode", ["frozen", "qlora"])
def test_all_parameters_by_our_own_names(trained: Trained, tmp_path: Path, mode: str) -> None:
    run = trained(*MODES[mode])
    folder = exported(run, tmp_path / "out", "safetensors", "--max_shard_size", "2KB")
    shards = sorted(folder.glob("parameters-*.safetensors"))
    assert len(shards) > 2 and (folder / "parameters.safetensors.index.json").is_file()
    found = {name: array for shard in shards for name, array in load_file(shard).items()}
    expected = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(open_run(run).params)}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert ("llama.layers.mlp.gate.weight.codes" in found) == (mode == "qlora")
    text = (folder / "README.md").read_text()
    assert ("adds 2 · A B" in text, "`scales` are nf4" in text) == ((mode == "qlora"),) * 2


@pytest.mark.parametrize("recommender", ["sasrec", "item_knn", "popularity"])
def test_recommenders_without_a_llama(tiny_data: Dataset, tmp_path: Path, recommender: str) -> None:
    job = {"num_steps": 1, "batch_size": 8, "seq_len": 8, "width": 8} if recommender == "sasrec" else {}
    run = tmp_path / "run"
    assert train(flags(recommender=recommender, data_dir=tiny_data.path, checkpoint_dir=run, **job)) == 0
    folder = exported(run, tmp_path / "out", "safetensors")
    assert load_file(folder / "parameters.safetensors") and "items.parquet" in (folder / "README.md").read_text()
    for format in ("hf", "peft"):
        with pytest.raises(UserError, match=f"--recommender {recommender}: no Llama is inside"):
            exported(run, tmp_path / "none", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_and_shards(
    trained: Trained, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(*LORA)
    folder = exported(run, tmp_path / "out", "hf", "--dtype", dtype, "--max_shard_size", "1KB")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    check = json.loads((folder / "export.json").read_text())["read_back"]
    rounding = difference(theirs(folder), ours(run))
    assert check["error"] <= 1e-4 < rounding and check["rounding"] == pytest.approx(rounding, rel=0.05)
    lost = "warning: rounding the weights moves the run's logits by" in capsys.readouterr().err
    assert lost == (check["rounding"] > check["adapters"] / 2)
    assert "rounding the weights moves" in (folder / "README.md").read_text()


def test_the_default_dtype_is_the_files(trained: Trained, tmp_path: Path) -> None:
    """Of float32 files; what trained is float32, too."""
    for mode in ("lora", "full"):
        folder = exported(trained(*MODES[mode]), tmp_path / mode, "hf")
        assert {str(array.dtype) for array in load_file(folder / "model.safetensors").values()} == {"float32"}


def test_one_checkpoint_of_several(trained: Trained, tmp_path: Path) -> None:
    run = trained()
    folders = [exported(run, tmp_path / str(step), "hf", f"--step={step}") for step in (2, 4)]
    assert json.loads((folders[0] / "export.json").read_text())["step"] == 2
    two, four = (load_file(folder / "model.safetensors")["model.norm.weight"] for folder in folders)
    assert np.abs(two - four).max() > 0


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("full", r"all of its Llama trained \(--train full\): embeddings, norms and whole matrices"),
        ("frozen", r"nothing of its Llama trained \(--train frozen\): there is no adapter"),
    ],
)
def test_an_adapter_alone_is_refused_with_the_reason(trained: Trained, tmp_path: Path, mode: str, why: str) -> None:
    with pytest.raises(UserError, match=why + ".*; export the whole Llama with --format hf"):
        exported(trained(*MODES[mode]), tmp_path / "out", "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_adapters_of_a_base_that_is_no_file(tiny_data: Dataset, tmp_path: Path) -> None:
    job = {**SMALL_JOB, "num_steps": 1}
    given = flags(data_dir=tiny_data.path, **job)
    assert train([*given, *QLORA, f"--checkpoint_dir={tmp_path / 'run'}"]) == 0
    with pytest.raises(UserError, match="a base that no weight file holds: it started at random"):
        exported(tmp_path / "run", tmp_path / "out", "peft")
    with pytest.raises(UserError, match="weights are held quantised, and no file with the whole ones is known"):
        exported(tmp_path / "run", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
