"""A language-model training step of our Llama against Hugging Face transformers + PEFT, on this machine, in one run.

`python benchmarks/train_step.py --size small [--train lora full] [--rows 4 --positions 256] [--json OUT.json]`

Both sides have the same shape, random weights, next-token cross-entropy over the vocabulary, gradient checkpointing,
AdamW, LoRA on q, k, v, o. Each side runs in a process of its own, one after the other (`--repeat` times in turn), so
that neither holds the other's memory. Prints tokens a second, MFU and peak memory, and the ratio ours / peer.

MFU: 4 N FLOPs a token for LoRA (forward 2 N, gradients of activations 2 N), 6 N for full training, N the parameters of
the matrix products, the head's among them; attention and recomputation are not counted. It is a share of the rate of a
large matrix product measured here; a figure above the data sheet's peak (on a CPU, where none is known, 1.1 times the
measured rate) is refused: it would be a wrong measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RANK, ALPHA = 64, 128
# hidden, MLP width, layers, heads, key-value heads, vocabulary
SHAPES = {
    "small": (512, 1408, 6, 8, 8, 8192),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--train", nargs="+", choices=("lora", "full"), default=["lora"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after two that are not")
    parser.add_argument("--repeat", type=int, default=1, help="how often both sides run in turn")
    parser.add_argument("--sides", nargs="+", choices=("ours", "peer"), default=["ours", "peer"])
    parser.add_argument("--attention", choices=("auto", "cudnn", "xla"), default="auto")
    parser.add_argument("--remat", default="full", help="our remat policy; the peer checkpoints every layer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = side("machine", options, "lora")
    print(facts.pop("header"))
    ceiling, peak = facts["matmul_tflops"], facts["peak_tflops"]
    print(f"matrix products: {ceiling:.4g} TFLOP/s measured; data sheet: {peak or 'unknown'}")
    results = []
    for mode in options.train:
        for _ in range(options.repeat):
            for name in options.sides:
                result = {"side": name, "train": mode, **side(name, options, mode)}
                result["tflops"] = result["tokens_per_s"] * result["flops_per_token"] / 1e12
                believe(name, result["tflops"], peak or 1.1 * ceiling)
                result["mfu"] = result["tflops"] / ceiling
                results.append(result)
                print(
                    f"{options.size} {mode:<5}{name:<6}{result['tokens_per_s']:>10,.0f} tokens/s  "
                    f"{result['mfu']:>6.1%} of the measured ceiling  peak {result['peak_bytes'] / 2**30:>7.2f} GiB "
                    f"({result['peak_of']})  loss {result['loss']:.4f}  compiled in {result['compile_s']:.1f} s",
                    flush=True,
                )
        ours, peer = (
            max((r["tokens_per_s"] for r in results if r["side"] == s and r["train"] == mode), default=None)
            for s in ("ours", "peer")
        )
        if ours and peer:
            print(f"{options.size} {mode}: ours / peer {ours / peer:.2f} x (best of {options.repeat})", flush=True)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": facts, "options": vars(options), "results": results}, default=str)
        )


def believe(name: str, tflops: float, limit: float) -> None:
    """Ends the run at a figure above what the hardware can do: the measurement is wrong."""
    if tflops > limit:
        sys.exit(f"{name}: {tflops:.4g} TFLOP/s is above the hardware's {limit:.4g}: not believed")


def side(name: str, options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Runs one side in a process of its own and reads the JSON of its last line."""
    script = HERE / ("train_step_peer.py" if name == "peer" else "train_step_ours.py")
    job = {
        "what": name, "mode": mode, "shape": SHAPES[options.size], "rows": options.rows, "steps": options.steps,
        "positions": options.positions, "rank": RANK, "alpha": ALPHA, "attention": options.attention,
        "remat": options.remat,
    }  # fmt: skip
    # Our side may use as much of a GPU as the peer does.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTHONPATH": _python_path()}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(job)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"{script.name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if name == "machine":
        result["header"] = result["header"].rsplit("\n", 1)[0] + f"\ncommand: python {' '.join(sys.argv)}"
    return result


def _python_path() -> str:
    return os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])


if __name__ == "__main__":
    main()
