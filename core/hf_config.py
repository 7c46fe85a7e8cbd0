"""Reads Hugging Face's `config.json`: every field by a whitelist, what we cannot do refused by name.

What differs between architectures, their defaults too, stands in `core.hf_families`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.hf_families import FAMILIES, FLAGS, ConfigError, Family

log = logging.getLogger(__name__)

# Hugging Face's name → ours.
_SIZES: dict[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_DEFAULT_EPS = 1e-6
_DEFAULT_THETA = 10000.0

# Parameters that each kind of rotary scaling needs; it may have no others.
_ROPE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

# Known to leave the arithmetic alone. `pretraining_tp` splits products for speed: its sums differ in rounding only.
# Anything else is ignored too, but by name in a warning: HF's Llama reads no such field either, and real checkpoints
# carry notes of the tools that made them; whatever is known to matter is in `Family.only`. `model_max_length` repeats
# `max_position_embeddings`, and `z_loss_weight` is of the loss that a model was pretrained with.
_HARMLESS = frozenset(
    """
    _attn_implementation_autoset _from_model_config _name_or_path attn_implementation begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id eos_token_id finetuning_task gradient_checkpointing id2label
    initializer_range is_decoder label2id max_sequence_length model_max_length original_max_position_embeddings
    output_attentions output_hidden_states pad_token_id prefix pretraining_tp problem_type return_dict sep_token_id
    task_specific_params tokenizer_class torchscript transformers_version unsloth_fixed unsloth_version use_cache
    z_loss_weight
    """.split()  # noqa: SIM905
)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers")
_READ = frozenset({*_SIZES, *FLAGS, *_WINDOW, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"})
_READ_BUT_UNUSED = frozenset({"model_type", "architectures", "auto_map", "layer_types", "dtype", "torch_dtype"})


def read_llama_fields(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `core.config.LlamaConfig`, `rope_scaling` as a dictionary of its own arguments or None.

    Args:
        source: the content of a `config.json`, its path, or the path of its folder.

    Raises:
        ConfigError: a missing file, invalid JSON, an ill-typed or contradictory field, or a field that asks for
            something this Llama cannot do; the message names the file, the field and the value found.
    """
    where, raw = _open(source)
    family = _family(where, raw)
    fields = _sizes(where, raw, family)
    fields.update({name: _flag(where, raw, name) for name in FLAGS if name not in family.fixed})
    fields["rms_norm_eps"] = _positive(where, raw, "rms_norm_eps", _DEFAULT_EPS)
    fields["rope_scaling"], fields["rope_theta"] = _rope(where, raw)
    fields["sliding_window"] = _window(where, raw, family, fields["num_layers"])
    return {**fields, **family.fixed}


def _open(source: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[str, Mapping[str, Any]]:
    """A name for messages, and the object."""
    if isinstance(source, Mapping):
        return "config", source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; a Hugging Face checkpoint holds its config.json beside the weights"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a {type(raw).__name__} where a JSON object of fields is expected")
    return str(path), raw


def _family(where: str, raw: Mapping[str, Any]) -> Family:
    """The family a file is of. Refuses, all at once, each field that says what it cannot do; warns of unknown ones."""
    if "model_type" not in raw and "hidden_size" not in raw:
        raise ConfigError(f"{where}: neither model_type nor hidden_size is there: not the configuration of a Llama")
    name = raw.get("model_type", "llama")
    known = isinstance(name, str) and name in FAMILIES
    family = FAMILIES[name if known else "llama"]
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": (*((name,) if known else FAMILIES),),
        "architectures": (None, [], [family.architecture]),
        **{flag: (None, family.fixed[flag]) for flag in FLAGS if flag in family.fixed},
        **family.only,
    }
    problems = [
        f"{name} {raw[name]!r} (only {' or '.join(repr(v) for v in values)})"
        for name, values in allowed.items()
        if name in raw and raw[name] not in values
    ]
    problems += [
        f"{name} {_found(raw, name)} ({otherwise})"
        for name, (other, otherwise) in family.telling.items()
        if not raw.get(name) or raw[name] in other
    ]
    layer_types = raw.get("layer_types") or []
    all_full = isinstance(layer_types, list) and layer_types == [_FULL] * len(layer_types)
    if family.window == "none" and not all_full:
        problems.append(f"layer_types {layer_types!r} (only 'full_attention')")
    dtypes = [str(raw[name]).removeprefix("torch.") for name in ("dtype", "torch_dtype") if raw.get(name) is not None]
    if len(set(dtypes)) > 1:
        problems.append(f"dtype {dtypes[0]!r} beside torch_dtype {dtypes[1]!r} (one of them, or both alike)")
    if problems:
        raise ConfigError(f"{where}: cannot be run as a {family.architecture} here: " + "; ".join(problems))
    unknown = sorted(set(raw) - _READ - _READ_BUT_UNUSED - _HARMLESS - set(family.only))
    if unknown:
        log.warning("%s: fields that Hugging Face's Llama does not know are ignored: %s", where, ", ".join(unknown))
    return family


def _sizes(where: str, raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    derived = ("num_key_value_heads", "head_dim")
    fields = {
        ours: _integer(where, raw, name, family.sizes[name]) for name, ours in _SIZES.items() if name not in derived
    }
    heads, width = fields["num_heads"], fields["hidden_size"]
    for name, follows in zip(derived, (heads, width // heads), strict=True):
        value = raw.get(name, family.sizes.get(name))
        if name == "head_dim" and value is None and width % heads:
            raise ConfigError(
                f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads} and head_dim is absent"
            )
        fields[_SIZES[name]] = follows if value is None else _integer(where, raw, name, value)
    return fields


def _window(where: str, raw: Mapping[str, Any], family: Family, num_layers: int) -> int | None:
    """The window of all layers, or None for full attention. Layers of both kinds in one model are refused."""
    if family.window == "none":
        return None
    by_layer = family.window == "by layer"
    slides = not by_layer or _flag(where, raw, "use_sliding_window")
    window = raw.get("sliding_window", family.sizes["sliding_window"]) if slides else None
    if window is not None:
        window = _integer(where, raw, "sliding_window", window)
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", family.sizes["max_window_layers"]) if by_layer else 0
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ConfigError(f"{where}: max_window_layers is {first!r}; a number of layers is expected")
        full = num_layers if window is None else min(first, num_layers)
        kinds = [_FULL] * full + [_SLIDING] * (num_layers - full)
    if kinds == [_SLIDING] * num_layers and window is not None:
        return window
    # A family whose files name no layers has its window in all of them, whatever layer_types says.
    if kinds == [_FULL] * num_layers and (window is None or by_layer):
        return None
    counted = f"{kinds.count(_SLIDING)} of {len(kinds)} sliding" if isinstance(kinds, list) else repr(kinds)
    raise ConfigError(
        f"{where}: sliding_window {window!r} and layer_types {counted}, for {num_layers} layers: only one window for "
        "all layers, or none, can be run here"
    )


def _integer(where: str, raw: Mapping[str, Any], name: str, default: int | None) -> int:
    value = raw.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{where}: {name} is {_found(raw, name)}; a positive integer is expected")
    return value


def _positive(where: str, raw: Mapping[str, Any], name: str, default: float | None) -> float:
    value = raw.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: {name} is {_found(raw, name)}; a positive number is expected")
    return float(value)


def _found(raw: Mapping[str, Any], name: str) -> str:
    return repr(raw[name]) if name in raw else "missing"


def _flag(where: str, raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {name} is {value!r}; true or false is expected")
    return value


def _rope(where: str, raw: Mapping[str, Any]) -> tuple[dict[str, Any] | None, float]:
    """Scaling and theta from the old style (`rope_theta`, `rope_scaling`), the new (`rope_parameters`), or both alike.

    transformers 4 reads the old fields and 5 lets `rope_scaling` win, so where the styles disagree the same file is
    two models: refused. `rope_scaling: null` beside a scaled `rope_parameters` disagrees too.
    """
    scaling, theta = None, None
    if raw.get("rope_scaling") is not None:
        scaling, theta = _rope_block(where, raw, "rope_scaling")
    if "rope_theta" in raw:
        outer = _positive(where, raw, "rope_theta", None)
        _agree(where, "rope_theta", outer, "rope_scaling.rope_theta", outer if theta is None else theta)
        theta = outer
    if raw.get("rope_parameters") is None:
        return scaling, _DEFAULT_THETA if theta is None else theta
    new_scaling, new_theta = _rope_block(where, raw, "rope_parameters")
    if "rope_scaling" in raw:
        _agree(where, "rope_scaling", scaling, "rope_parameters", new_scaling)
        # Hugging Face then takes no theta from `rope_parameters`, but its default.
        theta = _DEFAULT_THETA if theta is None and scaling is not None else theta
    if theta is not None and new_theta is not None:
        _agree(where, "rope_theta", theta, "rope_parameters.rope_theta", new_theta)
    theta = new_theta if theta is None else theta
    return new_scaling, _DEFAULT_THETA if theta is None else theta


def _agree(where: str, old_name: str, old: Any, new_name: str, new: Any) -> None:
    if old != new:
        raise ConfigError(f"{where}: {old_name} says {old!r} but {new_name} says {new!r}; remove the wrong one")


def _rope_kind(where: str, block: Mapping[str, Any]) -> str:
    """The kind of scaling that a block names, by today's key or the legacy `type`; refuses keys it does not take."""
    kinds = [block[key] for key in ("rope_type", "type") if block.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ConfigError(f"{where}: rope_type is {kinds[0]!r} but type is {kinds[1]!r}")
    kind = kinds[0] if kinds else "default"
    if kind not in list(_ROPE_PARAMETERS):
        raise ConfigError(f"{where}: rope_type {kind!r} is not supported, only {', '.join(_ROPE_PARAMETERS)}")
    partial = block.get("partial_rotary_factor")
    if partial not in FAMILIES["llama"].only["partial_rotary_factor"]:
        raise ConfigError(f"{where}: partial_rotary_factor {partial!r} is not supported, only 1")
    taken = {*_ROPE_PARAMETERS[kind], *_ROPE_COMMON}
    extra = sorted(key for key, value in block.items() if key not in taken and value is not None)
    if extra:
        raise ConfigError(f"{where}: rope_type {kind!r} takes no {', '.join(extra)}")
    return kind


def _rope_block(where: str, raw: Mapping[str, Any], field: str) -> tuple[dict[str, Any] | None, float | None]:
    """One `rope_scaling` or `rope_parameters` object: the arguments of `RopeScaling` (None: plain), and its theta."""
    block = raw[field]
    if not isinstance(block, Mapping):
        raise ConfigError(f"{where}: {field} is {block!r}; an object is expected")
    inside = f"{where}: {field}"
    kind = _rope_kind(inside, block)
    theta = _positive(inside, block, "rope_theta", None) if block.get("rope_theta") is not None else None
    if kind == "default":
        return None, theta
    scaling: dict[str, Any] = {"kind": kind, "factor": _positive(inside, block, "factor", None)}
    if scaling["factor"] < 1:
        raise ConfigError(f"{inside}: factor is {scaling['factor']!r}; at least 1 is expected")
    if kind == "llama3":
        low, high = (_positive(inside, block, f"{end}_freq_factor", None) for end in ("low", "high"))
        if high <= low:
            raise ConfigError(f"{inside}: high_freq_factor {high!r} must exceed low_freq_factor {low!r}")
        name = "original_max_position_embeddings"
        original = _integer(inside, block, name, None)
        # Hugging Face lets a field of this name outside the block win.
        _agree(where, name, original if raw.get(name) is None else raw[name], f"{field}.{name}", original)
        scaling.update({"low_freq_factor": low, "high_freq_factor": high, name: original})
    return scaling, theta
