"""How well a catalogue's codes are used: what a tokenizer's log shows.

Legend: N items, L levels, K codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from core.suffixes import buckets


class CodeUse(NamedTuple):
    """A catalogue's codes by level, each float64 [L].

    Attributes:
        used: the fraction of a level's codes that some item has.
        perplexity: exp of the entropy (natural logarithm) of a level's codes, 1 … K: K when all are equally common.
        collisions: the fraction of items that share the codes up to this level with an earlier item; at the last level
            the collision rate of the whole codes, (N − distinct) / N.
    """

    used: np.ndarray
    perplexity: np.ndarray
    collisions: np.ndarray


def code_use(codes_NL: np.ndarray, level_sizes: Sequence[int]) -> CodeUse:
    """Measures codes int [N, L], N ≥ 1, without padding and without a suffix.

    Raises:
        ValueError: no item, another number of levels, or a code outside its level.
    """
    codes_NL = np.asarray(codes_NL)
    if codes_NL.ndim != 2 or not len(codes_NL) or codes_NL.shape[1] != len(level_sizes):
        raise ValueError(f"codes of shape {codes_NL.shape}: expected [N, {len(level_sizes)}], N ≥ 1")
    used, perplexity, collisions = [], [], []
    for level, size in enumerate(level_sizes):
        code_N = codes_NL[:, level]
        if code_N.min() < 0 or code_N.max() >= size:
            raise ValueError(f"codes {code_N.min()} to {code_N.max()} at level {level}: expected 0 to {size - 1}")
        counts_K = np.bincount(code_N, minlength=size)
        p = counts_K[counts_K > 0] / len(code_N)
        used.append(len(p) / size)
        perplexity.append(np.exp(-np.sum(p * np.log(p))))
        collisions.append(1 - len(np.unique(buckets(codes_NL[:, : level + 1]))) / len(code_N))
    return CodeUse(np.array(used), np.array(perplexity), np.array(collisions))


def code_metrics(codes_NL: np.ndarray, level_sizes: Sequence[int]) -> dict[str, Any]:
    """How real codes are used, by level, and how many items share the most common ones; plain values.

    Raises:
        ValueError: what `code_use` refuses.
    """
    use = code_use(codes_NL, level_sizes)
    _, sizes = np.unique(buckets(codes_NL), return_counts=True)
    return {
        "items": len(codes_NL),
        "distinct": len(sizes),
        "largest_bucket": int(sizes.max()),
        **{name: value.tolist() for name, value in use._asdict().items()},
    }
