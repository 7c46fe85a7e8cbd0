"""EfficientIDS: item vectors inside a Llama, and a softmax over the catalogue (arXiv 2509.03746).

An item takes one position. Its vector goes through the input adapter into the Llama; the hidden state at the position
before an item predicts that item, with one full softmax or in two levels (cluster, then item).

Legend: B batch, T positions, M positions read by the loss, D the Llama's width, E item dimension, S head dimension
(E, or D with a shared MLP), N items (1 … N; 0 is padding), C clusters, V vocabulary, k results.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from core import hierarchical_softmax, softmax
from core.clustering import Clusters
from core.config import LlamaConfig
from core.embeddings import InputAdapter, ItemVectors, Woven, fan_in
from core.functional import Buffer
from core.layers import Dropout, Init, Linear
from core.llama import Compute, Llama
from core.lora import LoRAConfig


@dataclasses.dataclass(frozen=True)
class EfficientIDSConfig:
    """What a model is made of, beside the Llama's own shape.

    Attributes:
        num_items: N.
        item_dim: E.
        item_rank: rank of the item vectors; None for a full table.
        head: one softmax over all items, or clusters first.
        output_tying: `adapter`: the hidden state comes down to E and meets the item vectors; `shared_mlp`: item and
            cluster vectors go up to D through the input adapter and meet the hidden state (the original's form).
        init_std: deviation of item vectors, cluster vectors and adapters at the start; None: 0.02 for vectors,
            1/√fan-in for adapters.
        dropout: rate on item inputs and on the Llama's residual branches while training.
        lora: adapters in the Llama's layers; None: none.
    """

    llama: LlamaConfig
    num_items: int
    item_dim: int = 384
    item_rank: int | None = None
    head: Literal["full", "two_level"] = "full"
    output_tying: Literal["adapter", "shared_mlp"] = "adapter"
    init_std: float | None = None
    dropout: float = 0.0
    lora: LoRAConfig | None = None


class LossParts(NamedTuple):
    """Sums over a batch: negative log-likelihood and number of targets, of items and of text tokens."""

    item_loss: Array
    num_items: Array
    text_loss: Array
    num_tokens: Array


class LlamaEfficientIDSModel(nnx.Module):
    """The whole system as one module; `__call__` is inference, `loss` is training.

    Args:
        config: the shape.
        key: for the random start.
        clusters: the assignment of items to clusters, needed by the two-level head.
        compute, init: see `core.llama`; `init` is the Llama's own, item parts are always float32.
    """

    def __init__(
        self,
        config: EfficientIDSConfig,
        key: Array,
        clusters: Clusters | None = None,
        compute: Compute | None = None,
        init: Init | None = None,
    ) -> None:
        self.config = config
        keys = jax.random.split(key, 5)
        vectors = Init(0.02 if config.init_std is None else config.init_std)
        width = config.llama.hidden_size
        adapted = dataclasses.replace(init or Init(), lora=config.lora)
        self.llama = Llama(config.llama, keys[0], compute, adapted)
        self.items = ItemVectors(config.num_items, config.item_dim, config.item_rank, keys[1], vectors)
        self.input_adapter = InputAdapter(config.item_dim, width, keys[2], config.init_std, jnp.float32)
        self.item_bias_N = nnx.Param(jnp.zeros((config.num_items + 1,)))
        tied = config.output_tying == "shared_mlp"
        down = fan_in(width, config.init_std, jnp.float32)
        self.output_adapter = None if tied else Linear(keys[3], (width,), (config.item_dim,), True, down)
        if config.head == "two_level" and clusters is None:
            raise ValueError("head 'two_level' needs clusters: see core.clustering")
        if config.head == "full" or clusters is None:
            self.clusters = self.cluster_vectors_CE = self.cluster_bias_C = None
        else:
            self.clusters = nnx.Dict({name: Buffer(value) for name, value in vars(clusters).items()})
            table_CE = vectors.normal(keys[4], (clusters.num_clusters, config.item_dim))
            self.cluster_vectors_CE = nnx.Param(table_CE)
            self.cluster_bias_C = nnx.Param(jnp.zeros((clusters.num_clusters,)))

    def item_vectors(self) -> Array:
        """The item vectors [N + 1, E]; row 0 is padding's."""
        return self.items.table()

    def __call__(
        self,
        input_ids: Array,
        item_ids: Array,
        item_mask: Array,
        *,
        lengths: Array | None = None,
        training: bool = False,
        top_k: int = 10,
        exclude: Array | None = None,
        return_logits: bool = False,
    ) -> dict[str, Array]:
        """Recommends what comes after each row's last position.

        Args:
            input_ids: text tokens, int [B, T]; not read where `item_mask`.
            item_ids: items, int [B, T]; read where `item_mask`.
            item_mask: bool or 0/1 [B, T].
            lengths: int [B], positions of each row that are real (right padding); default all.
            training: must be False; `loss` is the training pass.
            top_k: k.
            exclude: int [B, X], items never to recommend, padded with 0.
            return_logits: also return `logits`.

        Returns:
            `top_k_items` int32 [B, k] and `top_k_scores` float32 [B, k], exact log-probabilities, best first (0 and −∞
            where fewer items remain); with `return_logits`, `logits` float32 [B, N + 1]: the log-probability of each
            item at the last position (−∞ at 0).

        Raises:
            ValueError: `training`, or ids out of range. Under `jax.jit` ids are not known: there, gathers clamp.
        """
        if training:
            raise ValueError("training=True: use LlamaEfficientIDSModel.loss; __call__ is inference")
        _check_ids("item_ids", item_ids, self.config.num_items)
        _check_ids("input_ids", input_ids, self.config.llama.vocab_size - 1)
        if exclude is not None:
            _check_ids("exclude", exclude, self.config.num_items)
        row_length = jnp.full(item_ids.shape[:1], item_ids.shape[1], jnp.int32) if lengths is None else lengths
        last_BD = self.last_hidden(Woven(input_ids, item_ids, jnp.asarray(item_mask, bool), row_length))
        scores_Bk, items_Bk = self.top_k(last_BD, top_k, exclude)
        results = {"top_k_items": items_Bk, "top_k_scores": scores_Bk}
        if return_logits:
            results["logits"] = self.log_probs(last_BD)
        return results

    def hidden(self, sequence: Woven, key: Array | None = None) -> Array:
        """A sequence → hidden states [B, T, D] after the final norm; with a key, under dropout."""
        x_BTD = self.input_adapter(self.items(sequence.item_ids).astype(self.llama.compute.dtype))
        key_input = key_layers = None
        if key is not None and self._drops():
            key_input, key_layers = jax.random.split(key)
            x_BTD = Dropout(self.config.dropout, key_input)(x_BTD, 0)
        text_BTD = self.llama.embed(sequence.input_ids)
        x_BTD = jnp.where(sequence.item_mask[..., None], x_BTD, text_BTD)
        return self.llama.hidden(x_BTD, dropout=self.config.dropout, key=key_layers, segments_BT=sequence.segments)

    def _drops(self) -> bool:
        return self.config.dropout > 0 or (self.config.lora is not None and self.config.lora.dropout > 0)

    def last_hidden(self, sequence: Woven) -> Array:
        """The hidden state at each row's last real position: [B, D]. A row of length 0 reads its first position.

        Raises:
            ValueError: packed rows, which have many ends.
        """
        if sequence.segments is not None:
            raise ValueError("packed rows are for `loss`; give each history a row of its own")
        hidden_BTD = self.hidden(sequence)
        last_B11 = jnp.maximum(sequence.lengths - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]

    def loss(
        self, sequence: Woven, max_targets: int, *, with_text: bool = False, key: Array | None = None
    ) -> LossParts:
        """Negative log-likelihood of every item, given all before it.

        Args:
            sequence: right-padded; packed rows (`segments`) too: nothing is predicted across a border.
            max_targets: M, at least the number of items of any row; fewer would drop the newest. Static.
            with_text: one softmax over words ∪ clusters (or words ∪ items with the full head) at the first level,
                and text tokens are targets too.
            key: for dropout.
        """
        hidden_BTD = self.hidden(sequence, key)
        real_BT = jnp.arange(1, sequence.item_ids.shape[1] + 1) < sequence.lengths[:, None]
        if sequence.segments is not None:
            real_BT &= sequence.segments == _shift(sequence.segments)
        next_item_BT = real_BT & _shift(sequence.item_mask)
        next_word_BT = real_BT & ~_shift(sequence.item_mask)
        # Only positions before an item go through the item softmax: with text between items they are few.
        chosen_BM = jnp.argsort(~next_item_BT, axis=1, stable=True)[:, :max_targets]
        chosen_BTD = jnp.take_along_axis(hidden_BTD, chosen_BM[..., None], axis=1)
        targets_BM = jnp.take_along_axis(_shift(sequence.item_ids), chosen_BM, axis=1)
        weights_BM = jnp.take_along_axis(next_item_BT, chosen_BM, axis=1).astype(jnp.float32)
        item_loss = self._item_nll(_flat(chosen_BTD), targets_BM.ravel(), weights_BM.ravel(), with_text)
        zero = jnp.zeros(())
        if not with_text:
            return LossParts(item_loss, weights_BM.sum(), zero, zero)
        weights_BT = next_word_BT.astype(jnp.float32)
        tokens_BT = _shift(sequence.input_ids)
        text_loss = self._word_nll(_flat(hidden_BTD), tokens_BT.ravel(), weights_BT.ravel())
        return LossParts(item_loss, weights_BM.sum(), text_loss, weights_BT.sum())

    def top_k(self, hidden_BD: Array, k: int, exclude: Array | None = None) -> tuple[Array, Array]:
        """The k most probable next items by exact log-probability: (scores float32 [B, k], ids int32 [B, k]).

        The head computes in float32 whatever the Llama does: rounded scores would tie.
        """
        h_BS, vectors_NS = self._head_hidden(hidden_BD.astype(jnp.float32)), self._item_vectors()
        if self.clusters is None:
            return softmax.top_k(h_BS, vectors_NS, self.item_bias_N[...], None, k, exclude)
        return hierarchical_softmax.top_k(h_BS, self._two_level(vectors_NS), self._clusters(), k, exclude)

    def log_probs(self, hidden_BD: Array) -> Array:
        """Exact log-probability of every item as the next one, float32 [B, N + 1]; −∞ at 0."""
        h_BS, vectors_NS = self._head_hidden(hidden_BD.astype(jnp.float32)), self._item_vectors()
        if self.clusters is None:
            return softmax.log_probs([softmax.item_segment(h_BS, vectors_NS, self.item_bias_N[...])])
        return hierarchical_softmax.log_probs(h_BS, self._two_level(vectors_NS), self._clusters())

    def _item_nll(self, x_TD: Array, items_T: Array, weights_T: Array, with_text: bool) -> Array:
        """Σ weights · (−log p(item)) at hidden states [T, D]."""
        h_TS, vectors_NS = self._head_hidden(x_TD), self._item_vectors()
        words = self._words(x_TD) if with_text else None
        targets_T = items_T + (0 if words is None else self.config.llama.vocab_size)
        chunk = self.llama.compute.chunk_elements
        if self.clusters is not None:
            head, clusters = self._two_level(vectors_NS), self._clusters()
            return hierarchical_softmax.loss(
                h_TS, head, clusters, targets_T, weights_T, words=words, chunk_elements=chunk
            )
        items = softmax.item_segment(h_TS, vectors_NS, self.item_bias_N[...])
        segments = [items] if words is None else [words, items]
        return softmax.cross_entropy(segments, targets_T, weights_T, chunk_elements=chunk)

    def _word_nll(self, x_TD: Array, tokens_T: Array, weights_T: Array) -> Array:
        """Σ weights · (−log p(token)) at hidden states [T, D]: the first level alone, words ∪ clusters (or ∪ items)."""
        h_TS, vectors_NS = self._head_hidden(x_TD), self._item_vectors()
        if self.clusters is not None:
            head = self._two_level(vectors_NS)
            others = softmax.Segment(h_TS, head.centroids_CD, head.centroid_bias_C)
        else:
            others = softmax.item_segment(h_TS, vectors_NS, self.item_bias_N[...])
        chunk = self.llama.compute.chunk_elements
        return softmax.cross_entropy([self._words(x_TD), others], tokens_T, weights_T, chunk_elements=chunk)

    def _words(self, x_TD: Array) -> softmax.Segment:
        return softmax.Segment(x_TD, self.llama.output_table())

    def _head_hidden(self, x_TD: Array) -> Array:
        return x_TD if self.output_adapter is None else self.output_adapter(x_TD)

    def _item_vectors(self) -> Array:
        """What hidden states of the head meet: item vectors [N + 1, S], through the shared MLP where it is tied."""
        table_NE = self.items.table()
        return table_NE if self.output_adapter is not None else self.input_adapter(table_NE)

    def _two_level(self, vectors_NS: Array) -> hierarchical_softmax.TwoLevelParams:
        assert self.cluster_vectors_CE is not None and self.cluster_bias_C is not None
        centroids = self.cluster_vectors_CE[...]
        if self.output_adapter is None:
            centroids = self.input_adapter(centroids)
        return hierarchical_softmax.TwoLevelParams(
            centroids, self.cluster_bias_C[...], vectors_NS, self.item_bias_N[...]
        )

    def _clusters(self) -> Clusters:
        assert self.clusters is not None
        return Clusters(**{name: buffer[...] for name, buffer in self.clusters.items()})


def _check_ids(name: str, ids: Array, largest: int) -> None:
    """Refuses ids outside 0 … largest; a gather would take another row without a word."""
    if isinstance(ids, jax.core.Tracer) or ids.size == 0:
        return
    known = np.asarray(ids)  # not jnp: inside a trace it would trace, known ids or not
    low, high = int(known.min()), int(known.max())
    if low < 0 or high > largest:
        raise ValueError(f"{name}: ids {low} … {high}, expected 0 … {largest}")


def _shift(x_BT: Array) -> Array:
    """What stands at the next position; zero (False) after the last."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def _flat(x_BTD: Array) -> Array:
    return x_BTD.reshape(-1, x_BTD.shape[-1])
