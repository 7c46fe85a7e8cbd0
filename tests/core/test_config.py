"""Configurations: the table of sizes, Hugging Face's two styles, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

from core.config import LLAMA_SIZES, TINY, ConfigError, LlamaConfig, RopeScaling
from core.layers import Init
from core.llama import Compute
from core.llama_loader import abstract_model

PLAIN: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = [
    None,
    RopeScaling("linear", 2.0),
    RopeScaling("dynamic", 4.0),
    RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
]


def read(**fields: Any) -> LlamaConfig:
    return LlamaConfig.from_hf({**PLAIN, **fields})


# Sizes: the counts that Hugging Face shows, of checkpoints with a tied head counted once.


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("7b", 6_738_415_616),
        ("8b", 8_030_261_248),
        ("8b-3.1", 8_030_261_248),
        ("13b", 13_015_864_320),
        ("tinyllama-1.1b", 1_100_048_384),
        ("tiny", 164_160),
        ("small", 1_115_264),
    ],
)
def test_sizes_have_their_published_parameters(size: str, parameters: int) -> None:
    _, abstract = abstract_model(LLAMA_SIZES[size].config, Compute(), Init())
    assert sum(math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(abstract)) == parameters


def test_every_size_is_counted_above() -> None:
    marks = test_sizes_have_their_published_parameters.pytestmark  # type: ignore[attr-defined]
    assert {size for size, _ in marks[0].args[1]} == set(LLAMA_SIZES)


def test_sizes_differ_where_their_models_do() -> None:
    llama2, llama3, llama31 = (LLAMA_SIZES[size].config for size in ("7b", "8b", "8b-3.1"))
    assert (llama2.rope_theta, llama3.rope_theta) == (10_000.0, 500_000.0)
    assert (llama3.rope_scaling, llama31.rope_scaling) == (None, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    assert (llama3.max_position_embeddings, llama31.max_position_embeddings) == (8192, 131_072)
    assert LLAMA_SIZES["1b"].config.tie_word_embeddings and not llama31.tie_word_embeddings


# Reading and writing


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("size", LLAMA_SIZES)
def test_round_trip(size: str, scaling: RopeScaling | None) -> None:
    config = dataclasses.replace(LLAMA_SIZES[size].config, rope_scaling=scaling, attention_bias=True, mlp_bias=True)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf("bfloat16")))) == config


@pytest.mark.parametrize("scaling", SCALINGS)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(
    tmp_path: Path, scaling: RopeScaling | None
) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(
        TINY, rope_scaling=scaling, rope_theta=50_000.0, rms_norm_eps=1e-3, num_kv_heads=1, head_dim=48, mlp_bias=True
    )
    theirs = transformers.LlamaConfig(**config.to_hf("bfloat16"))
    assert theirs.rope_parameters["rope_theta"] == 50_000.0
    assert theirs.rope_parameters["rope_type"] == (scaling.kind if scaling else "default")
    assert (theirs.rms_norm_eps, theirs.head_dim, theirs.num_key_value_heads) == (1e-3, 48, 1)
    assert theirs.mlp_bias and theirs.tie_word_embeddings and str(theirs.dtype).endswith("bfloat16")
    theirs.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())  # the new style
    assert LlamaConfig.from_hf(tmp_path) == LlamaConfig.from_hf(tmp_path / "config.json") == config


def test_absent_fields_take_transformers_defaults() -> None:
    transformers = pytest.importorskip("transformers")
    ours = LlamaConfig.from_hf({"model_type": "llama"})
    assert ours == LlamaConfig.from_hf(transformers.LlamaConfig().to_dict())
    assert (ours.rms_norm_eps, ours.rope_theta, ours.head_dim, ours.num_kv_heads) == (1e-6, 10_000.0, 128, 32)


def test_both_styles_say_the_same() -> None:
    old = read(rope_theta=5e5, rope_scaling=LLAMA3, torch_dtype="bfloat16")
    new = read(rope_parameters={**LLAMA3, "rope_theta": 5e5}, dtype="bfloat16")
    assert old == new == read(rope_parameters=LLAMA3, rope_theta=5e5)
    assert old == read(
        rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_theta=500_000, rope_scaling=LLAMA3,
        dtype="bfloat16", torch_dtype="torch.bfloat16",
    )  # fmt: skip
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == RopeScaling("linear", 2.0)
    assert read(rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert read(rope_parameters={"rope_theta": 3e4}, rope_scaling=None) == read(rope_theta=3e4)


def test_real_checkpoints_load(caplog: pytest.LogCaptureFixture) -> None:
    """The fields of meta-llama/Llama-2-7b-hf, meta-llama/Llama-3.1-8B and TinyLlama, as published."""
    common = {
        **PLAIN, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
        "pretraining_tp": 1, "rms_norm_eps": 1e-5, "use_cache": True, "transformers_version": "4.31.0.dev0",
    }  # fmt: skip
    llama2 = {
        **common, "_name_or_path": "meta-llama/Llama-2-7b-hf", "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000,
    }  # fmt: skip
    llama31 = {
        **common, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
    }  # fmt: skip
    tinyllama = {
        **llama2, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "torch_dtype": "float32",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert LlamaConfig.from_hf(llama2) == LLAMA_SIZES["7b"].config
        assert LlamaConfig.from_hf(llama31) == LLAMA_SIZES["8b-3.1"].config
        assert LlamaConfig.from_hf(tinyllama) == LLAMA_SIZES["tinyllama-1.1b"].config
    assert not caplog.records


def test_a_field_nobody_knows_is_ignored_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(tool_of_the_day="yes") == read()
    assert "tool_of_the_day" in caplog.text


# Refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "10000.0", "500000.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": LLAMA3}, ["linear", "llama3"]),
        ({"rope_scaling": None, "rope_parameters": LLAMA3}, ["rope_scaling", "None", "llama3"]),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, ["'llama3'", "'linear'"]),
        # transformers would read theta 10,000 here, which nobody meant.
        ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, ["10000.0", "500000.0"]),
        ({"rope_theta": 1e4, "rope_scaling": {**LLAMA3, "rope_theta": 5e5}}, ["10000.0", "500000.0"]),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, ["4096", "8192"]),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, ["'float16'", "'bfloat16'"]),
    ],
)
def test_contradictions_are_refused_with_both_values(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn' is not supported"),
        ({"type": "longrope", "factor": 2.0}, "'longrope' is not supported"),
        ({"rope_type": 7}, "7 is not supported"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'"),
        ({"rope_type": "dynamic", "factor": True}, "factor is True"),
        ({"rope_type": "dynamic", "factor": 0.5}, "factor is 0.5"),
        ({"rope_type": "linear", "factor": math.inf}, "factor is inf"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "low_freq_factor is missing"),
        ({k: v for k, v in LLAMA3.items() if not k.startswith("orig")}, "original_max_position_embeddings is missing"),
        ({**LLAMA3, "original_max_position_embeddings": 8192.5}, "original_max_position_embeddings is 8192.5"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor 1.0 must exceed low_freq_factor 1.0"),
        ({**LLAMA3, "beta_fast": 32}, "takes no beta_fast"),
        ({"factor": 2.0}, "'default' takes no factor"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"full_attention": {"rope_type": "default"}}, "takes no full_attention"),
        ("linear", "'linear'; an object is expected"),
    ],
)
def test_bad_scalings_are_refused_by_name(style: str, block: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(**{style: block})
    assert words in str(error.value) and style in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("attention_dropout", 0.1),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", 3),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
        ("pruned_heads", {"0": [1]}),
        ("vocab_size", 0),
        ("num_hidden_layers", -2),
        ("hidden_size", 64.0),
        ("hidden_size", "64"),
        ("num_attention_heads", True),
        ("max_position_embeddings", None),
        ("num_key_value_heads", 0),
        ("head_dim", -8),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", 0),
        ("rope_theta", None),
        ("rope_theta", math.nan),
        ("tie_word_embeddings", 1),
        ("attention_bias", None),
    ],
)
def test_bad_values_are_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        read(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value)


def test_all_impossible_fields_are_in_one_error() -> None:
    with pytest.raises(ConfigError, match=r"hidden_act.*attention_dropout.*sliding_window"):
        read(hidden_act="relu", attention_dropout=0.5, sliding_window=8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"num_attention_heads": 33}, "hidden_size 4096 is not a multiple of num_attention_heads 33"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}, "head_dim 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PLAIN, **fields}))
    with pytest.raises(ConfigError) as error:
        LlamaConfig.from_hf(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_a_config_built_by_hand_is_checked_too() -> None:
    for change in ({"num_layers": 0}, {"rms_norm_eps": math.nan}, {"num_kv_heads": 3}, {"head_dim": 5}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000, b'{"dim": 4096, "n_layers": 32}'])
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: "):
        LlamaConfig.from_hf(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", str(tmp_path / "other.json")):
        with pytest.raises(ConfigError, match=r"no such file.*config\.json"):
            LlamaConfig.from_hf(path)
