"""Small checkpoints as Hugging Face writes them, for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from core.config import TINY, LlamaConfig
from core.hf_names import places

SMALL = dataclasses.replace(
    TINY, vocab_size=32, hidden_size=24, intermediate_size=20, num_heads=4, head_dim=8, attention_bias=True,
    mlp_bias=True, tie_word_embeddings=False,
)  # fmt: skip


def tensors_of(config: LlamaConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors by Hugging Face's names."""
    rng = np.random.default_rng(0)
    shapes = {name: place.layout.hf_shape for name, place in places(config).items()}
    return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def write(folder: Path, config: LlamaConfig, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A checkpoint as Hugging Face writes it; shard i holds every `shards`-th run of tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = list(tensors), {}
    for i, some in enumerate(np.array_split(np.arange(len(names)), shards)):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({names[j]: tensors[names[j]] for j in some}, folder / file)
        weight_map.update({names[j]: file for j in some})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def leaves(params: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


def assert_same(a: nnx.State, b: nnx.State) -> None:
    ours, theirs = leaves(a), leaves(b)
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path].dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=str(path))
