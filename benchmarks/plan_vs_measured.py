"""The plan's peak memory against what real steps hold: `python benchmarks/plan_vs_measured.py [--json FILE]`.

Wants an NVIDIA GPU, and one of the planner's table. For each configuration the plan is made for it in a process that
sees no GPU, and three real steps run in another; a configuration that runs out of memory is reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import header  # isort: skip  # sets jax up

from core.platform import has_nvidia_device
from efficientids.planning.devices import DEVICES

# Modes, widths, lengths, remat policies and accumulation, all at random weights; the dearest last.
CONFIGURATIONS = (
    "--recommender sasrec --seq_len 200 --batch_size 512",
    "--llama_size 1b --train frozen --seq_len 512 --batch_size 16",
    "--llama_size 1b --train lora --seq_len 1024 --batch_size 8 --gradient_checkpointing dots",
    "--llama_size 1b --train full --seq_len 512 --batch_size 8",
    "--llama_size 1b --train full --seq_len 512 --batch_size 4 --gradient_accumulation 4",
    "--llama_size 3b --train lora --seq_len 512 --batch_size 16",
    "--llama_size 7b --train lora --seq_len 512 --batch_size 8",
    "--llama_size 7b --train lora --quantize nf4 --seq_len 512 --batch_size 8",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="its name in the planner's table; default: by what nvidia-smi says")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of configurations, from 0")
    options = parser.parse_args()
    if not has_nvidia_device():
        print("error: this compares a plan with real steps, and there is no NVIDIA GPU here", file=sys.stderr)
        return 2
    device = options.device or at_hand()
    # This process must leave the GPU alone: the steps run in processes of their own.
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(header())
    print(f"{'configuration':<92}{'planned GiB':>12}{'estimated':>11}{'measured':>10}{'error':>9}")
    rows = []
    for line in [CONFIGURATIONS[i] for i in options.only or range(len(CONFIGURATIONS))]:
        rows.append(row(line, device))
        print(shown(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": header(), "device": device, "rows": rows}, indent=2))
    return 0


def at_hand() -> str:
    """The GPU's name in the planner's table."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    for name, device in DEVICES.items():
        if device.is_card(found):
            return name
    sys.exit(f"error: {found} is not in the planner's table; give --device, one of {', '.join(DEVICES)}")


def row(line: str, device: str) -> dict[str, Any]:
    """The plan and three steps of one configuration."""
    random = [] if "sasrec" in line else ["--random_weights"]
    command = [sys.executable, "-m", "efficientids", "plan", *line.split(), *random, "--device", device]
    command += ["--plan_by", "run", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        return {"flags": line, "error": done.stderr.strip().splitlines()[-6:]}
    found = json.loads(done.stdout)
    measured = found["measured"]
    return {
        "flags": line,
        "planned": found["peak"],
        "estimated": found["estimate"]["total"],
        "measured": measured["peak_bytes"],
        "error_of_plan": found["peak"] / measured["peak_bytes"] - 1,
        "step_seconds": measured["step_seconds"],
        "bound_seconds": found["bound"]["seconds"],
        "compiled": found["compiled"],
        "limit": measured["limit_bytes"],
    }


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in row:
        return f"{row['flags']:<92}{row['error'][-1]}"
    gib = [f"{row[name] / 2**30:.2f}" for name in ("planned", "estimated", "measured")]
    return f"{row['flags']:<92}{gib[0]:>12}{gib[1]:>11}{gib[2]:>10}{row['error_of_plan']:>+9.1%}"


if __name__ == "__main__":
    sys.exit(main())
