"""The two-level softmax: which cluster, then which of its items. Loss, exact probabilities, exact top-k.

    log p(i | h) = [h·K_c + a_c − logΣ_c' exp(h·K_c' + a_c')] + [h·e_i + b_i − logΣ_{j∈c} exp(h·e_j + b_j)],  c = c(i)

(arXiv 2509.03746.) The loss costs D·(C + M) products a position instead of D·N.

Legend: T positions, B rows to rank, N items (1 … N; 0 is padding), C clusters, M members of the largest cluster,
D width, V words, G blocks of R positions, k results, E exclusions. N1 stands for N + 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from core.chunked import chunk_rows, chunked_sum
from core.clustering import Clusters
from core.rows import sum_over_batch_shards
from core.softmax import Segment, cross_entropy, dot_f32, item_segment, joint_nll, segment_logits, top_k_of, weighted

Method = Literal["blocks", "padded", "ragged"]

DEFAULT_METHOD: Method = "blocks"
"""For every backend. Loss and gradients of both levels on 2 CPU cores, seconds, equal clusters, T = 12,800, D = 64:
N = 3,416, C = 59: blocks 0.016, padded 0.031, ragged 0.60. N = 100,000, C = 317: 0.16, 0.31, not run. Temporaries of
the gradient's program compiled for an RTX 5090, N = 100,000, C = 317, D = 384, bf16: 0.38, 0.30 and 10.8 GiB (XLA
expands `ragged_dot` over the groups). No method has been timed on a GPU."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoLevelParams:
    """Parameters, best in float32 (products take the hidden state's dtype).

    Attributes:
      centroids_CD: K.
      centroid_bias_C: a.
      items_N1D: e; row 0 is padding, never live: probability 0 and no gradient.
      item_bias_N1: b; entry 0 likewise.
    """

    centroids_CD: jax.Array
    centroid_bias_C: jax.Array
    items_N1D: jax.Array
    item_bias_N1: jax.Array


def loss(
    h_TD: jax.Array,
    params: TwoLevelParams,
    clusters: Clusters,
    targets_T: jax.Array,
    weights_T: jax.Array,
    *,
    method: Method = DEFAULT_METHOD,
    words: Segment | None = None,
    chunk_elements: int | None = None,
) -> jax.Array:
    """Σ_t weights_t · (−log p(target_t | h_t)), as a float32 scalar.

    With `words` the first level is one softmax over words ∪ clusters, so a target is a word or an item, and a word has
    the first level's term alone.

    Args:
      h_TD: hidden states [T, D], float32 or bfloat16.
      targets_T: int32 [T]: item ids 1 … N; with `words`, the index into words ∪ items as in `core.softmax` with the
        segments (words, items): a word's id, or V + the item's id.
      weights_T: float32 [T]. A position of weight 0 contributes nothing, whatever its target.
      method: how a position meets the members of its target's cluster; the results are equal.
        `blocks`: positions are sorted by cluster and cut into blocks of one cluster each: a few batched products.
        `padded`: each position gathers its cluster, M·D numbers. No sort: positions stay on their devices.
        `ragged`: positions sorted, one `jax.lax.ragged_dot`, T·M logits at once. On a CPU its cost grows with C.
      words: hidden states [T, ·], table [V, ·] and bias of the words.
      chunk_elements: see `core.chunked.chunk_rows`; bounds the temporaries of `blocks`, `padded` and the first level.

    Returns:
      Float32 scalar; infinite where a target of non-zero weight is no word and no item. The caller divides.

    Raises:
      ValueError: shapes that do not agree, or an unknown method.
    """
    _check(h_TD, params, clusters)
    tables = (params, clusters, None if words is None else (words.table_ND, words.bias_N, words.live_N))
    rows = (h_TD, targets_T, weights_T, None if words is None else words.h_TD)

    def local(tables: Any, rows: Any) -> jax.Array:
        params, clusters, word_table = tables
        h_TD, targets_T, weights_T, word_h_TD = rows
        words = None if word_table is None else Segment(word_h_TD, *word_table)
        return _loss(h_TD, params, clusters, targets_T, weights_T, method, words, chunk_elements)

    return sum_over_batch_shards(local, tables, rows)


def _loss(
    h_TD: jax.Array,
    params: TwoLevelParams,
    clusters: Clusters,
    targets_T: jax.Array,
    weights_T: jax.Array,
    method: Method,
    words: Segment | None,
    chunk_elements: int | None,
) -> jax.Array:
    """`loss` of positions that one device has."""
    num_words = 0 if words is None else words.table_ND.shape[0]
    items_T = targets_T - num_words
    is_item_T = (items_T >= 1) & (items_T <= clusters.num_items)
    items_T = jnp.where(is_item_T, items_T, 0)
    cluster_T = clusters.cluster_of_item_N1[items_T]
    # Neither word nor item: −1, which the first level turns into an infinite loss.
    first_T = jnp.where(is_item_T, num_words + cluster_T, jnp.where(targets_T < num_words, targets_T, -1))
    first = [*([] if words is None else [words]), Segment(h_TD, params.centroids_CD, params.centroid_bias_C)]
    first_loss = cross_entropy(first, first_T, weights_T, chunk_elements=chunk_elements)
    positions = _Positions(
        h_TD,
        jnp.maximum(cluster_T, 0),
        clusters.slot_of_item_N1[items_T],
        jnp.where(is_item_T, weights_T, 0.0).astype(jnp.float32),
    )
    return first_loss + _within_clusters(positions, _by_cluster(params, clusters), method, chunk_elements)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Positions:
    """The second level's targets, [T], or blocks of one cluster each: cluster [G], the others [G, R]."""

    h: jax.Array
    cluster: jax.Array
    slot: jax.Array
    weight: jax.Array


_Members = tuple[jax.Array, jax.Array]
"""(vectors [C, M, D], biases [C, M]) of the items cluster by cluster; the bias of a padded slot is −inf."""


def _by_cluster(params: TwoLevelParams, clusters: Clusters) -> _Members:
    """Gathers the items once: taking whole clusters from this is far cheaper than taking T·M single rows."""
    members_CM = clusters.members_CM
    return params.items_N1D[members_CM], jnp.where(members_CM > 0, params.item_bias_N1[members_CM], -jnp.inf)


def _within_clusters(at: _Positions, members: _Members, method: Method, chunk_elements: int | None) -> jax.Array:
    """Σ weights·(−log p(i | c(i))) by the method named."""
    num_clusters, size, width = members[0].shape
    if method == "ragged":
        return _ragged_loss(at, members)
    if method == "blocks":
        block = block_rows(at.h.shape[0], num_clusters)
        blocks = _in_blocks(at, num_clusters, block)
    elif method == "padded":
        block = 1
        blocks = _Positions(at.h[:, None], at.cluster, at.slot[:, None], at.weight[:, None])
    else:
        raise ValueError(f"hierarchical_softmax: method is {method!r}; expected 'blocks', 'padded' or 'ragged'")
    return chunked_sum(_blocks_loss, members, blocks, chunk_size=chunk_rows(size * (width + block), chunk_elements))


def block_rows(positions: int, num_clusters: int) -> int:
    """R: a power of two near half the positions of an average cluster, 8 to 64.

    Larger blocks make better products, but each cluster fills its last block up with padding, half a block on average.
    """
    share = max(1, positions // (2 * num_clusters))
    return min(64, max(8, 1 << (share.bit_length() - 1)))


def _in_blocks(at: _Positions, num_clusters: int, block: int) -> _Positions:
    """Positions sorted by cluster and cut into G blocks of R of one cluster each; free places have weight 0.

    Positions of weight 0 are left out.
    """
    rows = at.h.shape[0]
    num_blocks = min(rows, rows // block + num_clusters)  # ≥ Σ_c ⌈n_c / R⌉ whatever the targets are
    cluster_T = jnp.where(at.weight != 0, at.cluster, num_clusters)
    order_T = jnp.argsort(cluster_T)
    count_C = jnp.bincount(cluster_T, length=num_clusters)  # drops the positions left out
    blocks_C = -(-count_C // block)
    last_block_C = jnp.cumsum(blocks_C)
    index_G = jnp.arange(num_blocks)
    cluster_G = jnp.minimum(jnp.searchsorted(last_block_C, index_G, side="right"), num_clusters - 1)
    rank_G = (index_G - (last_block_C - blocks_C)[cluster_G]) * block
    rank_GR = rank_G[:, None] + jnp.arange(block)
    start_C = jnp.cumsum(count_C) - count_C
    place_GR = order_T.at[start_C[cluster_G][:, None] + rank_GR].get(mode="clip")
    place_GR = jnp.where(rank_GR < count_C[cluster_G][:, None], place_GR, rows)  # out of range: read as 0

    def take(x: jax.Array) -> jax.Array:
        return x.at[place_GR].get(mode="fill", fill_value=0)

    return _Positions(take(at.h), cluster_G, take(at.slot), take(at.weight))


def _blocks_loss(members: _Members, blocks: _Positions) -> jax.Array:
    """Σ weights·(−log p(i | c)) of blocks of positions that share a cluster."""
    items_CMD, bias_CM = members
    logits_GRM = jax.vmap(dot_f32)(blocks.h, items_CMD[blocks.cluster]) + bias_CM[blocks.cluster][:, None, :]
    logits_PM = logits_GRM.reshape(-1, logits_GRM.shape[-1])
    return jnp.sum(weighted(blocks.weight.ravel(), joint_nll([logits_PM], blocks.slot.ravel())))


def _ragged_loss(at: _Positions, members: _Members) -> jax.Array:
    """The same with one grouped product over all positions."""
    items_CMD, bias_CM = members
    order_T = jnp.argsort(at.cluster)
    sorted_at = jax.tree.map(lambda x: x[order_T], at)
    counts_C = jnp.bincount(at.cluster, length=bias_CM.shape[0]).astype(jnp.int32)
    items_CDM = jnp.swapaxes(items_CMD, 1, 2).astype(at.h.dtype)
    logits_TM = jax.lax.ragged_dot(sorted_at.h, items_CDM, counts_C, preferred_element_type=jnp.float32)
    logits_TM += bias_CM[sorted_at.cluster]
    return jnp.sum(weighted(sorted_at.weight, joint_nll([logits_TM], sorted_at.slot)))


def log_probs(h_BD: jax.Array, params: TwoLevelParams, clusters: Clusters) -> jax.Array:
    """Exact log p(i | h), float32 [B, N + 1], normalised over the clusters; −inf at item 0.

    Raises:
      ValueError: shapes that do not agree.
    """
    _check(h_BD, params, clusters)
    return _log_probs(h_BD, params, clusters, _by_cluster(params, clusters))


def _log_probs(h_BD: jax.Array, params: TwoLevelParams, clusters: Clusters, members: _Members) -> jax.Array:
    items_CMD, bias_CM = members
    num_clusters, size, width = items_CMD.shape
    first_BC = segment_logits(Segment(h_BD, params.centroids_CD, params.centroid_bias_C))
    second = segment_logits(Segment(h_BD, items_CMD.reshape(-1, width), bias_CM.ravel()))
    second_BCM = jax.nn.log_softmax(second.reshape(-1, num_clusters, size), axis=-1)
    joint_BCM = jax.nn.log_softmax(first_BC, axis=-1)[:, :, None] + second_BCM
    column_N = clusters.cluster_of_item_N1[1:] * size + clusters.slot_of_item_N1[1:]
    items_BN = joint_BCM.reshape(-1, num_clusters * size)[:, column_N]
    return jnp.pad(items_BN, ((0, 0), (1, 0)), constant_values=-jnp.inf)


def top_k(
    h_BD: jax.Array,
    params: TwoLevelParams,
    clusters: Clusters,
    k: int,
    exclude_BE: jax.Array | None = None,
    *,
    chunk_elements: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k most probable items of each row by full scoring, in chunks of rows.

    Args:
      h_BD: hidden states [B, D]; float32 for an order that rounding does not blur.
      k: results a row; static.
      exclude_BE: int32 [B, E] item ids that must not be returned; 0 stands for none.
      chunk_elements: scores of a chunk of rows; see `core.chunked.chunk_rows`.

    Returns:
      (scores_Bk, ids_Bk): float32 log-probabilities over all items (excluding one does not renormalise), descending,
      ties by the smaller id; int32 ids. Where fewer than k items remain: id 0, −inf.

    Raises:
      ValueError: shapes that do not agree.
    """
    _check(h_BD, params, clusters)
    members = _by_cluster(params, clusters)
    chunk_size = chunk_rows(members[1].size + clusters.num_items, chunk_elements)
    return top_k_of(lambda h: _log_probs(h, params, clusters, members), h_BD, k, exclude_BE, chunk_size=chunk_size)


def raw_dot_scores(h_BD: jax.Array, params: TwoLevelParams) -> jax.Array:
    """h·e_i + b_i, float32 [B, N + 1], −inf at item 0: **a defective ranking, kept for the ablation only.**

    The seed document's port ranked by it. The loss does not determine it: one vector added to every item of a cluster
    leaves every probability as it was and reorders these scores. Rank with `top_k`.
    """
    return segment_logits(item_segment(h_BD, params.items_N1D, params.item_bias_N1))


def _check(h: jax.Array, params: TwoLevelParams, clusters: Clusters) -> None:
    """Refuses parameters and a clustering that are not of one catalogue."""
    num_clusters, num_items, width = clusters.num_clusters, clusters.num_items, h.shape[-1]
    wanted = {
        "centroids_CD": (num_clusters, width),
        "centroid_bias_C": (num_clusters,),
        "items_N1D": (num_items + 1, width),
        "item_bias_N1": (num_items + 1,),
    }
    for name, shape in wanted.items():
        found = getattr(params, name).shape
        if found != shape:
            raise ValueError(
                f"hierarchical_softmax: {name} has shape {found}; {num_clusters} clusters of {num_items} items and"
                f" hidden states of width {width} need {shape}"
            )
