"""Hugging Face's architectures that are this Llama with other constants: how each one's `config.json` is to be read.

What a family fixes is said once, as fields of `core.config.LlamaConfig`: reading supplies it, and a configuration is of
the first family whose fixed fields it has, which is how it is written. Sources: `configuration_*.py` and
`modeling_*.py` of `transformers` 5.23; for Baichuan2 the published `config.json` and `modeling_baichuan.py` of
baichuan-inc/Baichuan2-7B-Base (code that is never run here).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from core.config import LlamaConfig

BIAS_FLAGS = ("attention_bias", "mlp_bias")
FLAGS = ("tie_word_embeddings", *BIAS_FLAGS)  # by the same name there and here; all false by default

Window = Literal["none", "always", "by layer"]


class ConfigError(ValueError):
    """A Llama configuration that cannot be read, contradicts itself or asks for what we cannot do."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's.

    Attributes:
        architecture: the class of its language model.
        fixed: fields of `LlamaConfig` that its arithmetic settles, whatever a file says.
        sizes: Hugging Face's defaults, by Hugging Face's names, of the fields that need one. A missing or null
            `num_key_value_heads` or `head_dim` without a default follows from the other fields.
        only: fields that change what is computed → the values under which ours is the same model. Absent is accepted.
        window: which layers attend to `sliding_window` positions: none has one; all ("always", null for full
            attention); or those that `layer_types`, `use_sliding_window` and `max_window_layers` name.
        plain_heads: its files can say neither grouped queries nor a head_dim of their own.
        telling: fields by which a file is told from those of siblings under the same model_type: each must be there,
            with none of the values named first; then comes what the file would be otherwise.
        fused_qkv: q, k and v lie in one tensor of its files.
    """

    architecture: str
    fixed: Mapping[str, Any]
    sizes: Mapping[str, int]
    only: Mapping[str, tuple[Any, ...]]
    window: Window = "none"
    plain_heads: bool = False
    telling: Mapping[str, tuple[tuple[Any, ...], str]] = dataclasses.field(default_factory=dict)
    fused_qkv: bool = False

    def objection(self, config: LlamaConfig) -> str | None:
        """Why a configuration is not of this family; None where it is."""
        for name, value in self.fixed.items():
            if getattr(config, name) != value:
                return f"{name} must be {value}, not {getattr(config, name)}"
        width = (config.hidden_size, config.num_heads)
        if self.plain_heads and (config.num_heads * config.head_dim, config.num_kv_heads) != width:
            return f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} of keys, are not hidden_size"
        return None


_FULL: dict[str, Any] = {"sliding_window": None}
_PLAIN: dict[str, Any] = {"qk_norm": False, "normalised_head": False}

# Fields that change what is computed in any family. The second half are no fields of these architectures: they betray
# another one, or a fork under one of their names.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None, {}),
    "attention_dropout": (None, 0),  # no effect on inference, but training would differ from what the file says
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "alibi": (None, False),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}
_OWN_CODE: dict[str, tuple[Any, ...]] = {"auto_map": (None, {})}
_NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,), "use_sliding_window": (None, False)}
_FIRST_BAICHUAN = "the first Baichuan's head is not normalised: BaiChuanForCausalLM, 64,000 words"
_ALIBI_BAICHUAN = "the 13B models, 5,120 wide, have ALiBi and no max_position_embeddings"

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        fixed={**_FULL, **_PLAIN, "attention_bias_on_o": True},
        sizes={
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048,
        },
        only={**_ONLY, **_OWN_CODE, **_NO_WINDOW},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        fixed={**_PLAIN, "attention_bias": False, "attention_bias_on_o": True, "mlp_bias": False},
        sizes={
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        only={**_ONLY, **_OWN_CODE, "use_sliding_window": (None,)},
        window="always",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={**_PLAIN, "attention_bias": True, "attention_bias_on_o": False, "mlp_bias": False},
        sizes={
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
            "sliding_window": 4096, "max_window_layers": 28,
        },
        only={**_ONLY, **_OWN_CODE},
        window="by layer",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"attention_bias_on_o": True, "mlp_bias": False, "qk_norm": True, "normalised_head": False},
        sizes={
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768,
            "sliding_window": 4096, "max_window_layers": 28,
        },
        only={**_ONLY, **_OWN_CODE},
        window="by layer",
    ),
    # Baichuan2-7B alone: Baichuan2-13B has ALiBi in place of rotary positions, and the first generation a plain head.
    # All four share model_type and most names of tensors.
    "baichuan": Family(
        "BaichuanForCausalLM",
        fixed={
            **_FULL, "qk_norm": False, "normalised_head": True, "attention_bias": False, "attention_bias_on_o": True,
            "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 10_000.0, "rope_scaling": None,
        },
        sizes={
            "vocab_size": 125696, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 4096,
        },
        only={**_ONLY, **_NO_WINDOW, "rope_theta": (None, 10_000), "rope_scaling": (None,), "rope_parameters": (None,)},
        plain_heads=True,
        telling={
            "architectures": ((), _FIRST_BAICHUAN),
            "vocab_size": ((64000,), _FIRST_BAICHUAN),
            "max_position_embeddings": ((), _ALIBI_BAICHUAN),
            "hidden_size": ((5120,), _ALIBI_BAICHUAN),
        },
        fused_qkv=True,
    ),
}  # fmt: skip


def family_of(config: LlamaConfig) -> str:
    """The model_type under which Hugging Face computes what a configuration says: a key of `FAMILIES`.

    Where several do (a Mistral without a window is a Llama), the first.

    Raises:
        ConfigError: none of them does.
    """
    objections = {name: family.objection(config) for name, family in FAMILIES.items()}
    found = next((name for name, objection in objections.items() if objection is None), None)
    if found is None:
        listed = "; ".join(f"{name}: {objection}" for name, objection in objections.items())
        raise ConfigError(f"no architecture of Hugging Face's computes this configuration ({listed})")
    return found
