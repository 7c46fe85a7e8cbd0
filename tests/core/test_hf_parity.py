"""The Llama against Hugging Face's, in float32: logits, every layer's output, gradients, the KV cache; real weights.

Also as a Qwen2, a Qwen3 and a Mistral. Baichuan2 is no part of transformers: see test_baichuan.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from core.config import LLAMA_SIZES, LlamaConfig, RopeScaling
from core.functional import FunctionalModel
from core.hf_names import places
from core.layers import Init
from core.llama import Compute, Llama
from core.llama_loader import LlamaLoader, abstract_model
from core.rope import inverse_frequencies
from tests.core.checkpoints import tensors_of, write

BASE = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    tie_word_embeddings=True,
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
CASES: dict[str, dict[str, Any]] = {
    "n_rep 1": {"num_kv_heads": 4},
    "n_rep 2": {},
    "n_rep 4": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 24},
    "eps": {"rms_norm_eps": 1e-3},
    "theta": {"rope_theta": 50_000.0},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0), "max_position_embeddings": 256},
    "llama3": {"rope_scaling": LLAMA3},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "all": {
        "num_kv_heads": 1, "head_dim": 24, "rms_norm_eps": 1e-3, "rope_theta": 50_000.0, "rope_scaling": LLAMA3,
        "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "num_layers": 3,
    },
    "qwen2": {"attention_bias": True, "attention_bias_on_o": False, "rms_norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "head_dim": 24, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "qwen3 with bias": {"qk_norm": True, "attention_bias": True, "sliding_window": 2048, "rms_norm_eps": 1e-6},
    # As long as the sequences below: the last length at which a window is full attention.
    "mistral": {"sliding_window": 700, "num_kv_heads": 1, "head_dim": 24, "tie_word_embeddings": False},
}  # fmt: skip
FAMILIES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3 with bias": "qwen3", "mistral": "mistral"}
T, LENGTHS = 700, (700, 431)


class Pair(NamedTuple):
    """One model twice."""

    theirs: Any
    ours: FunctionalModel
    params: nnx.State
    config: LlamaConfig

    def llama(self) -> Llama:
        return nnx.merge(self.ours.graphdef, self.params)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model: FunctionalModel, params: nnx.State, ids_BT: np.ndarray) -> jax.Array:
    return model.apply(params, input_ids=ids_BT)


def error(ours: Any, theirs: Any) -> float:
    """max|a − b| / max|b|."""
    a, b = np.asarray(ours), np.asarray(theirs)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LlamaConfig], Pair]:
    """A random model of Hugging Face's, and ours from the checkpoint that it saves."""
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (requirements-torch.txt)")
    transformers = pytest.importorskip("transformers")

    def make(config: LlamaConfig) -> Pair:
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config.to_hf()), attn_implementation="eager"
        )
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                # Large enough for every part to matter, biases and norms too; small embeddings, so that eps does.
                tensor.normal_(0, 0.1 if "embed" in name else 0.3, generator=random)
                if "norm" in name:
                    tensor += 1
        folder = tmp_path_factory.mktemp("hf")
        theirs.eval().save_pretrained(folder)
        ours, params, read = LlamaLoader(path=folder).load_model()
        assert read == config
        return Pair(theirs, ours, params, config)

    return make


@pytest.mark.parametrize("size", LLAMA_SIZES)
def test_rotary_frequencies_of_the_published_sizes(size: str) -> None:
    """To half a step of float32, at full size: the small models above have few frequencies."""
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (requirements-torch.txt)")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = LLAMA_SIZES[size].config
    theirs = modeling.LlamaRotaryEmbedding(modeling.LlamaConfig(**config.to_hf())).inv_freq
    assert theirs.dtype == torch.float32
    np.testing.assert_array_max_ulp(inverse_frequencies(config, padded_length=1), theirs.numpy(), maxulp=1)


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, BASE.vocab_size, (batch, length))


def run_theirs(pair: Pair, ids_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V], and each layer's output before the final norm [L, B, T, D]."""
    import torch

    outputs: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda *call: outputs.append(call[2][0] if isinstance(call[2], tuple) else call[2]))
        for layer in pair.theirs.model.layers
    ]
    mask = None if mask_BT is None else torch.from_numpy(mask_BT.astype(np.int64))
    with torch.no_grad():
        logits = pair.theirs(torch.from_numpy(ids_BT), attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), torch.stack(outputs).numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_layers(make: Callable[[LlamaConfig], Pair], case: str) -> None:
    """Right-padded rows; Hugging Face gets the mask that we do not need, and padding is not compared."""
    pair = make(dataclasses.replace(BASE, **CASES[case]))
    assert pair.theirs.config.model_type == FAMILIES.get(case, "llama")
    ids_BT, valid_BT = tokens(2, T), np.arange(T) < np.array(LENGTHS)[:, None]
    logits, layers = run_theirs(pair, ids_BT, valid_BT)
    llama = pair.llama()
    our_layers = np.asarray(jax.jit(lambda ids: llama.layer_outputs(llama.embed(ids)))(ids_BT))
    for layer in range(pair.config.num_layers):
        assert error(our_layers[layer][valid_BT], layers[layer][valid_BT]) <= 1e-4, layer
    our_logits = np.asarray(logits_of(pair.ours, pair.params, ids_BT))
    assert error(our_logits[valid_BT], logits[valid_BT]) <= 1e-4


@pytest.mark.parametrize("case", ["bias", "llama3", *FAMILIES])
def test_transformers_computes_the_same_from_what_we_write(
    make: Callable[[LlamaConfig], Pair], tmp_path: Path, case: str
) -> None:
    """Our `config.json` and our names, beside random tensors."""
    make(BASE)  # skips where transformers is not
    import torch
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(BASE, **CASES[case])
    write(tmp_path, config, {name: 0.3 * tensor for name, tensor in tensors_of(config).items()})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, params, _ = LlamaLoader(path=tmp_path).load_model()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens(2, 30))).logits.numpy()
    assert error(logits_of(model, params, tokens(2, 30)), logits) <= 1e-4


@pytest.mark.parametrize("case", ["eps", "theta", "linear", "dynamic", "llama3"])
def test_a_constant_that_is_not_read_would_show(make: Callable[[LlamaConfig], Pair], case: str) -> None:
    """With the case's constant taken back to the base's, parity fails: the cases above test what they say."""
    pair = make(dataclasses.replace(BASE, **CASES[case]))
    ids_BT = tokens(1, T)
    careless, _ = abstract_model(BASE, Compute(), Init())
    assert error(logits_of(careless, pair.params, ids_BT), run_theirs(pair, ids_BT)[0]) > 1e-3


@pytest.mark.parametrize("case", ["all", "dynamic", "qwen2", "qwen3"])
def test_gradients(make: Callable[[LlamaConfig], Pair], case: str) -> None:
    """Of the mean cross-entropy of the next token, by every parameter."""
    import torch

    pair = make(dataclasses.replace(BASE, **CASES[case]))
    ids_BT = tokens(1, 300)  # beyond the 256 of the dynamic case
    logits = pair.theirs(torch.from_numpy(ids_BT)).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(ids_BT[:, 1:]).flatten()
    ).backward()
    theirs = dict(pair.theirs.named_parameters())

    def loss(params: nnx.State) -> jax.Array:
        log_probs = jax.nn.log_softmax(pair.ours.apply(params, input_ids=ids_BT)[:, :-1])
        return -jnp.take_along_axis(log_probs, ids_BT[:, 1:, None], axis=-1).mean()

    ours = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(jax.jit(jax.grad(loss))(pair.params))}
    assert theirs.keys() == places(pair.config).keys()
    for name, place in places(pair.config).items():
        gradient = ours[place.path] if place.layer is None else ours[place.path][place.layer]
        assert error(place.layout.to_hf(gradient), theirs[name].grad) <= 1e-3, name


@pytest.mark.parametrize("case", ["all", "dynamic", *FAMILIES])
def test_cache_equals_their_full_pass(make: Callable[[LlamaConfig], Pair], case: str) -> None:
    """A prompt, then token by token, rows of different lengths."""
    pair = make(dataclasses.replace(BASE, **CASES[case]))
    lengths_B, steps = np.array([9, 5]), 4
    ids_BT = tokens(2, 9 + steps)
    llama = pair.llama()
    cache = llama.init_cache(2, 16)
    x_BTD, cache = llama.extend(llama.embed(jnp.asarray(ids_BT[:, :9])), cache, jnp.asarray(lengths_B))
    found = [llama.logits(x_BTD)[np.arange(2), lengths_B - 1]]
    step = jax.jit(lambda ids, cache: llama.extend(llama.embed(ids), cache))
    for i in range(steps):
        x_BTD, cache = step(ids_BT[np.arange(2), lengths_B + i][:, None], cache)
        found.append(llama.logits(x_BTD)[:, 0])
    logits, _ = run_theirs(pair, ids_BT)
    for i, ours in enumerate(found):
        assert error(ours, logits[np.arange(2), lengths_B - 1 + i]) <= 1e-4, i


def test_a_cache_past_the_limit_of_dynamic_ntk_is_refused(make: Callable[[LlamaConfig], Pair]) -> None:
    llama = make(dataclasses.replace(BASE, **CASES["dynamic"])).llama()
    assert llama.init_cache(1, 256).k_LBSKH.shape[2] == 256
    with pytest.raises(ValueError, match=r"257 .*dynamic.* 256"):
        llama.init_cache(1, 257)


def test_more_positions_than_the_window_are_refused_for_they_would_be_wrong(
    make: Callable[[LlamaConfig], Pair],
) -> None:
    pair = make(dataclasses.replace(BASE, sliding_window=100))
    assert pair.theirs.config.model_type == "mistral"
    llama, refusal = pair.llama(), r"101 positions.*sliding_window of 100"
    assert llama.hidden(llama.embed(tokens(1, 100))).shape[1] == 100
    for refused in (llama.hidden, llama.layer_outputs, jax.jit(llama.hidden)):
        with pytest.raises(ValueError, match=refusal):
            refused(llama.embed(tokens(1, 101)))
    assert llama.init_cache(1, 100).k_LBSKH.shape[2] == 100
    with pytest.raises(ValueError, match=refusal):
        llama.init_cache(1, 101)
    careless, _ = abstract_model(BASE, Compute(), Init())
    error_T = np.abs(logits_of(careless, pair.params, tokens(1, 200)) - run_theirs(pair, tokens(1, 200))[0])[0].max(-1)
    assert error_T[:100].max() < 1e-3 and error_T[100:].max() > 0.1


def test_stories260k(real_data: Path) -> None:
    """Real pretrained weights against an independent NumPy forward pass."""
    folder = real_data / "stories260K"
    reference = np.load(folder / "reference_logits.npz", allow_pickle=False)
    model, params, _ = LlamaLoader(path=folder / "hf").load_model()
    assert error(model.apply(params, input_ids=reference["input_ids"][None])[0], reference["logits"]) <= 1e-5
