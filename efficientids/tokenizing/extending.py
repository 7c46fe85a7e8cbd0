"""Codes for new items without retraining: a frozen tokenizer meets a data set that has grown.

Legend: N items of the data set (1 … N), L levels with the suffix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from core.code_use import code_metrics
from core.suffixes import buckets, with_suffix
from efficientids.data.dataset import Dataset
from efficientids.errors import UserError
from efficientids.tokenizing.tokenizer import Tokenizer, external_ids, with_padding
from efficientids.tokenizing.vectors import ItemVectors

AGREEMENT = 0.5
"""Of the items that a tokenizer knows, the share that must get their first code again by the vectors given: vectors of
another run or another Llama are of another space, where the share is about 1 / codes."""


def extended(known: Tokenizer, dataset: Dataset, vectors: ItemVectors, say: Callable[[str], None]) -> Tokenizer:
    """A tokenizer of `dataset`: items that `known` has keep their codes, the others get theirs from `vectors`.

    Items are the same where their external ids are. Suffixes of new items go on behind those of the items that
    `known` has, whether the data set still has these or not: no code that was given names another item.

    Args:
        known: opened from its folder.
        vectors: of the data set's items, made as those of `known` were.

    Raises:
        UserError: imported codes, vectors of another kind, no item in common, or a full suffix level.
    """
    place = {item: row for row, item in enumerate(external_ids(known), start=1)}
    row_N = np.array([place.get(item, 0) for item in dataset.items["item_id"].to_list()])
    is_known_N = row_N > 0
    if not is_known_N.any():
        raise UserError(
            f"--tokenizer {known.path}: it knows none of the items of {dataset.path} (external ids are compared); "
            "tokenize anew without it"
        )
    real_NL = known.real_codes(vectors)
    agree = float((real_NL[is_known_N, 0] == known.codes_NL[row_N[is_known_N], 0]).mean())
    if agree < AGREEMENT:
        raise UserError(
            f"--vectors: of the items that --tokenizer {known.path} knows only {agree:.0%} would get their first code "
            "again, so these vectors are of another kind; make them from the same run or Llama (co-occurrence vectors "
            "of another data set never fit)"
        )
    codes_NL = known.codes_NL[row_N].copy()
    new_real_NL = real_NL[~is_known_N]
    codes_NL[~is_known_N] = np.concatenate([new_real_NL, _suffixes(known, new_real_NL)[:, None]], axis=1)
    say(
        f"{int(is_known_N.sum()):,} items keep their codes ({agree:.0%} would get their first code again), "
        f"{len(new_real_NL):,} are new"
    )
    assert known.standard is not None
    return dataclasses.replace(
        known,
        path=None,
        codes_NL=with_padding(codes_NL),
        vectors_NI=known.standard.apply(vectors),
        settings={**known.settings, "extends": known.version},
        metrics={
            **code_metrics(codes_NL[:, :-1], known.level_sizes[:-1]),
            "new_items": len(new_real_NL),
            "known_items_first_code_again": agree,
        },
    )


def _suffixes(known: Tokenizer, new_real_NL: np.ndarray) -> np.ndarray:
    """Suffixes of new items by their real codes: a running count behind the largest that is given already."""
    own_ML = known.codes_NL[1:]
    bucket = buckets(np.concatenate([own_ML[:, :-1], new_real_NL]))
    _, number = np.unique(bucket, return_inverse=True)
    next_of = np.zeros(number.max() + 1, np.int64)
    np.maximum.at(next_of, number[: len(own_ML)], own_ML[:, -1] + 1)
    suffix_N = next_of[number[len(own_ML) :]] + with_suffix(new_real_NL)[:, -1]
    size = known.level_sizes[-1]
    if suffix_N.max(initial=0) >= size:
        shared = new_real_NL[int(np.argmax(suffix_N))].tolist()
        raise UserError(
            f"--tokenizer {known.path}: {int(suffix_N.max()) + 1} items share the codes {shared} with the new ones, "
            f"but its suffix level has {size} codes; tokenize anew with a larger --suffix_size"
        )
    return suffix_N
