"""The Llama's configuration, what Hugging Face calls it, and the table of sizes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from core.hf_config import read_llama_fields
from core.hf_families import BIAS_FLAGS, FAMILIES, ConfigError, Window, family_of


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies differ from the plain ones; parameters by Hugging Face's names.

    `factor` serves linear, dynamic and llama3; the other three serve llama3 alone and are None elsewhere.
    """

    kind: Literal["linear", "dynamic", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama and the constants of its arithmetic.

    No defaults for `head_dim`, `rms_norm_eps`, `rope_theta`, `rope_scaling`: a wrong default there is a silent bug.
    What has a default is absent from a plain Llama.

    Attributes:
        attention_bias: of q, k, v, and of o where `attention_bias_on_o` (false in Qwen2; true where no bias is).
        qk_norm: an RMSNorm over each head of q and k, before they are rotated (Qwen3).
        sliding_window: positions that a position attends to, itself among them (Mistral). Up to that length this is
            full attention, which is what is computed; longer sequences are refused. None: no limit.
        normalised_head: the LM head's rows have length 1 when they meet hidden states (Baichuan2's NormHead).

    Raises:
        ConfigError: sizes that are not positive or do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_bias_on_o: bool = True
    qk_norm: bool = False
    sliding_window: int | None = None
    normalised_head: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{field.name} is {value!r}; a positive number is expected")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of coordinates")
        if not (self.attention_bias or self.attention_bias_on_o):
            raise ConfigError("attention_bias_on_o False excepts o from the biases, but attention_bias is False too")
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic" and self.head_dim == 2:
            raise ConfigError("head_dim 2 with rope_scaling 'dynamic': its exponent H / (H - 2) is infinite")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> LlamaConfig:
        """Reads a Hugging Face configuration of transformers 4 or 5: a Llama's, or another of `core.hf_families`.

        Args:
            source: the content of a `config.json`, its path, or the path of the folder that holds it.

        Raises:
            ConfigError: what `core.hf_config.read_llama_fields` refuses, and sizes that do not fit each other.
        """
        fields = read_llama_fields(source)
        scaling = fields.pop("rope_scaling")
        try:
            config = cls(**fields, rope_scaling=None if scaling is None else RopeScaling(**scaling))
            family_of(config)
        except ConfigError as error:
            raise ConfigError(f"{'config' if isinstance(source, Mapping) else source}: {error}") from error
        return config

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """The inverse of `dataclasses.asdict`. Raises KeyError or TypeError: fields are missing or unknown."""
        scaling = values["rope_scaling"]
        return cls(**{**values, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})

    def to_hf(self, torch_dtype: str = "float32") -> dict[str, Any]:
        """The content of a `config.json` in the old style, which transformers 4 and 5 read.

        The model_type is the first that computes this: a Mistral without a window is written as a Llama. Token ids
        (bos, eos, pad) and the code of a Baichuan (`auto_map`) are no part of a `LlamaConfig`: who exports a checkpoint
        takes them from its source.

        Args:
            torch_dtype: of the weights beside the file, such as "bfloat16".

        Raises:
            ConfigError: no architecture of Hugging Face's computes this.
        """
        name = family_of(self)
        family = FAMILIES[name]
        return {
            "architectures": [family.architecture],
            "model_type": name,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            **{flag: getattr(self, flag) for flag in BIAS_FLAGS if flag not in family.fixed},
            **({"model_max_length": self.max_position_embeddings} if family.plain_heads else self._hf_heads()),
            **self._hf_window(family.window),
            "torch_dtype": torch_dtype,
        }

    def _hf_heads(self) -> dict[str, Any]:
        scaling = None
        if self.rope_scaling is not None:
            given = {name: value for name, value in dataclasses.asdict(self.rope_scaling).items() if value is not None}
            scaling = {"rope_type": given.pop("kind"), **given}
        return {
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "attention_dropout": 0.0,
        }

    def _hf_window(self, window: Window) -> dict[str, Any]:
        if window == "none":
            return {}
        by_layer = {} if window == "always" else {
            "use_sliding_window": self.sliding_window is not None,
            "max_window_layers": 0 if self.sliding_window else self.num_layers,
        }  # fmt: skip
        return {"sliding_window": self.sliding_window, **by_layer}


TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=True,
)

SMALL = dataclasses.replace(TINY, hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=4)
"""Of about the size of the Transformers in papers on semantic IDs; it, too, starts at random."""


@dataclasses.dataclass(frozen=True)
class LlamaSize:
    """A Llama by name: its shape, and where its weights are published (None: nowhere, it starts at random)."""

    config: LlamaConfig
    hf_id: str | None


def _llama2(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
    )


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, factor: float | None, tied: bool) -> LlamaConfig:
    """Llama 3 (no factor), 3.1 and 3.2: eight key-value heads everywhere."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=hidden // heads,
        max_position_embeddings=8192 if factor is None else 131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None if factor is None else RopeScaling("llama3", factor, 1.0, 4.0, 8192),
        tie_word_embeddings=tied,
    )


# The keys are what `--llama_size` takes. "8b" is Llama 3, as first published under that size; 3.1 has its own name.
LLAMA_SIZES: dict[str, LlamaSize] = {
    "tiny": LlamaSize(TINY, None),
    "small": LlamaSize(SMALL, None),
    "tinyllama-1.1b": LlamaSize(
        dataclasses.replace(_llama2(2048, 5632, 22, 32), num_kv_heads=4, head_dim=64, max_position_embeddings=2048),
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    ),
    "1b": LlamaSize(_llama3(2048, 8192, 16, 32, factor=32.0, tied=True), "meta-llama/Llama-3.2-1B"),
    "3b": LlamaSize(_llama3(3072, 8192, 28, 24, factor=32.0, tied=True), "meta-llama/Llama-3.2-3B"),
    "7b": LlamaSize(_llama2(4096, 11008, 32, 32), "meta-llama/Llama-2-7b-hf"),
    "8b": LlamaSize(_llama3(4096, 14336, 32, 32, factor=None, tied=False), "meta-llama/Meta-Llama-3-8B"),
    "8b-3.1": LlamaSize(_llama3(4096, 14336, 32, 32, factor=8.0, tied=False), "meta-llama/Llama-3.1-8B"),
    "13b": LlamaSize(_llama2(5120, 13824, 40, 40), "meta-llama/Llama-2-13b-hf"),
}
