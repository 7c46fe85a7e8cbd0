"""Items' texts through a pretrained Llama → vectors.

Legend: N items (1 … N), K tokens kept of a text, B texts a batch, T positions, D the Llama's width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.config import LlamaConfig
from core.functional import FunctionalModel
from core.llama_loader import LlamaLoader
from efficientids.data import layout
from efficientids.data.dataset import Dataset
from efficientids.data.texts import templates
from efficientids.data.texts.tokens import title_table
from efficientids.errors import UserError

Pooling = Literal["mean", "slot"]
_NARROWEST = 8  # positions


def text_vectors(
    dataset: Dataset,
    loader: LlamaLoader,
    *,
    template: str = "title",
    tokenizer: Path | None = None,
    max_tokens: int = 64,
    pooling: Pooling = "mean",
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Float32 [N + 1, D]: hidden states after the final norm over BOS and an item's text.

    "mean": the mean of the states at the text's tokens. Not BOS's: it has seen no text, and its state is of another
    size than all others. "slot": the state at the text's last token, which alone has seen all of it. An item without a
    text has zeros. Computed in bfloat16 on a GPU, else in float32; texts of about the same length go together.

    Args:
        template: as `--item_template`: a shipped one's name, a text with {column}, or a YAML file.
        tokenizer: tokenizer.json; None: the one beside the weights.
        max_tokens: K; longer texts are cut.
        progress: told (texts done, all).

    Raises:
        UserError: weights that are missing or start at random, no tokenizer, no such column.
    """
    folder, model, params, llama = _loaded(loader)
    table_NK, bos = title_table(
        dataset.items, templates.load(template), tokenizer or folder / "tokenizer.json", max_tokens, llama.vocab_size,
        source=str(dataset.path / layout.ITEMS),
    )  # fmt: skip

    @jax.jit
    def states(params: nnx.State, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        module = nnx.merge(model.graphdef, params)
        hidden_BTD = module.hidden(module.embed(tokens_BT)).astype(jnp.float32)
        return pooled(hidden_BTD, lengths_B, pooling)

    lengths_N = (table_NK >= 0).sum(axis=1)
    vectors_ND = np.zeros((len(table_NK), llama.hidden_size), np.float32)
    # The longest first: what does not fit into memory fails at once, and the time left is never underestimated.
    order = np.argsort(-lengths_N, kind="stable")[: int((lengths_N > 0).sum())]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = _width(int(lengths_N[rows[0]]), max_tokens)
        tokens_BT = np.zeros((batch_size, 1 + width), np.int32)
        tokens_BT[:, 0] = bos
        tokens_BT[: len(rows), 1:] = np.maximum(table_NK[rows, :width], 0)
        lengths_B = np.ones(batch_size, np.int32)
        lengths_B[: len(rows)] = lengths_N[rows]
        vectors_ND[rows] = np.asarray(states(params, tokens_BT, lengths_B))[: len(rows)]
        progress(start + len(rows), len(order))
    return vectors_ND


def _loaded(loader: LlamaLoader) -> tuple[Path, FunctionalModel, nnx.State, LlamaConfig]:
    """The weights' folder, the model, its parameters and its shape."""
    if loader.starts_at_random:
        raise UserError(
            f"--llama_size {loader.model_size}: it has no published weights, and what a random Llama says of titles is "
            "noise"
        )
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    try:
        return loader.folder(), *loader.load_model(param_dtype=dtype, dtype=dtype)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def pooled(hidden_BTD: jax.Array, lengths_B: jax.Array, pooling: Pooling) -> jax.Array:
    """States of BOS and texts of `lengths_B` ≥ 1 tokens, right-padded → [B, D]; see `text_vectors`."""
    if pooling == "slot":
        return jnp.take_along_axis(hidden_BTD, lengths_B[:, None, None], axis=1)[:, 0]
    place_T = jnp.arange(hidden_BTD.shape[1])
    of_text_BT = (place_T >= 1) & (place_T <= lengths_B[:, None])
    return jnp.sum(hidden_BTD * of_text_BT[..., None], axis=1) / lengths_B[:, None]


def _width(longest: int, most: int) -> int:
    """Positions for texts of so many tokens: few different widths, so few programs are compiled."""
    return min(most, max(_NARROWEST, 1 << (longest - 1).bit_length()))
