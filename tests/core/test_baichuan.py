"""Baichuan2-7B against a reference of its own, written from the published layout: its code is never run.

Names and shapes are those of the published `pytorch_model.bin.index.json` and `modeling_baichuan.py`
(baichuan-inc/Baichuan2-7B-Base): q, k and v stacked in one `W_pack`, rotary positions with theta 10,000, no biases, a
head whose rows are normalised.

Legend: B batch, T positions, D hidden, N heads, H head dim, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from core.config import ConfigError, LlamaConfig
from core.hf_names import in_files, places
from core.llama import KVCache, Llama
from core.llama_loader import CheckpointMismatch, LlamaLoader
from core.weight_files import SplitFile, open_weight_file
from tests.core.checkpoints import assert_same

# As Baichuan2-7B-Base has them, but for the sizes below.
PUBLISHED: dict[str, Any] = {
    "_from_model_config": True, "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_max_length": 4096, "model_type": "baichuan",
    "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False, "tokenizer_class": "BaichuanTokenizer", "torch_dtype": "bfloat16",
    "transformers_version": "4.29.2", "use_cache": True, "vocab_size": 125696, "z_loss_weight": 0,
}  # fmt: skip
SMALL = {
    **PUBLISHED, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "torch_dtype": "float32",
}  # fmt: skip
D, N, V, EPS = 64, 4, 96, 1e-6
W_PACK = "model.layers.{}.self_attn.W_pack.weight"
IDS_BT = np.random.default_rng(1).integers(0, V, (2, 120))


def random_tensors() -> dict[str, np.ndarray]:
    """By the published names; the head's rows of many lengths."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(3):
        shapes |= {
            W_PACK.format(i): (3 * D, D),
            f"model.layers.{i}.self_attn.o_proj.weight": (D, D),
            f"model.layers.{i}.mlp.gate_proj.weight": (80, D),
            f"model.layers.{i}.mlp.up_proj.weight": (80, D),
            f"model.layers.{i}.mlp.down_proj.weight": (D, 80),
            f"model.layers.{i}.input_layernorm.weight": (D,),
            f"model.layers.{i}.post_attention_layernorm.weight": (D,),
        }
    tensors = {name: (0.2 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor += 1
    tensors["lm_head.weight"] *= rng.lognormal(0, 2, (V, 1)).astype(np.float32)
    return tensors


def write(folder: Path, tensors: dict[str, np.ndarray], **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **changed}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def reference(weights: Any, ids_BT: Any) -> Any:
    """Logits float32 [B, T, V] by torch; `weights` by the published names."""
    import torch
    from torch.nn import functional as F

    def norm(x: Any, name: str) -> Any:
        return weights[name] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    b, t, h = *ids_BT.shape, D // N
    half_h = 1 / 10000 ** (torch.arange(0, h, 2).float() / h)
    angles_TH = torch.outer(torch.arange(t).float(), half_h).repeat(1, 2)

    def turn(x_BNTH: Any) -> Any:
        first, second = x_BNTH.chunk(2, dim=-1)
        return x_BNTH * angles_TH.cos() + torch.cat((-second, first), dim=-1) * angles_TH.sin()

    x_BTD = F.embedding(ids_BT, weights["model.embed_tokens.weight"])
    for i in range(3):
        layer = f"model.layers.{i}."
        packed_BTE = F.linear(norm(x_BTD, layer + "input_layernorm.weight"), weights[W_PACK.format(i)])
        q_BNTH, k_BNTH, v_BNTH = packed_BTE.view(b, t, 3, N, h).permute(2, 0, 3, 1, 4)
        scores_BNTT = turn(q_BNTH) @ turn(k_BNTH).transpose(2, 3) / h**0.5
        scores_BNTT = scores_BNTT.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        y_BTD = (scores_BNTT.softmax(-1) @ v_BNTH).transpose(1, 2).reshape(b, t, D)
        x_BTD = x_BTD + F.linear(y_BTD, weights[layer + "self_attn.o_proj.weight"])
        y_BTD = norm(x_BTD, layer + "post_attention_layernorm.weight")
        gate = F.silu(F.linear(y_BTD, weights[layer + "mlp.gate_proj.weight"]))
        up = F.linear(y_BTD, weights[layer + "mlp.up_proj.weight"])
        x_BTD = x_BTD + F.linear(gate * up, weights[layer + "mlp.down_proj.weight"])
    return F.linear(norm(x_BTD, "model.norm.weight"), F.normalize(weights["lm_head.weight"]))


def error(ours: Any, theirs: Any) -> float:
    """max|a − b| / max|b|."""
    a, b = np.asarray(ours), np.asarray(theirs)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="the reference needs torch (requirements-torch.txt)")


def test_logits_equal_the_reference_and_so_does_the_cache(tmp_path: Path, torch: Any) -> None:
    tensors = random_tensors()
    model, params, config = LlamaLoader(path=write(tmp_path, tensors)).load_model()
    assert config.normalised_head and not config.tie_word_embeddings
    theirs = reference({name: torch.from_numpy(t) for name, t in tensors.items()}, torch.from_numpy(IDS_BT)).numpy()
    assert error(jax.jit(lambda p: model.apply(p, input_ids=IDS_BT))(params), theirs) <= 1e-5
    llama: Llama = nnx.merge(model.graphdef, params)

    @jax.jit
    def step(ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        x_BTD, cache = llama.extend(llama.embed(ids), cache)
        return llama.logits(x_BTD), cache

    cache, found = llama.init_cache(2, 16), []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        logits, cache = step(IDS_BT[:, start:end], cache)
        found.append(logits)
    assert error(jnp.concatenate(found, axis=1), theirs[:, :12]) <= 1e-5


def test_gradients_equal_the_references(tmp_path: Path, torch: Any) -> None:
    """Through the normalised head, and of each part of W_pack: training normalises at each step."""
    tensors = random_tensors()
    model, params, config = LlamaLoader(path=write(tmp_path, tensors)).load_model()
    ids_BT = IDS_BT[:1, :60]
    weights = {name: torch.from_numpy(tensor).requires_grad_() for name, tensor in tensors.items()}
    logits_TV = reference(weights, torch.from_numpy(ids_BT))[0, :-1]
    torch.nn.functional.cross_entropy(logits_TV, torch.from_numpy(ids_BT[0, 1:])).backward()

    def loss(params: nnx.State) -> jax.Array:
        log_probs_TV = jax.nn.log_softmax(model.apply(params, input_ids=ids_BT)[0, :-1])
        return -jnp.take_along_axis(log_probs_TV, ids_BT[0, 1:, None], axis=-1).mean()

    ours = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(jax.jit(jax.grad(loss))(params))}
    for name, parts in in_files(config).items():
        found = np.concatenate([theirs_of(config, part, ours) for part in parts])
        assert error(found, weights[name].grad) <= 1e-3, name


def theirs_of(config: LlamaConfig, name: str, ours: dict[tuple[str, ...], np.ndarray]) -> np.ndarray:
    place = places(config)[name]
    return place.layout.to_hf(ours[place.path] if place.layer is None else ours[place.path][place.layer])


def test_files_and_parameters_go_both_ways(tmp_path: Path) -> None:
    tensors = random_tensors()
    _, params, config = LlamaLoader(path=write(tmp_path, tensors)).load_model()
    ours = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}
    assert in_files(config).keys() == tensors.keys()
    for name, parts in in_files(config).items():
        found = np.concatenate([theirs_of(config, part, ours) for part in parts])
        np.testing.assert_array_equal(found, tensors[name])
        assert sum(parts.values()) == len(tensors[name])


def test_bin_and_old_buffers(tmp_path: Path, torch: Any) -> None:
    """As it was published: `.bin`, with the rotary frequencies of each layer."""
    tensors = random_tensors()
    one = LlamaLoader(path=write(tmp_path / "one", tensors)).load_model()[1]
    write(tmp_path / "bin", tensors)
    (tmp_path / "bin" / "model.safetensors").unlink()
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    whole = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save({**old, **whole}, tmp_path / "bin" / "pytorch_model.bin")
    assert_same(one, LlamaLoader(path=tmp_path / "bin").load_model()[1])


def test_parts_are_rows_of_their_tensor_and_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors()
    config = LlamaConfig.from_hf(SMALL)
    inner = open_weight_file(write(tmp_path, tensors) / "model.safetensors")
    read, names = inner.read, []
    monkeypatch.setattr(inner, "read", lambda name, rows=slice(None): names.append((name, rows)) or read(name, rows))
    file = SplitFile(inner, in_files(config))
    assert file.headers.keys() == places(config).keys()
    packed = tensors[W_PACK.format(0)]
    for part, rows in (("q", packed[:D]), ("k", packed[D : 2 * D]), ("v", packed[2 * D :]), ("k", packed[D : 2 * D])):
        np.testing.assert_array_equal(file.read(f"{W_PACK.format(0)}[{part}]"), rows)
    np.testing.assert_array_equal(file.read("model.norm.weight"), tensors["model.norm.weight"])
    np.testing.assert_array_equal(file.read(f"{W_PACK.format(0)}[k]", slice(2, 5)), packed[D + 2 : D + 5])
    spans = [(rows.start, rows.stop) for name, rows in names if name == W_PACK.format(0)]
    assert spans == [(0, D), (D, 2 * D), (2 * D, 3 * D), (D, 2 * D), (D + 2, D + 5)]


def test_what_is_wrong_with_a_part_is_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[W_PACK.format(1)][D + 1, 0] = np.nan
    with pytest.raises(CheckpointMismatch, match=r"NaN or infinite as float32: .*layers\.1.*W_pack\.weight\[k\] in"):
        LlamaLoader(path=write(tmp_path, tensors)).load_model()
    tensors[W_PACK.format(1)] = tensors[W_PACK.format(1)][:-1]
    with pytest.raises(CheckpointMismatch) as mismatch:
        LlamaLoader(path=write(tmp_path, tensors)).load_model()
    assert str(mismatch.value).splitlines()[1:] == [
        *(f"  missing: {W_PACK.format(1)}[{part}] [64, 64]" for part in "kqv"),
        f"  extra: {W_PACK.format(1)} [191, 64]",
    ]


# The configuration


def test_the_published_configuration(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = LlamaConfig.from_hf(PUBLISHED)
    assert not caplog.records
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (125696, 4096, 1e-6)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10_000.0)
    count = sum(int(np.prod(place.layout.hf_shape)) for place in places(config).values())
    assert count == 7_505_973_248  # two tables of 515 million beside the layers: more than the name says
    written = config.to_hf("bfloat16")
    assert LlamaConfig.from_hf(written) == config
    assert {name: PUBLISHED.get(name) for name in written} == written


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_size": 5120, "num_attention_heads": 40}, ["hidden_size 5120", "ALiBi"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings None", "ALiBi"]),
        ({"vocab_size": 64000}, ["vocab_size 64000", "BaiChuanForCausalLM"]),
        ({"architectures": ["BaiChuanForCausalLM"]}, ["architectures ['BaiChuanForCausalLM']"]),
        ({"architectures": None}, ["architectures None", "BaiChuanForCausalLM"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings True"]),
        ({"rope_theta": 500_000.0}, ["rope_theta 500000.0"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling {'type': 'dynamic'"]),
        ({"num_key_value_heads": 8}, ["no architecture of Hugging Face's", "baichuan: 32 heads of 128, 8 of keys"]),
        ({"sliding_window": 2048}, ["sliding_window 2048"]),
    ],
)
def test_its_siblings_and_other_arithmetic_are_refused(changed: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        LlamaConfig.from_hf({**PUBLISHED, **changed})
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_13b_has_no_max_position_embeddings() -> None:
    published_13b = {name: value for name, value in PUBLISHED.items() if name != "max_position_embeddings"}
    with pytest.raises(ConfigError, match=r"max_position_embeddings missing \(.*ALiBi"):
        LlamaConfig.from_hf({**published_13b, "hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40})


def test_a_bare_llama_may_not_bring_code() -> None:
    with pytest.raises(ConfigError, match="auto_map"):
        LlamaConfig.from_hf({"model_type": "llama", "auto_map": PUBLISHED["auto_map"]})


def test_the_file_as_it_is_written_is_read_back(tmp_path: Path) -> None:
    """A checkpoint made from parameters alone loads to the same parameters."""
    tensors = random_tensors()
    _, params, config = LlamaLoader(path=write(tmp_path / "first", tensors)).load_model()
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    ours = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}
    fused = {
        name: np.concatenate([theirs_of(config, part, ours) for part in parts])
        for name, parts in in_files(config).items()
    }
    save_file(fused, folder / "model.safetensors")
    assert load_file(folder / "model.safetensors").keys() == tensors.keys()
    assert_same(params, LlamaLoader(path=folder).load_model()[1])
