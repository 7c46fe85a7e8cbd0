"""The level behind an item's real codes: a running count that tells items with equal codes apart.

Host NumPy: millions of items without a loop over them.

Legend: N items, L real levels.
"""

from __future__ import annotations

import numpy as np


def with_suffix(codes_NL: np.ndarray, suffix_size: int | None = None) -> np.ndarray:
    """Codes with one more level: how many earlier items have the same L codes. Rows are then distinct.

    Rows are items in index order, without the padding item. Because the count looks only at earlier rows, items
    appended later change no code that was given before. The largest count + 1 is the smallest suffix level that holds
    them.

    Args:
      codes_NL: int [N, L], L ≥ 1, each ≥ 0.
      suffix_size: codes of the suffix level, 0 … suffix_size − 1; None: as many as are needed.

    Returns:
      int32 [N, L + 1].

    Raises:
      ValueError: not such an array, or more items with equal codes than the suffix level has codes.
    """
    codes = np.asarray(codes_NL)
    if codes.ndim != 2 or codes.shape[1] == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"semantic IDs: expected whole numbers of shape [N, L], L ≥ 1; found {codes.dtype} {codes.shape}"
        )
    if codes.size and codes.min() < 0:
        row, level = np.argwhere(codes < 0)[0]
        raise ValueError(f"semantic IDs: row {row} has code {codes[row, level]} at level {level}; codes start at 0")
    bucket_N = buckets(codes)
    order = np.argsort(bucket_N, kind="stable")
    begins = np.empty(len(order), bool)
    begins[:1], begins[1:] = True, np.diff(bucket_N[order]) != 0
    starts = np.flatnonzero(begins)
    suffix = np.empty(len(order), np.int32)
    suffix[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    largest = int(suffix.max(initial=-1)) + 1
    if suffix_size is not None and largest > suffix_size:
        shared = codes[int(np.argmax(suffix))].tolist()
        raise ValueError(
            f"semantic IDs: {largest} items share the codes {shared}, but the suffix level has {suffix_size} codes;"
            f" give it at least {largest}"
        )
    return np.concatenate([codes.astype(np.int32), suffix[:, None]], axis=1)


def buckets(codes_NL: np.ndarray) -> np.ndarray:
    """int64 [N]: equal numbers for equal rows of codes int [N, L] (each ≥ 0), and only for those."""
    key_N, span = np.zeros(len(codes_NL), np.int64), 1
    for codes_N in np.asarray(codes_NL).T:
        size = int(codes_N.max(initial=0)) + 1
        if span * size > np.iinfo(np.int64).max:
            # Many levels: number the prefixes that occur, at most N.
            _, key_N = np.unique(key_N, return_inverse=True)
            span = len(key_N)
        key_N, span = key_N * size + codes_N, span * size
    return key_N
