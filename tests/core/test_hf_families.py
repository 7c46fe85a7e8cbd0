"""Configurations of Mistral, Qwen2, Qwen3: published ones, defaults, windows, refusals. Baichuan2: test_baichuan.py."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from core.config import LLAMA_SIZES, TINY, ConfigError, LlamaConfig
from core.hf_families import FAMILIES, family_of

# The published fields, but for token ids and versions, which are read by nobody here.
COMMON = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
}  # fmt: skip
MISTRAL = {  # mistralai/Mistral-7B-v0.1
    **COMMON, "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {  # Qwen/Qwen2.5-0.5B
    **COMMON, "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {  # Qwen/Qwen3-0.6B
    **COMMON, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


def test_published_configurations(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mistral, qwen2, qwen3 = map(LlamaConfig.from_hf, (MISTRAL, QWEN2, QWEN3))
    assert not caplog.records
    assert (mistral.sliding_window, mistral.num_kv_heads, mistral.head_dim) == (4096, 8, 128)
    assert (qwen2.attention_bias, qwen2.attention_bias_on_o, qwen2.head_dim) == (True, False, 64)
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.hidden_size, qwen3.attention_bias) == (True, 128, 1024, False)
    assert (qwen2.sliding_window, qwen3.sliding_window) == (None, None)
    assert (qwen2.rope_theta, qwen3.rope_theta, qwen3.rms_norm_eps) == (1e6, 1e6, 1e-6)
    assert [family_of(config) for config in (mistral, qwen2, qwen3)] == ["mistral", "qwen2", "qwen3"]


def test_a_mistral_without_a_window_is_a_llama() -> None:
    config = LlamaConfig.from_hf({**MISTRAL, "sliding_window": None})
    assert family_of(config) == "llama" and config.to_hf()["model_type"] == "llama"
    assert config == dataclasses.replace(LlamaConfig.from_hf(MISTRAL), sliding_window=None)


@pytest.mark.parametrize("published", [MISTRAL, QWEN2, QWEN3], ids=lambda raw: raw["model_type"])
def test_round_trip_through_us_and_through_transformers(tmp_path: Path, published: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig.from_hf(published)
    written = config.to_hf("bfloat16")
    assert (written["model_type"], written["architectures"]) == (published["model_type"], published["architectures"])
    assert LlamaConfig.from_hf(json.loads(json.dumps(written))) == config
    for name, content in (("as published", published), ("as written", written)):
        transformers.AutoConfig.for_model(**content).save_pretrained(tmp_path / name)
        assert LlamaConfig.from_hf(tmp_path / name) == config, name


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_absent_fields_take_transformers_defaults(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert LlamaConfig.from_hf({"model_type": family}) == LlamaConfig.from_hf(
        transformers.AutoConfig.for_model(family).to_dict()
    )


@pytest.mark.parametrize("size", LLAMA_SIZES)
def test_published_llamas_are_llamas(size: str) -> None:
    assert family_of(LLAMA_SIZES[size].config) == "llama"


# Windows


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": True, "max_window_layers": 24}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 32768),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, None),
        ({"use_sliding_window": True, "layer_types": [FULL] * 24}, None),
        ({"use_sliding_window": True, "layer_types": [SLIDING] * 24}, 32768),
        ({"layer_types": [FULL] * 24}, None),
        ({"max_window_layers": 3}, None),
    ],
)
def test_windows_of_a_qwen(fields: dict[str, Any], window: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig.from_hf({**QWEN2, **fields})
    assert config.sliding_window == window
    for raw in ({**QWEN2, **fields}, config.to_hf()):
        theirs = transformers.AutoConfig.for_model(**raw)
        assert set(theirs.layer_types) == ({FULL} if window is None else {SLIDING}) and len(theirs.layer_types) == 24
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 20}, ["sliding_window 32768", "4 of 24 sliding"]),
        ({**QWEN3, "layer_types": [FULL, SLIDING] * 14}, ["sliding_window None", "14 of 28 sliding"]),
        ({**QWEN3, "layer_types": [SLIDING] * 28}, ["sliding_window None", "28 of 28 sliding"]),
        ({**QWEN3, "layer_types": [FULL] * 27}, ["0 of 27 sliding, for 28 layers"]),
        ({**QWEN3, "layer_types": "full"}, ["'full'"]),
        ({**MISTRAL, "layer_types": [FULL] * 32}, ["sliding_window 4096", "0 of 32 sliding"]),
        ({**MISTRAL, "sliding_window": 0}, ["sliding_window is 0"]),
        ({**MISTRAL, "sliding_window": "4096"}, ["sliding_window is '4096'"]),
        ({**QWEN2, "use_sliding_window": None}, ["use_sliding_window is None"]),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": "all"}, ["max_window_layers is 'all'"]),
    ],
)
def test_windows_that_cannot_be_run(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        LlamaConfig.from_hf(raw)
    assert all(word in str(error.value) for word in words), str(error.value)


# Refusals


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({**QWEN2, "attention_bias": False}, ["attention_bias False (only None or True)", "Qwen2ForCausalLM"]),
        ({**QWEN2, "mlp_bias": True}, ["mlp_bias True"]),
        ({**QWEN2, "use_mrope": True}, ["use_mrope True"]),
        ({**QWEN2, "architectures": ["Qwen2ForSequenceClassification"]}, ["Qwen2ForSequenceClassification"]),
        ({**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0}}, ["'yarn' is not supported"]),
        ({**QWEN3, "num_experts": 128}, ["num_experts 128"]),
        ({**QWEN3, "auto_map": {"AutoModel": "mine.Mine"}}, ["auto_map"]),
        ({**MISTRAL, "attention_bias": True}, ["attention_bias True (only None or False)"]),
        ({**MISTRAL, "model_type": "ministral"}, ["'ministral'", "'mistral'", "'qwen3'", "'baichuan'"]),
        ({**MISTRAL, "model_type": ["mistral"]}, ["model_type ['mistral']"]),
        ({**MISTRAL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["sliding_window 4096"]),
    ],
)
def test_other_arithmetic_is_refused(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        LlamaConfig.from_hf(raw)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_configuration_of_no_family_is_not_written() -> None:
    config = dataclasses.replace(TINY, qk_norm=True, mlp_bias=True)
    with pytest.raises(ConfigError) as error:
        config.to_hf()
    for name in FAMILIES:
        assert f"{name}: " in str(error.value)
    assert "qwen3: mlp_bias must be False, not True" in str(error.value)


def test_fields_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="attention_bias_on_o"):
        dataclasses.replace(TINY, attention_bias_on_o=False)
    with pytest.raises(ConfigError, match="sliding_window is 0"):
        dataclasses.replace(TINY, sliding_window=0)


def test_a_run_written_before_these_fields_is_read() -> None:
    """`model.json` of such a run holds the fields of a plain Llama alone."""
    new = ("attention_bias_on_o", "qk_norm", "sliding_window", "normalised_head")
    old = {name: value for name, value in dataclasses.asdict(TINY).items() if name not in new}
    assert LlamaConfig(**old) == TINY
