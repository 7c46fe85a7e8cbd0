"""The adapters of a Llama as PEFT has them: names, shapes and settings; and PEFT's own sum, to compare by.

Source: `peft` 0.21, `tuners/lora/layer.py` and `utils/save_and_load.py`. A key without "base_model.model." in front
loads with one warning and does nothing.

Legend: I a linear map's inputs and O its outputs as one axis each, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.config import LlamaConfig
from core.hf_export import Adapters, NotExportable
from core.hf_names import places
from core.read_back import ReadBackError
from core.weight_writing import Tensor

_WEIGHT = ".weight"


def peft_tensors(config: LlamaConfig, added: Adapters) -> dict[str, Tensor]:
    """The tensors of an adapter as PEFT names them: lora_A float32 [r, I] and lora_B float32 [O, r] of every map.

    Raises:
        NotExportable: an adapted map is only a part of a tensor of the base (Baichuan's W_pack).
    """
    found = {}
    for name, place in places(config).items():
        if place.path not in added.pairs:
            continue
        key = _peft_key(name)
        a, b = (stack[place.layer] for stack in added.pairs[place.path])
        for half, matrix in (("lora_A", a.reshape(-1, added.lora.rank).T), ("lora_B", b.reshape(b.shape[0], -1).T)):
            found[f"{key}.{half}.weight"] = Tensor.of(matrix)
    return found


def peft_config(config: LlamaConfig, added: Adapters, base_model: str, revision: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`; `base_model` is a folder, or a name on the hub with its revision."""
    modules = {_peft_key(name).split(".")[-1] for name, place in places(config).items() if place.path in added.pairs}
    alpha = added.lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": added.lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": added.lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def peft_merged(
    params: nnx.State, config: LlamaConfig, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> nnx.State:
    """PEFT's own formula, W + (lora_alpha / r) · B A, on what was written: a Llama's parameters, adapted ones float32.

    Args:
        params: the base.
        tensors: of `adapter_model.safetensors`.
        settings: of `adapter_config.json`.

    Raises:
        ReadBackError: an adapter by half, or of no map.
    """
    arrays, scale, left = dict(nnx.to_flat_state(params)), settings["lora_alpha"] / settings["r"], dict(tensors)
    sums: dict[tuple[Any, ...], np.ndarray] = {}
    for name, place in places(config).items():
        if not name.endswith(_WEIGHT) or f"{_peft_key(name)}.lora_A.weight" not in left:
            continue
        a_rI, b_Or = (left.pop(f"{_peft_key(name)}.{half}.weight", None) for half in ("lora_A", "lora_B"))
        if a_rI is None or b_Or is None:
            raise ReadBackError(f"{name}: lora_A without lora_B")
        if place.path not in sums:
            sums[place.path] = np.array(arrays[place.path][...], np.float32)
        sums[place.path][place.layer] += place.layout.to_ours(scale * (b_Or @ a_rI))
    if left:
        raise ReadBackError(f"adapters of no map: {', '.join(sorted(left))}")
    merged = {path: arrays[path].replace(jnp.asarray(stack)) for path, stack in sums.items()}
    return nnx.from_flat_state([*{**arrays, **merged}.items()])


def _peft_key(name: str) -> str:
    if not name.endswith(_WEIGHT):
        fused = name.split("[")[0].removesuffix(_WEIGHT).split(".")[-1]
        raise NotExportable(
            f"q, k and v have adapters of their own here, but lie in one map of the base's files ({fused}), to which "
            "PEFT adds one adapter"
        )
    return f"base_model.model.{name.removesuffix(_WEIGHT)}"
