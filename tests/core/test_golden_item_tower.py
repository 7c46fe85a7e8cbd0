"""The Llama as HLLM's item tower: a learnable slot after the text, read after the final norm, without the LM head."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.llama_loader import LlamaLoader


def test_golden_item_tower(golden: Path) -> None:
    folder = golden / "hllm_item_tower"
    expected = np.load(folder / "expected.npz", allow_pickle=False)
    model, params, _ = LlamaLoader(path=folder).load_model()
    llama = nnx.merge(model.graphdef, params)
    lengths_B = expected["lengths"]
    batch, longest = len(lengths_B), int(lengths_B.max())
    valid_BT = np.arange(longest) < lengths_B[:, None]
    # Padding is 1, a token like others: right-padded, it must not matter.
    tokens_BT = np.ones((batch, longest + 1), np.int32)
    tokens_BT[:, :-1][valid_BT] = expected["tokens"]
    rows_B = np.arange(batch)
    x_BTD = llama.embed(tokens_BT).at[rows_B, lengths_B].set(jnp.asarray(expected["slot"]))
    items_BD = np.asarray(llama.hidden(x_BTD))[rows_B, lengths_B]
    difference = np.abs(items_BD - expected["embeddings"]).max() / np.abs(expected["embeddings"]).max()
    assert difference <= 1e-4
    assert items_BD.shape == expected["embeddings"].shape
