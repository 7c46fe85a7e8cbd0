"""Loading weights: peak memory of a process that streams a checkpoint onto its devices, against what it must hold.

`python benchmarks/load_weights.py [--llama_size 1b --files 4 --devices 1 8 --json FILE]`. Generates a bfloat16
checkpoint of the size's shape (safetensors, random) in a temporary folder, loads it in a process of its own for each
number of (virtual CPU) devices, fsdp over all of them, and deletes it. The bound is this host's parameters plus the
largest weight file; what a process held before it loaded anything (Python, jax) is taken off the peak.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import header  # isort: skip  # sets jax up

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from core.config import LLAMA_SIZES
from core.hf_names import places
from core.llama_loader import LlamaLoader
from core.sharding import MeshShape, make_mesh


def main() -> None:
    """Measures and prints; exit code 1 where the bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama_size", default="1b", choices=sorted(LLAMA_SIZES))
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", type=Path, help="load this folder in this process (used by the program itself)")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load, options.devices[0])))
        return
    print(header())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        largest = generate(Path(folder), options.llama_size, options.files)
        print(f"{options.llama_size}: bfloat16, {options.files} files, the largest {largest / 2**20:,.0f} MiB")
        print(f"{'devices':>7}{'seconds':>9}{'parameters':>12}{'before':>8}{'peak':>8}{'of the bound':>14}  (MiB)")
        for devices in options.devices:
            command = [sys.executable, sys.argv[0], "--load", folder, "--devices", str(devices)]
            flags = f"--xla_force_host_platform_device_count={devices}"
            environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            row = json.loads(done.stdout) | {"devices": devices, "largest_file": largest}
            row["share_of_bound"] = (row["peak"] - row["before"]) / (row["parameters"] + largest)
            rows.append(row)
            sizes = "".join(f"{row[name] / 2**20:>{width},.0f}" for name, width in (("before", 8), ("peak", 8)))
            print(
                f"{devices:>7}{row['seconds']:>9.1f}{row['parameters'] / 2**20:>12,.0f}{sizes}"
                f"{row['share_of_bound']:>14.1%}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if any(row["share_of_bound"] > 1 for row in rows):
        raise SystemExit("more than this host's parameters plus one file was held")


def generate(folder: Path, size: str, files: int) -> int:
    """Writes a checkpoint of random tensors, one file at a time; returns the bytes of the largest file."""
    config = LLAMA_SIZES[size].config
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    shapes = {name: place.layout.hf_shape for name, place in places(config).items()}
    # Files of about equal size, as Hugging Face cuts them.
    share, file, weight_map = sum(map(math.prod, shapes.values())) / files, 0, {}
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(files)]
    for name, shape in shapes.items():
        if sum(map(math.prod, parts[file].values())) >= share and file + 1 < files:
            file += 1
        parts[file][name] = shape
    rng, largest = np.random.default_rng(0), 0
    for i, part in enumerate(parts):
        path = folder / f"model-{i + 1:05}-of-{files:05}.safetensors"
        tensors = {
            name: (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
            for name, shape in part.items()
        }
        save_file(tensors, path)
        weight_map.update({name: path.name for name in part})
        largest = max(largest, path.stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return largest


def load(folder: Path, devices: int) -> dict[str, float]:
    """Seconds, bytes of the parameters, and what this process held at most before and in the end."""
    mesh = None if devices == 1 else make_mesh(MeshShape(fsdp=devices))
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
    before, began = peak_rss(), time.perf_counter()
    _, params, _ = LlamaLoader(path=folder).load_model(mesh=mesh)
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return {"seconds": time.perf_counter() - began, "parameters": held, "before": before, "peak": peak_rss()}


def peak_rss() -> int:
    """The most resident memory that this process has had, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM: this benchmark needs Linux")


if __name__ == "__main__":
    main()
