"""Our side of train_step.py, which starts it: one step of the project's own `build_program` on a Llama alone."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

from machine import header, seconds  # isort: skip  # sets jax up

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.config import LlamaConfig
from core.hf_names import num_parameters
from core.layers import Init
from core.llama import Compute, Llama
from core.lora import LoRAConfig, is_adapter
from core.softmax import Segment, cross_entropy
from efficientids.planning.devices import DEVICES
from efficientids.recommenders.base import Batch, LossSum, OptimizerConfig, Phase
from efficientids.training.step import build_program

ON_GPU = jax.default_backend() == "gpu"


class LanguageModel(nnx.Module):
    """A Llama under the attribute by which the project finds it."""

    def __init__(self, config: LlamaConfig, key: jax.Array, compute: Compute, init: Init) -> None:
        self.llama = Llama(config, key, compute, init)


def loss(model: LanguageModel, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
    """Next-token cross-entropy."""
    ids_BT = batch["ids"]
    hidden_BTD = model.llama.hidden(model.llama.embed(ids_BT[:, :-1]))
    targets_T = ids_BT[:, 1:].ravel()
    weights_T = jnp.ones(targets_T.shape, jnp.float32)
    segment = Segment(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), model.llama.output_table())
    total = cross_entropy([segment], targets_T, weights_T, chunk_elements=model.llama.compute.chunk_elements)
    return LossSum(total, weights_T.sum(), weights_T.sum(), {})


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on random tokens and times the steps after the first two."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = job["shape"]
    config = LlamaConfig(
        vocabulary, hidden, mlp, layers, heads, kv_heads, hidden // heads, 4096, 1e-5, 10000.0, None, False
    )
    lora = LoRAConfig(job["rank"], job["alpha"]) if job["mode"] == "lora" else None
    dtype = jnp.bfloat16 if ON_GPU else jnp.float32
    compute = Compute(dtype, job["remat"], attention=job["attention"])
    init = Init(param_dtype=jnp.float32 if lora is None else dtype, lora=lora)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, jax.random.key(0), compute, init)))
    state = jax.jit(lambda key: nnx.split(LanguageModel(config, key, compute, init))[1])(jax.random.key(0))
    rows, positions = job["rows"], job["positions"]
    spec = {"ids": jax.ShapeDtypeStruct((rows, positions + 1), jnp.int32)}
    trained = is_adapter if lora is not None else nnx.Param

    def batches(seed: int, start_step: int) -> Any:
        raise AssertionError("batches are made below")

    phase = Phase(job["mode"], [(trained, OptimizerConfig(1e-4))], [spec], batches, loss, 1000, 1.0)
    program = build_program(nnx.merge(graphdef, state), phase, accumulation=1, grad_clip=1.0)
    rng, key = np.random.default_rng(0), jax.random.key(0)
    batch = {"ids": rng.integers(0, vocabulary, (rows, positions + 1)).astype(np.int32)}
    began = time.perf_counter()
    step = program.step.lower(program.state, program.frozen, batch, key).compile()
    compile_s, train_state, metrics = time.perf_counter() - began, program.state, {}
    for number in range(2 + job["steps"]):
        if number == 2:
            float(metrics["loss"])
            began = time.perf_counter()
        train_state, metrics = step(train_state, program.frozen, batch, key)
    last = float(metrics["loss"])  # waits for the last step
    took = (time.perf_counter() - began) / job["steps"]
    products = num_parameters(config) - vocabulary * hidden  # all but the embedding, whose lookup is no product
    return {
        "tokens_per_s": rows * positions / took, "loss": last, "compile_s": compile_s, **_peak(),
        "flops_per_token": (4 if lora is not None else 6) * products,
    }  # fmt: skip


def _peak() -> dict[str, Any]:
    if ON_GPU:
        statistics = jax.devices()[0].memory_stats() or {}
        return {"peak_bytes": statistics["peak_bytes_in_use"], "peak_of": "device"}
    return {"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "peak_of": "process"}


def machine() -> dict[str, Any]:
    """The header, and the rate of a large matrix product in the precision of the steps."""
    size, dtype = (8192, jnp.bfloat16) if ON_GPU else (2048, jnp.float32)
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    # Many in a row on a GPU: one alone would time its own launch.
    chain = jax.jit(lambda a: jax.lax.fori_loop(0, 20, lambda _, x: (x @ a) * (1 / size), a))
    took = seconds(lambda: chain(a)) / 20 if ON_GPU else seconds(lambda: product(a))
    return {"header": header(), "matmul_tflops": 2 * size**3 / took / 1e12, "peak_tflops": _data_sheet()}


def _data_sheet() -> float | None:
    """Dense bfloat16 TFLOP/s of the GPU at hand, if the planner's table has it."""
    kind = jax.devices()[0].device_kind
    return next((device.matmul_flops / 1e12 for device in DEVICES.values() if device.name == kind), None)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(machine() if asked["what"] == "machine" else measured(asked)))
