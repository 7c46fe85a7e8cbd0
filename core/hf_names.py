"""One two-way table: Hugging Face's names and shapes of a Llama's tensors, and ours.

The loader, the exporter and the parity tests read nothing else about the correspondence.

Legend of a layout: D hidden, N query heads, K key-value heads, H head dim, F MLP width, V vocabulary.
`(N H) D -> D N H` says: Hugging Face's tensor has two axes, the first of N·H; ours has three. Their linear weights are
(out, in), ours in-axes first. In memory our layers are stacked: a tensor of layer l is row l of ours.

A name may end in a part: `W_pack.weight[q]` is the part q of a file's tensor `W_pack.weight`, whose parts lie one after
another along its first axis, in the table's order. Everywhere but in the files such a part is a tensor like others.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from core.config import LlamaConfig
from core.hf_families import FAMILIES, family_of

T = TypeVar("T", np.ndarray, jax.Array)
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    `hf` has a `{}` for the layer's number where `ours` starts with "layers"; the tensor exists if `when` holds.
    """

    hf: str
    ours: str
    layout: str
    when: Literal["always", "qkv", "W_pack", "qkv_bias", "o_bias", "qk_norm", "mlp_bias", "untied"] = "always"


TABLE = (
    Row("model.embed_tokens.weight", "embed_VD", "V D -> V D"),
    Row("model.layers.{}.input_layernorm.weight", "layers.attention_norm.scale", "D -> D"),
    Row("model.layers.{}.self_attn.q_proj.weight", "layers.attention.q.weight", "(N H) D -> D N H", "qkv"),
    Row("model.layers.{}.self_attn.k_proj.weight", "layers.attention.k.weight", "(K H) D -> D K H", "qkv"),
    Row("model.layers.{}.self_attn.v_proj.weight", "layers.attention.v.weight", "(K H) D -> D K H", "qkv"),
    Row("model.layers.{}.self_attn.W_pack.weight[q]", "layers.attention.q.weight", "(N H) D -> D N H", "W_pack"),
    Row("model.layers.{}.self_attn.W_pack.weight[k]", "layers.attention.k.weight", "(K H) D -> D K H", "W_pack"),
    Row("model.layers.{}.self_attn.W_pack.weight[v]", "layers.attention.v.weight", "(K H) D -> D K H", "W_pack"),
    Row("model.layers.{}.self_attn.o_proj.weight", "layers.attention.o.weight", "D (N H) -> N H D"),
    Row("model.layers.{}.self_attn.q_proj.bias", "layers.attention.q.bias", "(N H) -> N H", "qkv_bias"),
    Row("model.layers.{}.self_attn.k_proj.bias", "layers.attention.k.bias", "(K H) -> K H", "qkv_bias"),
    Row("model.layers.{}.self_attn.v_proj.bias", "layers.attention.v.bias", "(K H) -> K H", "qkv_bias"),
    Row("model.layers.{}.self_attn.o_proj.bias", "layers.attention.o.bias", "D -> D", "o_bias"),
    Row("model.layers.{}.self_attn.q_norm.weight", "layers.attention.q_norm.scale", "H -> H", "qk_norm"),
    Row("model.layers.{}.self_attn.k_norm.weight", "layers.attention.k_norm.scale", "H -> H", "qk_norm"),
    Row("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale", "D -> D"),
    Row("model.layers.{}.mlp.gate_proj.weight", "layers.mlp.gate.weight", "F D -> D F"),
    Row("model.layers.{}.mlp.up_proj.weight", "layers.mlp.up.weight", "F D -> D F"),
    Row("model.layers.{}.mlp.down_proj.weight", "layers.mlp.down.weight", "D F -> F D"),
    Row("model.layers.{}.mlp.gate_proj.bias", "layers.mlp.gate.bias", "F -> F", "mlp_bias"),
    Row("model.layers.{}.mlp.up_proj.bias", "layers.mlp.up.bias", "F -> F", "mlp_bias"),
    Row("model.layers.{}.mlp.down_proj.bias", "layers.mlp.down.bias", "D -> D", "mlp_bias"),
    Row("model.norm.weight", "norm.scale", "D -> D"),
    Row("lm_head.weight", "head_VD", "V D -> V D", "untied"),
)

STACK = "layers"  # parameters below it have an axis of layers in front
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Buffers that old versions of transformers wrote: they follow from the config.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor lies in Hugging Face's files and in our parameters (there without the axis of layers).

    Hashable, so that it can be a static argument of a jitted function.
    """

    hf_shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    _split_shape: tuple[int, ...]  # Hugging Face's axes with the products taken apart
    _axes: tuple[int, ...]  # from there to ours

    @classmethod
    def parse(cls, layout: str, config: LlamaConfig) -> Layout:
        """Reads `(N H) D -> D N H` with the sizes of a config."""
        sizes = dict(
            D=config.hidden_size, N=config.num_heads, K=config.num_kv_heads, H=config.head_dim,
            F=config.intermediate_size, V=config.vocab_size,
        )  # fmt: skip
        theirs, ours = (side.strip() for side in layout.split("->"))
        groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", theirs)]
        letters = [letter for group in groups for letter in group]
        return cls(
            hf_shape=tuple(math.prod(sizes[letter] for letter in group) for group in groups),
            our_shape=tuple(sizes[letter] for letter in ours.split()),
            _split_shape=tuple(sizes[letter] for letter in letters),
            _axes=tuple(letters.index(letter) for letter in ours.split()),
        )

    def axes_in_hf(self, ours: Sequence[R]) -> tuple[R, ...]:
        """What holds for our axes, by Hugging Face's: a product of axes has what holds for its first.

        So a tensor that is divided along our axes is divided along theirs, into the same parts, as long as only the
        first axis of a product is divided.
        """
        split = [ours[self._axes.index(i)] for i in range(len(self._axes))]
        sizes, found = iter(zip(self._split_shape, split, strict=True)), []
        for length in self.hf_shape:
            size, first = next(sizes)
            found.append(first)
            while size < length:
                size *= next(sizes)[0]
        return tuple(found)

    def to_ours(self, tensor: T) -> T:
        """Hugging Face's tensor → ours, of the same dtype. Raises ValueError for a tensor of another shape."""
        self._check(tensor.shape, self.hf_shape)
        return tensor.reshape(self._split_shape).transpose(self._axes)

    def to_hf(self, tensor: T) -> T:
        """Ours (one layer's) → Hugging Face's, of the same dtype. Raises ValueError for a tensor of another shape."""
        self._check(tensor.shape, self.our_shape)
        theirs = tensor.transpose(np.argsort(self._axes).tolist()).reshape(self.hf_shape)
        # safetensors (0.8) writes a NumPy array in the order of its memory: a transposed view would come back mixed up.
        return np.ascontiguousarray(theirs) if isinstance(theirs, np.ndarray) else theirs

    @staticmethod
    def _check(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != expected:
            raise ValueError(f"a tensor of shape {list(found)} where {list(expected)} is expected")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of Hugging Face's stands in our parameters: the path, the row of the stack (None: no stack)."""

    path: tuple[str, ...]
    layer: int | None
    layout: Layout


def places(config: LlamaConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint of this config: Hugging Face's name, perhaps of a part, → its place in ours.

    Raises:
        ConfigError: no architecture of Hugging Face's computes what the config says.
    """
    return dict(_places(config))


def in_files(config: LlamaConfig) -> dict[str, dict[str, int]]:
    """Every tensor in the files of a checkpoint → the names in `places` that it consists of, with the rows of each.

    Most consist of themselves; the parts of the others, put together along the first axis, are the file's tensor.
    """
    found: dict[str, dict[str, int]] = {}
    for name, place in places(config).items():
        found.setdefault(name.split("[")[0], {})[name] = place.layout.hf_shape[0]
    return found


def _places(config: LlamaConfig) -> Iterator[tuple[str, Place]]:
    fused = FAMILIES[family_of(config)].fused_qkv
    present: dict[str, Any] = {
        "always": True,
        "qkv": not fused,
        "W_pack": fused,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias and config.attention_bias_on_o,
        "qk_norm": config.qk_norm,
        "mlp_bias": config.mlp_bias,
        "untied": not config.tie_word_embeddings,
    }
    for row in TABLE:
        if not present[row.when]:
            continue
        path, layout = tuple(row.ours.split(".")), Layout.parse(row.layout, config)
        if path[0] != STACK:
            yield row.hf, Place(path, None, layout)
            continue
        for layer in range(config.num_layers):
            yield row.hf.format(layer), Place(path, layer, layout)


def num_parameters(config: LlamaConfig) -> int:
    """The number of a Llama's parameters, a tied head not counted twice."""
    return sum(math.prod(place.layout.hf_shape) for place in places(config).values())
