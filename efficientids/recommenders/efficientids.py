"""EfficientIDS as a recommender: how it makes sequences, which loss, which parameters train, how it recommends.

Legend: B rows, H history items, T sequence positions, N items, C clusters, K title tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.clustering import Clusters
from core.config import LlamaConfig
from core.embeddings import Woven, items_only, weave
from core.functional import Buffer
from core.layers import Init
from core.llama import Compute
from core.lora import LoRAConfig, is_adapter
from core.models.efficientids import EfficientIDSConfig, LlamaEfficientIDSModel
from efficientids.recommenders.base import Batch, Histories, LossSum, Phase, Ranked, Training, in_llama
from efficientids.recommenders.shapes import ranked


@dataclasses.dataclass(frozen=True)
class EfficientIDSSpec:
    """Everything that decides the shapes of the system; stands in the run's `model.json`.

    Attributes:
        model: the model's own configuration.
        seq_len: T, positions of the Llama's input.
        max_seq_len: H, the newest items of a history that are looked at.
        num_clusters, cluster_slots: shape of the cluster table; 0 with the full head.
        title_tokens: K, width of the title table; 0 without text.
        bos: token id before the first item where there is text.
        text_loss_weight: weight of a text token's loss against an item's; 0 trains items alone.
    """

    model: EfficientIDSConfig
    seq_len: int
    max_seq_len: int
    num_clusters: int = 0
    cluster_slots: int = 0
    title_tokens: int = 0
    bos: int = 0
    text_loss_weight: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `model.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> EfficientIDSSpec:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: fields are missing or unknown.
        """
        model = dict(values["model"])
        model["llama"] = LlamaConfig.from_json(model["llama"])
        lora = model.get("lora")
        model["lora"] = None if lora is None else LoRAConfig.from_json(lora)
        return EfficientIDSSpec(**{**values, "model": EfficientIDSConfig(**model)})


class TitledModel(LlamaEfficientIDSModel):
    """The model with its table of titles, which is saved with it: token ids [N + 1, K], −1 where a title ends."""

    def __init__(self, spec: EfficientIDSSpec, key: jax.Array, titles: jax.Array | None, **parts: Any) -> None:
        super().__init__(spec.model, key, **parts)
        self.titles_NK = None if titles is None else Buffer(titles)


class EfficientIDS:
    """See `efficientids.recommenders.base.Recommender`.

    Args:
        spec: shapes.
        compute, init: how the Llama computes and starts.
        clusters, titles: contents of the buffers; None builds them empty, to be filled from a checkpoint.
        training: None where nothing is to be trained; its `llama_optimizer` is None for a frozen Llama.
    """

    def __init__(
        self,
        spec: EfficientIDSSpec,
        *,
        compute: Compute | None = None,
        init: Init | None = None,
        clusters: Clusters | None = None,
        titles: np.ndarray | None = None,
        training: Training | None = None,
    ) -> None:
        self.spec, self._compute, self._init = spec, compute, init
        self._clusters, self.titles = clusters, titles
        self._training = training

    @property
    def max_items(self) -> int:
        """H: the newest items of a history that the model looks at."""
        return self.spec.max_seq_len

    @property
    def history(self) -> str:
        """What of a history the model looks at, in words: part of the evaluation protocol."""
        spec = self.spec
        if not spec.title_tokens:
            return f"newest {spec.max_seq_len} items"
        return f"newest items that fit with their titles into {spec.seq_len} positions, at most {spec.max_seq_len}"

    def init(self, key: jax.Array) -> TitledModel:
        """The whole system at its start."""
        spec, clusters, titles = self.spec, self._clusters, self.titles
        if clusters is None and spec.num_clusters:
            clusters = _blank_clusters(spec)
        if titles is None and spec.title_tokens:
            titles = np.full((spec.model.num_items + 1, spec.title_tokens), -1, np.int32)
        table = None if titles is None else jnp.asarray(titles)
        return TitledModel(spec, key, table, clusters=clusters, compute=self._compute, init=self._init)

    def plan(self) -> Sequence[Phase]:
        """One phase: everything, or everything but the Llama, or that and the Llama's adapters."""
        training = self._training
        if training is None:
            raise ValueError("this recommender was built without `training`")
        if training.llama_optimizer is None:
            return [training.phase("frozen", nnx.Not(in_llama), self._loss)]
        if self.spec.model.lora is not None:
            return [training.phase("lora", nnx.Not(in_llama), self._loss, is_adapter)]
        return [training.phase("full", nnx.Not(in_llama), self._loss, nnx.All(in_llama, nnx.Not(self._unread)))]

    def _unread(self, path: tuple[Any, ...], _: Any) -> bool:
        """The Llama's tables that this loss never reads: trained, they would only decay (and cost Adam's memory)."""
        tied = self.spec.model.llama.tie_word_embeddings
        reads_head = self.spec.text_loss_weight > 0
        reads_embedding = self.spec.title_tokens > 0 or (tied and reads_head)
        name = tuple(path)[:2]
        return (name == ("llama", "embed_VD") and not reads_embedding) or (
            name == ("llama", "head_VD") and not reads_head
        )

    def recommend(self, model: nnx.Module, histories: Histories, k: int, exclude: np.ndarray | None) -> Ranked:
        """The k most probable next items, exactly; rows and k are padded to powers of two so that few programs compile.

        Raises:
            ValueError: ids outside 0 … N.
        """
        return ranked(
            self._top_k, model, histories, k, exclude, max_items=self.max_items, num_items=self.spec.model.num_items
        )

    def sequence(
        self, model: TitledModel, item_ids_BH: jax.Array, lengths_B: jax.Array, segments_BH: jax.Array | None = None
    ) -> Woven:
        """Histories → the Llama's input: items alone, or each item followed by its title.

        `segments_BH` (int) tells the histories of a packed row apart.
        """
        if model.titles_NK is None:
            return items_only(item_ids_BH, lengths_B, segments_BH)
        return weave(item_ids_BH, lengths_B, model.titles_NK[...], self.spec.bos, self.spec.seq_len, segments_BH)

    @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="k")
    def _top_k(
        self, graphdef: Any, state: nnx.State, ids: jax.Array, lengths: jax.Array, exclude: jax.Array, *, k: int
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state)
        hidden_BD = model.last_hidden(self.sequence(model, ids, lengths))
        return self.rank(model, hidden_BD, exclude, k)

    def rank(self, model: TitledModel, hidden_BD: jax.Array, exclude_BX: jax.Array, k: int) -> tuple[Any, Any]:
        """(scores [B, k], items [B, k]) for hidden states: the exact order; ablations put another in its place."""
        return model.top_k(hidden_BD, k, exclude_BX)

    def _loss(self, model: TitledModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
        sequence = self.sequence(model, batch["item_ids"], batch["lengths"], batch.get("segments"))
        weight = self.spec.text_loss_weight
        parts = model.loss(sequence, batch["item_ids"].shape[1], with_text=weight > 0, key=key)
        if not weight:
            return LossSum(parts.item_loss, parts.num_items, parts.num_items, {})
        metrics = {
            "item_loss": (parts.item_loss, parts.num_items),
            "text_loss": (parts.text_loss, parts.num_tokens),
        }
        total = parts.item_loss + weight * parts.text_loss
        return LossSum(total, parts.num_items + weight * parts.num_tokens, parts.num_items, metrics)


def _blank_clusters(spec: EfficientIDSSpec) -> Clusters:
    """Clusters of the right shapes and no content, for a checkpoint to fill."""
    item_N1 = jnp.zeros((spec.model.num_items + 1,), jnp.int32)
    sizes_C = jnp.zeros((spec.num_clusters,), jnp.int32)
    return Clusters(item_N1, item_N1, jnp.zeros((spec.num_clusters, spec.cluster_slots), jnp.int32), sizes_C)
