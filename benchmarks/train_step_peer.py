"""The peer's side of train_step.py, which starts it: Hugging Face transformers, with PEFT for LoRA."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
import transformers

ON_GPU = torch.cuda.is_available()


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on random tokens and times the steps after the first two."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = job["shape"]
    device = torch.device("cuda" if ON_GPU else "cpu")
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, rms_norm_eps=1e-5,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    lora = job["mode"] == "lora"
    # As our side holds it: a frozen base in the precision of the products, trained weights as float32 masters.
    with device:
        model = transformers.LlamaForCausalLM(config).to(dtype if lora else torch.float32)
    if lora:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules=targets)
        )
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    products = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name and "embed" not in name)
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.0, fused=ON_GPU)
    ids = torch.randint(0, vocabulary, (job["rows"], job["positions"] + 1), device=device)
    began, last = time.perf_counter(), 0.0
    compile_s = 0.0
    for number in range(2 + job["steps"]):
        if number == 2:
            _wait()
            began = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=ON_GPU):
            logits = model(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, vocabulary), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait()
    took, last = (time.perf_counter() - began) / job["steps"], float(loss)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens_per_s": job["rows"] * job["positions"] / took, "loss": last, "compile_s": compile_s,
        "peak_bytes": peak, "peak_of": "device" if ON_GPU else "process",
        "flops_per_token": (4 if lora else 6) * products,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(measured(json.loads(sys.argv[1]))))
