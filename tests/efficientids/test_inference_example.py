"""The seed document's inference example, with its two stated changes: `load_run` restores, and item_ids is [B, T]."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import efficientids
from core.llama_loader import LlamaLoader
from efficientids.data.generated import generate
from efficientids.train import main
from tests.core.checkpoints import SMALL, tensors_of, write


@pytest.mark.slow
def test_the_seeds_inference_example(tmp_path: Path) -> None:
    weights = write(tmp_path / "llama", SMALL, tensors_of(SMALL))
    generate(num_users=30, num_items=40, shortest=5, longest=12).write(tmp_path / "data")
    run = tmp_path / "checkpoints_llama_frozen"
    flags = {"weights": weights, "data_dir": tmp_path / "data", "checkpoint_dir": run, "num_steps": 2, "batch_size": 4}
    assert main([*(f"--{name}={value}" for name, value in flags.items()), "--freeze_llama", "--seq_len=16"]) == 0

    # Load Llama
    llama_loader = LlamaLoader(path=weights)
    llama_model, llama_params, llama_config = llama_loader.load_model()

    # Load trained checkpoint
    model, params, config = efficientids.load_run(run, step=2)

    # Prepare input
    input_ids = jnp.array([[1, 23, 0, 0]])  # Text tokens
    item_ids = jnp.array([[0, 0, 10, 25]])  # Item IDs
    item_mask = jnp.array([[0, 0, 1, 1]])  # 1 = item position

    # Run inference
    outputs = model.apply(
        params,
        input_ids=input_ids,
        item_ids=item_ids,
        item_mask=item_mask,
        training=False,
        return_logits=True,
    )

    # Get predictions
    logits = outputs["logits"]  # [batch, num_items + 1], of the last position
    top_items = outputs.get("top_k_items", None)  # Top-K predictions

    assert llama_config == SMALL
    assert config.freeze_llama and config.num_steps == 2
    assert llama_model.apply(llama_params, input_ids=input_ids).shape == (1, 4, SMALL.vocab_size)
    assert logits.shape == (1, 41)
    np.testing.assert_array_equal(top_items[0], np.argsort(-np.asarray(logits[0]), kind="stable")[:10])
    # The parameters are complete: the frozen Llama came back from its weight file.
    np.testing.assert_array_equal(params["llama"]["embed_VD"][...], llama_params["embed_VD"][...])
