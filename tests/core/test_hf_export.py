"""Whole checkpoints and PEFT adapters of Llamas of every family: names, bytes, and logits by Hugging Face and PEFT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from core.config import TINY, LlamaConfig
from core.hf_export import Adapters, NotExportable, checkpoint_tensors, merged_tensors, state_tensors
from core.hf_names import in_files, places
from core.layers import Init
from core.llama import Llama
from core.llama_loader import LlamaLoader
from core.lora import TARGETS, LoRAConfig, adapters
from core.peft_export import peft_config, peft_merged, peft_tensors
from core.read_back import TOLERANCE, ReadBackError, compare, difference, logits, merged, merged_logits, probe, rounds
from core.weight_writing import write_tensors
from tests.core.checkpoints import assert_same, tensors_of, write

SMALL = dataclasses.replace(TINY, vocab_size=48, hidden_size=32, intermediate_size=40, num_heads=4, head_dim=8)
CONFIGS = {
    "llama, tied": SMALL,
    "llama, untied, grouped, biases": dataclasses.replace(
        SMALL, num_kv_heads=2, head_dim=10, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "mistral": dataclasses.replace(SMALL, tie_word_embeddings=False, sliding_window=64),
    "qwen2": dataclasses.replace(SMALL, num_kv_heads=2, attention_bias=True, attention_bias_on_o=False),
    "qwen3": dataclasses.replace(SMALL, num_kv_heads=2, head_dim=16, qk_norm=True),
}
BAICHUAN = dataclasses.replace(SMALL, num_kv_heads=4, tie_word_embeddings=False, normalised_head=True)
SMALL = dataclasses.replace(SMALL, num_kv_heads=4)
CONFIGS["llama, tied"] = SMALL
LORA = LoRAConfig(rank=3, alpha=8.0, targets=TARGETS)


def checkpoint(folder: Path, config: LlamaConfig, dtype: Any = np.float32) -> Path:
    """A random base as files."""
    tensors = {name: (0.3 * tensor).astype(dtype) for name, tensor in tensors_of(config).items()}
    files = in_files(config)
    fused = {file: np.concatenate([tensors[part] for part in parts]) for file, parts in files.items()}
    return write(folder, config, fused)


def trained(config: LlamaConfig, lora: LoRAConfig = LORA) -> Adapters:
    """Adapters as they are after training: B is not zero."""
    llama = Llama(config, jax.random.key(0), init=Init(lora=lora))
    for number, adapter in enumerate(adapters(llama).values()):
        adapter.b[...] = 0.3 * jax.random.normal(jax.random.key(number), adapter.b[...].shape)
    found = Adapters.of(llama)
    assert found is not None
    return found


def whole(base: Path, folder: Path, config: LlamaConfig, added: Adapters | None, dtype: Any = None) -> Path:
    """The merged checkpoint."""
    folder.mkdir()
    write_tensors(folder, merged_tensors(checkpoint_tensors(base, config), config, added, dtype))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def by_hugging_face(folder: Path, config: LlamaConfig, adapter: Path | None = None) -> np.ndarray:
    """The logits of `core.read_back.probe`, in float32."""
    torch = pytest.importorskip("torch", reason="Hugging Face's Llama needs torch (requirements-torch.txt)")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(probe(config)).long()).logits.numpy()


@pytest.mark.parametrize("config", [*CONFIGS.values(), BAICHUAN], ids=[*CONFIGS, "baichuan"])
def test_without_adapters_files_and_states_give_the_same_bytes(tmp_path: Path, config: LlamaConfig) -> None:
    base = checkpoint(tmp_path / "base", config, ml_dtypes.bfloat16)
    params = LlamaLoader(path=base).load_model()[1]
    original = load_file(base / "model.safetensors")
    assert (config.tie_word_embeddings) == ("lm_head.weight" not in original)
    for tensors in (checkpoint_tensors(base, config), state_tensors(params, config)):
        found = merged_tensors(tensors, config, None, None)
        assert found.keys() == original.keys()
        for name, tensor in found.items():
            array = tensor.read()
            assert array.dtype == tensor.dtype == original[name].dtype and array.shape == tensor.shape
            np.testing.assert_array_equal(array, original[name], err_msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_hugging_face_and_peft_agree_with_us(tmp_path: Path, config: LlamaConfig) -> None:
    base, added = checkpoint(tmp_path / "base", config), trained(config)
    params = LlamaLoader(path=base).load_model()[1]
    ours, plain = logits(params, config, added), logits(params, config)
    assert np.abs(ours - plain).max() > 0.1 * np.abs(plain).max()  # the adapters matter
    merged = whole(base, tmp_path / "merged", config, added)
    from_state = merged_tensors(state_tensors(params, config), config, added, None)
    for name, array in load_file(merged / "model.safetensors").items():
        np.testing.assert_array_equal(from_state[name].read(), array)
    compare(logits(LlamaLoader(path=merged).load_model()[1], config), ours)
    compare(by_hugging_face(merged, config), ours)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_tensors(adapter, peft_tensors(config, added), stem="adapter_model")
    (adapter / "adapter_config.json").write_text(json.dumps(peft_config(config, added, str(base), None)))
    compare(by_hugging_face(base, config, adapter), ours)


def test_the_keys_and_shapes_are_those_that_peft_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PEFT needs torch (requirements-torch.txt)")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    added = trained(SMALL, LoRAConfig(3, 8.0, ("q", "down")))
    settings = peft_config(SMALL, added, "base", None)
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (3, 8, ["down_proj", "q_proj"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL.to_hf()))
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    ours = {name: tensor.shape for name, tensor in peft_tensors(SMALL, added).items()}
    assert ours == {name: array.shape for name, array in theirs.items()}
    assert ours["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (3, 40)
    assert settings.items() >= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}.items()
    assert torch is not None


def test_the_sum_is_made_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base, added = checkpoint(tmp_path / "base", SMALL, ml_dtypes.bfloat16), trained(SMALL)
    tensors = checkpoint_tensors(base, SMALL)
    name = "model.layers.1.mlp.gate_proj.weight"
    a, b = (np.asarray(x[1], np.float64) for x in added.pairs[("layers", "mlp", "gate", "weight")])
    exact = tensors[name].read().astype(np.float64) + (8 / 3) * (a @ b).T
    for dtype, half_a_step in ((None, 2.0**-8), (np.float32, 2.0**-24), (np.float16, 2.0**-11)):
        found = merged_tensors(tensors, SMALL, added, None if dtype is None else np.dtype(dtype))[name].read()
        assert found.dtype == (ml_dtypes.bfloat16 if dtype is None else dtype)
        np.testing.assert_allclose(found.astype(np.float64), exact, rtol=half_a_step, atol=1e-6)


def merged_params(params: nnx.State, added: Adapters, dtype: np.dtype[Any] | None) -> nnx.State:
    """Every layer's `core.read_back.merged`, stacked."""

    def whole_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
        if path[0] != "layers":
            return leaf.replace(merged(added, dtype, path, leaf[...], None))
        return leaf.replace(jnp.stack([merged(added, dtype, path, row, i) for i, row in enumerate(leaf[...])]))

    return nnx.from_flat_state([(path, whole_leaf(path, leaf)) for path, leaf in nnx.to_flat_state(params)])


@pytest.mark.parametrize("dtype", [None, np.float16, np.float32])
def test_rounded_checkpoints_are_exactly_the_rounded_sums(tmp_path: Path, dtype: Any) -> None:
    base, added = checkpoint(tmp_path / "base", SMALL, ml_dtypes.bfloat16), trained(SMALL)
    target = None if dtype is None else np.dtype(dtype)
    folder = whole(base, tmp_path / "merged", SMALL, added, target)
    params = LlamaLoader(path=base).load_model()[1]
    read = LlamaLoader(path=folder).load_model()[1]
    assert_same(read, merged_params(params, added, target))
    compare(logits(read, SMALL), merged_logits(params, SMALL, added, target))
    error = difference(logits(read, SMALL), logits(params, SMALL, added))
    assert rounds(checkpoint_tensors(base, SMALL), SMALL, added, target) == (dtype is not np.float32)
    assert (error <= TOLERANCE) == (dtype is np.float32)


def test_what_loses_digits(tmp_path: Path) -> None:
    base, added = checkpoint(tmp_path / "base", SMALL, ml_dtypes.bfloat16), trained(SMALL)
    tensors = checkpoint_tensors(base, SMALL)
    assert not rounds(tensors, SMALL, None, None) and not rounds(tensors, SMALL, None, np.dtype(np.float32))
    assert rounds(tensors, SMALL, None, np.dtype(np.float16)) and rounds(tensors, SMALL, added, None)


def test_peft_takes_no_adapters_of_parts_of_a_map(tmp_path: Path) -> None:
    with pytest.raises(NotExportable, match=r"q, k and v .* one map of the base's files \(W_pack\)"):
        peft_tensors(BAICHUAN, trained(BAICHUAN))
    others = trained(BAICHUAN, LoRAConfig(3, 8.0, ("o", "down")))
    assert len(peft_tensors(BAICHUAN, others)) == 2 * 2 * BAICHUAN.num_layers
    # Merged, they go into their part of the fused tensor.
    base, added = checkpoint(tmp_path / "base", BAICHUAN), trained(BAICHUAN)
    params = LlamaLoader(path=base).load_model()[1]
    merged = whole(base, tmp_path / "merged", BAICHUAN, added)
    ours = {**BAICHUAN.to_hf(), "architectures": ["BaichuanForCausalLM"]}
    (merged / "config.json").write_text(json.dumps(ours))
    compare(logits(LlamaLoader(path=merged).load_model()[1], BAICHUAN), logits(params, BAICHUAN, added))


def test_quantised_weights_are_not_merged() -> None:
    params = nnx.state(Llama(SMALL, jax.random.key(0), init=Init(quantize="nf4")))
    with pytest.raises(NotExportable, match="held quantised"):
        state_tensors(params, SMALL)


def test_a_spoiled_adapter_does_not_read_back(tmp_path: Path) -> None:
    base, added = checkpoint(tmp_path / "base", SMALL), trained(SMALL)
    params = LlamaLoader(path=base).load_model()[1]
    settings, expected = peft_config(SMALL, added, "base", None), logits(params, SMALL, added)
    tensors = {name: tensor.read() for name, tensor in peft_tensors(SMALL, added).items()}
    compare(logits(peft_merged(params, SMALL, tensors, settings), SMALL), expected)
    assert_same(peft_merged(params, SMALL, {}, settings), params)
    with pytest.raises(
        ReadBackError, match=r"the logits differ from the model's by .* of the largest; at most 1e-04 is"
    ):
        compare(logits(peft_merged(params, SMALL, tensors, {**settings, "r": 4}), SMALL), expected)
    unprefixed = {name.removeprefix("base_model.model."): array for name, array in tensors.items()}
    with pytest.raises(ReadBackError, match="adapters of no map"):
        peft_merged(params, SMALL, unprefixed, settings)
    name = next(name for name in tensors if "lora_B" in name)
    with pytest.raises(ReadBackError, match="lora_A without lora_B"):
        peft_merged(params, SMALL, {key: value for key, value in tensors.items() if key != name}, settings)
    with pytest.raises(ReadBackError):
        compare(np.full((2, 3), jnp.nan), np.ones((2, 3)))


def test_other_tensors_beside_are_left_alone(tmp_path: Path) -> None:
    """Old checkpoints hold buffers that follow from the config."""
    base = checkpoint(tmp_path, SMALL)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file({**load_file(base / "model.safetensors"), **more}, base / "model.safetensors")
    assert checkpoint_tensors(base, SMALL).keys() == places(SMALL).keys()
