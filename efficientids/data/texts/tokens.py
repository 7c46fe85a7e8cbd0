"""Items' texts as token ids, for sequences with text between the items.

Legend: N items, K tokens kept of a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from efficientids.data.texts.cache import tokenised
from efficientids.data.texts.templates import Template
from efficientids.errors import UserError

# Items at a time: their texts are never all in memory.
_CHUNK = 65_536


def title_table(
    items: pl.DataFrame, template: Template, tokenizer: Path, max_tokens: int, vocab_size: int, source: str = "items"
) -> tuple[np.ndarray, int]:
    """Tokenises the texts that a template makes of items; what was tokenised once comes from `token_cache`.

    Args:
        items: one row an item, 1 … N in order.
        template: which columns make the text; an item without one has nothing behind it.
        tokenizer: tokenizer.json, with tokenizer_config.json beside it (it names the BOS token).
        max_tokens: K; longer texts are cut.
        vocab_size: of the Llama that will read them.
        source: names the table in errors.

    Returns:
        int32 [N + 1, K], −1 behind a text's end and in all of row 0; and the BOS token's id.

    Raises:
        UserError: a column is missing, a file is missing or not a tokenizer, or a token id is beyond the Llama's
            vocabulary.
    """
    template.check(items, source)
    encoder = open_tokenizer(tokenizer)
    # Settings of the file for another use: here texts are cut and padded by us, and "</s>" in a title is just text.
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    bos = start_token(encoder, tokenizer)

    def texts() -> Iterator[pl.Series]:
        return (template.render(chunk) for chunk in items.select(template.columns).iter_slices(_CHUNK))

    tokens, offsets = tokenised(texts, len(items), tokenizer, encoder)
    table = _table(tokens, offsets, max_tokens)
    check_vocabulary(tokenizer, max(int(np.max(table)), bos), vocab_size)
    return table, bos


def open_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json. Raises UserError for a file that is missing or none."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for a missing or malformed file
        raise UserError(f"--tokenizer {file} cannot be read: {error}") from error


def check_vocabulary(tokenizer: Path, largest: int, vocab_size: int) -> None:
    """Refuses a tokenizer whose token id `largest` a Llama with `vocab_size` tokens does not have. Raises UserError."""
    if largest >= vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer}: token id {largest}, the Llama's vocabulary has {vocab_size}; "
            "use the tokenizer that belongs to the weights"
        )


def _table(tokens: np.ndarray, offsets: np.ndarray, max_tokens: int) -> np.ndarray:
    """The first `max_tokens` of each text: int32 [N + 1, K], −1 padded, row 0 empty."""
    num_texts, columns = len(offsets) - 1, np.arange(max_tokens)
    table = np.full((num_texts + 1, max_tokens), -1, np.int32)
    for first in range(0, num_texts, _CHUNK):
        start, end = offsets[first : first + _CHUNK], offsets[first + 1 : first + 1 + _CHUNK]
        start = start[: len(end)]
        inside = columns < (end - start)[:, None]
        table[1 + first : 1 + first + len(end)][inside] = tokens[(start[:, None] + columns)[inside]]
    return table


def start_token(encoder: Tokenizer, tokenizer: Path) -> int:
    """What a sequence starts with: the tokenizer's bos_token, or where it has none (Qwen) the model's bos_token_id."""
    file = tokenizer.with_name("tokenizer_config.json")
    try:
        named = json.loads(file.read_text())["bos_token"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: no bos_token to start a sequence with ({error})") from error
    if named is None:
        model = tokenizer.with_name("config.json")
        try:
            return int(json.loads(model.read_text())["bos_token_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} has no bos_token, and {model} no bos_token_id to start with ({error!r})"
            ) from error
    text = named["content"] if isinstance(named, dict) else named
    bos = encoder.token_to_id(text) if isinstance(text, str) else None
    if bos is None:
        raise UserError(f"{file}: bos_token {named!r} is not in {tokenizer}")
    return bos
