"""ETEGRec's flags: what is chosen where none is given, what earlier runs and semantic IDs decide, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.code_tables import build
from core.llama_loader import LlamaLoader
from core.rqvae import RQVAE, RQVAEConfig
from core.semantic_ids import version_name
from core.suffixes import with_suffix
from efficientids import systems
from efficientids.config import from_mapping, parse, to_mapping
from efficientids.data.dataset import Dataset
from efficientids.data.generated import generate
from efficientids.errors import UserError
from efficientids.loading import LoadedRun, adopt, open_run
from efficientids.options import RunOptions, TrainConfig
from efficientids.planning.cli import main as plan
from efficientids.recommenders.etegrec import ETEGRec
from efficientids.runs import RunFolder
from efficientids.systems.base import Scale, abstract, describe, refuse_unread
from efficientids.systems.semantic_ids import contents
from efficientids.tokenizing.tokenizer import Tokenizer, fill, parameters_of, with_padding
from efficientids.tokenizing.vectors import Standard
from efficientids.train import _steps, main
from tests.conftest import ROOT
from tests.efficientids.etegrec_parts import made
from tests.efficientids.test_main_job import tokenizer
from tests.efficientids.tiny import NUM_ITEMS, events, flags

pytestmark = pytest.mark.usefixtures("quick_compile")

NAMES = typing.get_args(typing.get_type_hints(RunOptions)["recommender"])


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """What a run without --data_dir trains on, with fewer users."""
    return generate(num_users=100).write(tmp_path_factory.mktemp("generated") / "data")


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_command_of_every_system_can_be_planned(name: typing.Any, catalogue: Dataset) -> None:
    """Its model and phases, on its default data; whole runs of the others are in `test_demo` and `test_systems`."""
    system, scale = systems.get(name), Scale.of(catalogue)
    config = system.resolve(TrainConfig(recommender=name), scale)
    planned = system.planned(config, scale)
    assert jax.tree.leaves(nnx.state(nnx.eval_shape(planned.init, jax.random.key(0))))
    assert bool(planned.plan()) == (config.num_steps is not None)


def test_default_levels_fit_the_catalogue(catalogue: Dataset) -> None:
    system = systems.get("etegrec")

    def levels(num_items: int) -> str | None:
        return system.resolve(TrainConfig(recommender="etegrec"), Scale(num_items=num_items)).levels

    assert [levels(count) for count in (10**6, 1024, 1023, 250, 9)] == [f"{n},{n},{n}" for n in (256, 256, 128, 32, 2)]
    assert catalogue.catalogue_size == 250 and levels(250) == "32,32,32"  # more codes than items: refused


def zeros(tree: Any) -> Any:
    """Arrays in place of shapes, without a compilation."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), tree)


def folder(path: Path, data: Dataset, method: typing.Any, seed: int = 0) -> Path:
    """A tokenizer that nothing trained, as `tokenize` writes one; of item vectors of width 10."""
    rng, imported = np.random.default_rng(seed), method == "imported"
    codes_NL = with_padding(with_suffix(rng.integers(0, 6, (NUM_ITEMS, 2)), 32))
    shape = RQVAEConfig(10, (6, 6), (12,), 8)
    parameters = parameters_of(zeros(nnx.eval_shape(lambda: RQVAE(shape, jax.random.key(0)))))
    standard = Standard(np.zeros(10, np.float32), np.ones(10, np.float32), (10,))
    vectors_NI = np.concatenate([np.zeros((1, 10)), rng.normal(size=(NUM_ITEMS, 10))]).astype(np.float32)
    rest = () if imported else (shape, parameters, standard, vectors_NI)
    path.mkdir()
    fill(path, Tokenizer(None, method, codes_NL, (6, 6, 32), *rest), data)
    return path


def asked(**more: Any) -> TrainConfig:
    """What a job with 8 columns a code asks for."""
    given = {"code_dim": 8, "max_seq_len": 6, "batch_size": 8, "epochs": 2.0}
    return TrainConfig(recommender="etegrec", **{**given, **more})


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tiny_data: Dataset, quick_compile: None) -> LoadedRun:
    """A run on --semantic_ids whose codes have moved since, as its turns move them."""
    path = tmp_path_factory.mktemp("earlier")
    system = systems.get("etegrec")
    config = system.resolve(asked(semantic_ids=folder(path / "ids", tiny_data, "rqvae")), Scale.of(tiny_data))
    recommender = system.recommender(config, tiny_data, None)
    graphdef, state = abstract(recommender)
    model: Any = nnx.merge(graphdef, zeros(state))
    codes_NL = with_suffix(np.random.default_rng(9).integers(0, 6, (NUM_ITEMS, 2)), 32)
    nnx.update(model.ids, nnx.state(build(codes_NL, (6, 6, 32), recommender.spec.table)))
    run, described = RunFolder(path / "run"), describe(recommender, config, tiny_data, None, path / "run")
    run.path.mkdir()
    run.write(to_mapping(config), described)
    return LoadedRun(run, 1, config, recommender, *nnx.split(model), described)


def test_an_earlier_runs_codes_and_tokenizer_are_taken_over(
    earlier: LoadedRun, tiny_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its vectors are of another width, its tokenizer of other layers than the defaults; its codes are no file's."""
    system, scale = systems.get("etegrec"), Scale.of(tiny_data)
    config = system.resolve(asked(load_checkpoint=f"{earlier.where}/1"), scale)
    capsys.readouterr()
    recommender = system.recommender(config, tiny_data, earlier)
    assert re.fullmatch(r"tokenizer: codes of version \w{16}: the checkpoint's\n", capsys.readouterr().out)
    model: Any = adopt(earlier, recommender, system, 0)
    before: Any = earlier.model
    assert version_name(model.ids.version[...]) == version_name(before.ids.version[...])
    assert model.tokenizer.config.input_dim == 10 and config.levels is None
    # Its config.yaml still names what it began with; what lies elsewhere is something else.
    given = asked(load_checkpoint=str(earlier.where), semantic_ids=earlier.config.semantic_ids)
    adopt(earlier, system.recommender(system.resolve(given, scale), tiny_data, earlier), system, 0)
    other = dataclasses.replace(given, semantic_ids=folder(tmp_path / "other", tiny_data, "rqvae"))
    with pytest.raises(UserError, match=r"leave --semantic_ids out: the checkpoint holds its own"):
        system.recommender(system.resolve(other, scale), tiny_data, earlier)
    wide = system.resolve(asked(load_checkpoint=str(earlier.where), code_dim=16), scale)
    with pytest.raises(UserError, match=r"(?s)model.code_dim: 8 ≠ 16.*which stand in .*run.config.yaml"):
        adopt(earlier, system.recommender(wide, tiny_data, earlier), system, 0)


def test_a_run_without_codes_has_none_to_take_over(earlier: LoadedRun, tiny_data: Dataset, tmp_path: Path) -> None:
    for described, message in (
        ({**earlier.description, "recommender": "sasrec"}, "is a checkpoint of --recommender sasrec; give that"),
        ({**earlier.description, "spec": {}}, r"model.json: damaged, or written by another version"),
    ):
        RunFolder(tmp_path).write({}, described)
        with pytest.raises(UserError, match=message):
            systems.get("etegrec").resolve(asked(load_checkpoint=str(tmp_path)), Scale.of(tiny_data))


@pytest.mark.parametrize(
    ("flag", "value"), [("levels", "7,7"), ("suffix_size", 8), ("residual_grad", "passthrough"), ("pretrain_epochs", 3)]
)
def test_flags_that_make_codes_are_refused_where_there_are_some(
    flag: str, value: Any, earlier: LoadedRun, tiny_data: Dataset
) -> None:
    system, scale, given = systems.get("etegrec"), Scale.of(tiny_data), {flag: value}
    with pytest.raises(UserError, match=f"--{flag} {value} would do nothing: --semantic_ids .* tokenize again"):
        system.resolve(asked(semantic_ids=earlier.config.semantic_ids, **given), scale)
    with pytest.raises(UserError, match=f"--{flag} {value} would do nothing: the codes are those of .*run; leave"):
        system.resolve(asked(load_checkpoint=str(earlier.where), **given), scale)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("kl_loss", 0.1),
        ("dec_cl_loss", 0.1),
        ("sia_sign", "released"),
        ("aligned_from", 1.0),
        ("tokenizer_epochs", 2.0),
        ("recommender_epochs", 2.0),
        ("tokenizer_learning_rate", 0.1),
    ],
)
def test_flags_of_an_rqvae_are_refused_without_one(
    flag: str, value: Any, imported: Path, earlier: LoadedRun, tiny_data: Dataset
) -> None:
    system, scale, given = systems.get("etegrec"), Scale.of(tiny_data), {flag: value}
    with pytest.raises(UserError, match=f"--{flag} {value} would do nothing: .* without an RQ-VAE.*--method rqvae"):
        system.resolve(asked(semantic_ids=imported, **given), scale)
    assert getattr(system.resolve(asked(semantic_ids=earlier.config.semantic_ids, **given), scale), flag) == value


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, tiny_data: Dataset) -> Path:
    """Codes that came without a tokenizer."""
    return folder(tmp_path_factory.mktemp("imported") / "ids", tiny_data, "imported")


def test_a_configuration_with_semantic_ids_is_read_again(
    earlier: LoadedRun, imported: Path, tiny_data: Dataset, tmp_path: Path
) -> None:
    system, scale = systems.get("etegrec"), Scale.of(tiny_data)
    for config in (earlier.config, system.resolve(asked(semantic_ids=imported), scale)):
        again = from_mapping(to_mapping(config), tmp_path)
        refuse_unread(again)
        assert system.resolve(again, scale) == config


def test_an_earlier_runs_flags_may_be_given_again(tiny_data: Dataset, tmp_path: Path) -> None:
    system, scale = systems.get("etegrec"), Scale.of(tiny_data)
    first = system.resolve(asked(levels="6,6", suffix_size=32, pretrain_epochs=3), scale)
    run = RunFolder(tmp_path)
    run.write(to_mapping(first), describe(system.planned(first, scale), first, tiny_data, None, tmp_path))
    second = dataclasses.replace(first, load_checkpoint=str(tmp_path))
    assert system.resolve(second, scale) == second
    with pytest.raises(UserError, match="--pretrain_epochs 4 would do nothing"):
        system.resolve(dataclasses.replace(second, pretrain_epochs=4), scale)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json of a few words."""
    place = tmp_path_factory.mktemp("words")
    tokenizer(place, ["The user has bought: Next, the buys:"])
    return place / "tokenizer.json"


@pytest.mark.parametrize("name", ["etegrec_llama2_7b_5090", "etegrec_llama2_7b_text_5090"])
def test_the_configurations_of_a_7b_plan_without_its_weights(
    name: str, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = flags(tokenizer=words) if "text" in name else []
    given = flags(config=ROOT / "configs" / f"{name}.yaml", plan_by="estimate")
    assert plan([*given, *text, "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and 6.7e9 < found["estimate"]["parameters"] < 7e9


def test_a_prompt_of_a_published_size_needs_its_tokenizer_alone(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(self: Any) -> Path:
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr(LlamaLoader, "folder", folder)
    monkeypatch.setattr(LlamaLoader, "tokenizer_folder", lambda self: words.parent)
    config = asked(llama_size="7b", prompt="The user has bought: {history}")
    assert systems.get("etegrec").resolve(config, Scale()).tokenizer is None


def test_a_tokenizer_goes_with_a_prompt(words: Path, tmp_path: Path) -> None:
    given = flags(recommender="etegrec", tokenizer=words)
    config = parse([*given, "--prompt=The user has bought: {history} Next"])
    resolved = systems.get("etegrec").resolve(config, Scale())
    assert resolved.seq_len == 1 + 5 + 21 * 4 + 1  # the start, five words, codes with the target's, a word
    with pytest.raises(UserError, match=r"--tokenizer .* would do nothing: it reads a --prompt"):
        systems.get("etegrec").resolve(parse(given), Scale())
    with pytest.raises(UserError, match="--tokenizer has no meaning with --recommender sasrec"):
        refuse_unread(parse(flags(recommender="sasrec", tokenizer=words)))


def test_codes_that_do_not_fit_are_blamed_on_what_gave_them(
    earlier: LoadedRun, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise ValueError("no room")

    system = systems.get("etegrec")
    monkeypatch.setattr("efficientids.systems.etegrec.start", lambda *_: earlier.model)
    monkeypatch.setattr(ETEGRec, "filled", refuses)
    for config, message in (
        (earlier.config, r"^--semantic_ids .*ids: no room"),
        (dataclasses.replace(earlier.config, semantic_ids=None), "^the pretrained tokenizer: no room"),
    ):
        with pytest.raises(UserError, match=message):
            system.start(earlier.recommender, config)


def test_all_steps_are_announced_and_which_codes(
    imported: Path, earlier: LoadedRun, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer's turns and fine-tuning, too; 60 users in steps of 8 are 8 steps an epoch."""
    system, scale = systems.get("etegrec"), Scale.of(tiny_data)
    given = asked(epochs=None, num_steps=20, length_buckets=1, finetune_epochs=0.5)
    config = system.resolve(given, scale)
    assert _steps(system.planned(config, scale).plan(), given, config) == (
        "36 steps (tokenizer 2 × 8, recommender 2 × 8, finetune 4); --num_steps 20 are 16 in whole turns; each"
    )
    plain = TrainConfig(num_steps=5)
    resolved = systems.get("efficientids").resolve(plain, scale)
    assert _steps(systems.get("efficientids").planned(resolved, scale).plan(), plain, resolved) == "5 steps"
    for ids, words in ((earlier.config.semantic_ids, r"rqvae of item vectors with 10 columns"), (imported, "imported")):
        contents(system.resolve(asked(semantic_ids=ids), scale), tiny_data)
        assert re.search(rf"codes of version \w{{16}}: --semantic_ids .*, {words}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"levels": "6,x"}, "--levels 6,x: give numbers"),
        ({"prompt": "Next:"}, "--prompt 'Next:': say once where the history stands"),
        ({"prompt": "Bought: {history} Next:"}, "--prompt needs a tokenizer"),
        ({"semantic_ids": Path("nowhere")}, "--semantic_ids nowhere: no tokenizer"),
        ({"max_seq_len": 100_000}, "max_position_embeddings"),
    ],
)
def test_flags_that_cannot_be(tiny_data: Dataset, line: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tiny_data, **line)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["etegrec_llama2_7b_5090.yaml", "etegrec_llama2_7b_text_5090.yaml"])
def test_the_configurations_of_a_7b_train_at_tiny_size(
    file: str, tiny_data: Dataset, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A turn of each, then fine-tuning from the best, with LoRA on the pretrained stories260K in the 7B's place, which
    no checkpoint holds; text goes through its own tokenizer."""
    config = ROOT / "configs" / file
    small = {"levels": "6,6", "suffix_size": 32, "code_dim": 8, "pretrain_epochs": 1, "finetune_epochs": 0.05}
    given = flags(
        config=config, llama_size="tiny", weights=real_data / "stories260K" / "hf", data_dir=tiny_data.path,
        checkpoint_dir=tmp_path / "run", num_steps=2, max_seq_len=6, precision="float32", tokenizer_epochs=0.05,
        recommender_epochs=0.05, eval_every=1, log_every=1, **small,
    )  # fmt: skip
    assert main(given) == 0
    phases = [row["phase"] for row in events(tmp_path / "run", "step")]
    assert list(dict.fromkeys(phases)) == ["tokenizer", "recommender", "finetune"]
    assert len(events(tmp_path / "run", "reindexed")) == phases.count("tokenizer") > 0
    loaded = open_run(tmp_path / "run")
    spec, model = loaded.recommender.spec, loaded.model
    assert spec.model.lora is not None and spec.model.lora.rank == 64 and loaded.description["frozen_weights"]
    assert (spec.model.template is not None) == ("text" in file)
    if spec.model.template is not None:
        ids, lengths = jnp.array([[3, 5, 0]]), jnp.array([2])
        sequence = model.sequence(ids, lengths, with_target=False)
        template = spec.model.template
        whole = [*template.prefix, *np.asarray(model.ids.codes_of(ids))[0, :2].ravel(), *template.suffix]
        assert sequence.text is not None
        np.testing.assert_array_equal((sequence.codes + sequence.text)[0, : len(whole)], whole)
        assert int(sequence.state[0]) == len(whole) - 1  # the separator behind the history
        assert template.prefix[0] == 1 and len(template.suffix) > 3
