"""Semantic IDs that others made: one JSON object {item id: ["<a_12>", "<b_0>", …]}, as LETTER and MiniOneRec publish.

Legend: N items (1 … N), L real levels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from core.suffixes import buckets
from efficientids.data.dataset import Dataset
from efficientids.data.sources.item_table import counted_from_one
from efficientids.errors import UserError
from efficientids.tokenizing.making import suffixed
from efficientids.tokenizing.tokenizer import Tokenizer

_TOKEN = re.compile(r"<([A-Za-z]+)_(\d+)>")
_LARGEST_ALPHABET = 2**20
"""Codes of a level at most: its table, rows of floats, is as long as the largest code, stray or not."""


def import_codes(
    file: Path,
    dataset: Dataset,
    levels: tuple[int, ...] | None,
    suffix_size: int | None,
    offset: int | None,
    say: Callable[[str], None],
) -> Tokenizer:
    """A tokenizer of given codes, with a suffix level behind them.

    Args:
        levels: codes of each level; None: one more than the largest in the file.
        suffix_size: None: the largest bucket, rounded up to a power of two.
        offset: added to the file's ids to get the data set's; None: 1 where the file counts from 0 and the data set
            from 1, else 0.
        say: told what of the file is not used, and of a chosen offset.

    Raises:
        UserError: no such file or another form, ids that are no numbers with an offset, items of the data set without
            codes, codes outside `levels` or of alphabets beyond `_LARGEST_ALPHABET`, or more items with equal codes
            than the suffix level has codes.
    """
    given = _read(file)
    shift = _offset(file, given, dataset, say) if offset is None else offset
    rows = {_shifted(file, name, shift): tokens for name, tokens in given.items()} if shift else given
    wanted = dataset.items["item_id"].to_list()
    lacking = [item for item in wanted if item not in rows]
    if lacking:
        raise UserError(
            f"--import_codes {file}: {len(lacking):,} of {len(wanted):,} items of {dataset.path} have no codes, first "
            f"{', '.join(lacking[:5])}; give codes for all (--item_id_offset n, if ids are only counted otherwise)"
        )
    if len(rows) > len(wanted):
        say(f"{file.name}: {len(rows) - len(wanted):,} items are not in {dataset.path}; their codes are not used")
    codes_NL = _codes(file, {item: rows[item] for item in wanted})
    sizes = tuple(int(size) for size in codes_NL.max(axis=0) + 1) if levels is None else levels
    _check_alphabets(file, codes_NL, sizes, wanted)
    largest = int(np.unique(buckets(codes_NL), return_counts=True)[1].max())
    size = 1 << (largest - 1).bit_length() if suffix_size is None else suffix_size
    table, metrics = suffixed(codes_NL, sizes, size)
    settings = {"file": file.name, "item_id_offset": shift, "levels": list(sizes), "suffix_size": size}
    return Tokenizer(None, "imported", table, (*sizes, size), settings=settings, metrics=metrics)


def _read(file: Path) -> dict[str, list[str]]:
    try:
        given = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--import_codes {file}: not a readable JSON file ({error})") from error
    if not isinstance(given, dict) or not given or not all(isinstance(tokens, list) for tokens in given.values()):
        raise UserError(
            f'--import_codes {file}: expected one JSON object {{item id: ["<a_12>", "<b_0>", …]}}; found '
            f"{type(given).__name__}"
        )
    return given


def _offset(file: Path, given: dict[str, Any], dataset: Dataset, say: Callable[[str], None]) -> int:
    """1 where the file has exactly 0 … N − 1 and the data set exactly 1 … N, else 0."""
    names = pl.Series(list(given), dtype=pl.String).cast(pl.Int64, strict=False).sort()
    if names.null_count() or not np.array_equal(names.to_numpy(), np.arange(len(names))):
        return 0
    if not counted_from_one([dataset.items["item_id"]], len(names), file):
        return 0
    say(f"{file.name} counts items from 0, {dataset.path} from 1: 1 is added to its ids (--item_id_offset)")
    return 1


def _shifted(file: Path, name: str, shift: int) -> str:
    try:
        return str(int(name) + shift)
    except ValueError as error:
        raise UserError(
            f"--item_id_offset {shift}: item {name!r} of --import_codes {file} is no whole number to add to; leave "
            "--item_id_offset out"
        ) from error


def _codes(file: Path, rows: dict[str, list[str]]) -> np.ndarray:
    """int64 [N, L] of tokens such as "<b_7>", whose letters tell the levels."""
    codes: list[list[int]] = []
    letters: list[str] = []
    for item, tokens in rows.items():
        found = [_TOKEN.fullmatch(token) if isinstance(token, str) else None for token in tokens]
        here = [match[1] for match in found if match is not None]
        letters = letters or here
        if len(here) < len(tokens) or here != letters or not here:
            expected = " ".join(f"<{letter}_…>" for letter in letters or ["a", "b"])
            raise UserError(f"--import_codes {file}: item {item} has {json.dumps(tokens)}; expected {expected}")
        for level, match in enumerate(found):
            if match is not None and (len(match[2]) > 9 or int(match[2]) >= _LARGEST_ALPHABET):
                raise UserError(
                    f"--import_codes {file}: item {item} has {match[0]} at level {level}; codes are below "
                    f"{_LARGEST_ALPHABET:,}: correct it, or number the level's codes anew from 0 on"
                )
        codes.append([int(match[2]) for match in found if match is not None])
    return np.array(codes, np.int64)


def _check_alphabets(file: Path, codes_NL: np.ndarray, sizes: tuple[int, ...], items: list[str]) -> None:
    if len(sizes) != codes_NL.shape[1]:
        raise UserError(
            f"--levels {','.join(map(str, sizes))}: {len(sizes)} levels, but items of --import_codes {file} have "
            f"{codes_NL.shape[1]} codes; give a size for each"
        )
    if max(sizes) > _LARGEST_ALPHABET:
        raise UserError(f"--levels {','.join(map(str, sizes))}: give at most {_LARGEST_ALPHABET:,} codes a level")
    outside = np.argwhere(codes_NL >= np.array(sizes))
    if len(outside):
        row, level = outside[0]
        raise UserError(
            f"--import_codes {file}: item {items[row]} has code {codes_NL[row, level]} at level {level}, whose "
            f"alphabet is 0 … {sizes[level] - 1}; give larger --levels, or leave them out"
        )
