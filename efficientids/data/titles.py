"""Item titles as token ids, for sequences with text between the items.

Legend: N items, K tokens kept of a title.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from efficientids.errors import UserError


def title_table(
    titles: Sequence[str | None], tokenizer: Path, max_tokens: int, vocab_size: int
) -> tuple[np.ndarray, int]:
    """Tokenises titles.

    Args:
        titles: of items 1 … N, in order; None or empty: no text behind this item.
        tokenizer: tokenizer.json, with tokenizer_config.json beside it (it names the BOS token).
        max_tokens: K; longer titles are cut.
        vocab_size: of the Llama that will read them.

    Returns:
        int32 [N + 1, K], −1 behind a title's end and in all of row 0; and the BOS token's id.

    Raises:
        UserError: a file is missing or not a tokenizer, or a token id is beyond the Llama's vocabulary.
    """
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises a bare Exception for a missing or malformed file
        raise UserError(f"--tokenizer {tokenizer} cannot be read: {error}") from error
    bos = _bos(encoder, tokenizer)
    table = np.full((len(titles) + 1, max_tokens), -1, np.int32)
    encoded = encoder.encode_batch([title or "" for title in titles], add_special_tokens=False)
    for row, encoding in zip(table[1:], encoded, strict=True):
        ids = encoding.ids[:max_tokens]
        row[: len(ids)] = ids
    largest = max(int(np.max(table)), bos)
    if largest >= vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer}: token id {largest}, the Llama's vocabulary has {vocab_size}; "
            "use the tokenizer that belongs to the weights"
        )
    return table, bos


def _bos(encoder: Tokenizer, tokenizer: Path) -> int:
    file = tokenizer.with_name("tokenizer_config.json")
    try:
        named = json.loads(file.read_text())["bos_token"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: no bos_token to start a sequence with ({error})") from error
    text = named["content"] if isinstance(named, dict) else named
    bos = encoder.token_to_id(text) if isinstance(text, str) else None
    if bos is None:
        raise UserError(f"{file}: bos_token {named!r} is not in {tokenizer}")
    return bos
