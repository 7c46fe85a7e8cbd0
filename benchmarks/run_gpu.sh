#!/usr/bin/env bash
# The measurements that only a GPU can make and that are still pending, most valuable first, each bounded in time.
# Writes JSON into the folder given (default benchmarks/out). Wants an environment with this project installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/out}
mkdir -p "$out"

# Parity with Hugging Face, the two-level softmax's properties, and cuDNN's attention against XLA's, on the device.
timeout 240 python -m pytest -q tests/core/test_hf_parity.py tests/core/test_hierarchical_softmax.py tests/core/test_attention.py 2>&1 | tee "$out/parity.log"

# The plan's peak memory against three real steps, for every kind of training.
timeout 590 python benchmarks/plan_vs_measured.py --json "$out/plan_vs_measured.json" 2>&1 | tee "$out/plan_vs_measured.log"

# From how many items on the two-level head is cheaper: what --head auto decides by.
timeout 180 python benchmarks/softmax.py --positions 4096 --width 384 --items 3416 30000 100000 300000 --json "$out/softmax.json"

# Whether the host's batches keep up with a step that takes milliseconds.
rm -rf "$out/data" && python -m efficientids prepare --source generated --output "$out/data"
timeout 120 python benchmarks/batches.py --recommender sasrec --data_dir "$out/data" 2>&1 | tee "$out/batches.log"

# Items a second of a 1b-shaped frozen Llama: metrics.jsonl holds them.
rm -rf "$out/run-1b"
timeout 200 python train_llama.py --llama_size 1b --random_weights --freeze_llama --num_steps 60 --batch_size 16 \
  --seq_len 512 --log_every 20 --checkpoint_dir "$out/run-1b" && cp "$out/run-1b/metrics.jsonl" "$out/train-1b.jsonl"
