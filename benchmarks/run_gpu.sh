#!/usr/bin/env bash
# The measurements that only a GPU can make and that are still pending, most valuable first.
#
#   benchmarks/run_gpu.sh [OUT]        (default benchmarks/out)
#
# Each part writes OUT/PART.log and, when it ends, OUT/PART.done.json or PART.failed.json (exit code, seconds, device);
# most write their own OUT/PART.json, too. A part that is done is skipped, and one whose limit no longer fits into BUDGET_S (default 590 s, for
# machines that are lent for 10 minutes a call) is left for the next call on the same OUT. Wants an environment with this
# project's requirements; PEFT, the peer, may lie as a wheel in benchmarks/wheels (ignored by git).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/out}
budget=${BUDGET_S:-590}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
if [ -z "$device" ]; then
  echo "error: no NVIDIA GPU here" >&2
  exit 2
fi
python -c 'import peft' 2>/dev/null || python -m pip install --quiet --no-index --no-deps benchmarks/wheels/*.whl || true

# part NAME LIMIT_S COMMAND…
part() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  if [ -f "$out/$name.done.json" ]; then return; fi
  if [ $((SECONDS + limit)) -gt "$budget" ]; then
    echo "$name: left for the next call (may take $limit s, $((budget - SECONDS)) s are left)"
    return
  fi
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  local end=done
  if [ "$code" -ne 0 ]; then end=failed failures=$((failures + 1)); else rm -f "$out/$name.failed.json"; fi
  printf '{"part": "%s", "exit_code": %d, "seconds": %d, "device": "%s"}\n' "$name" "$code" $((SECONDS - began)) "$device" \
    >"$out/$name.$end.json"
}
failures=0

# Tokens a second against transformers + PEFT: the goal is 1.5 times, and 55% of the measured matmul rate.
part step-7b-8x512 280 python benchmarks/train_step.py --size 7b --rows 8 --positions 512 --json "$out/step-7b-8x512.json"
part step-7b-4x2048 280 python benchmarks/train_step.py --size 7b --rows 4 --positions 2048 --json "$out/step-7b-4x2048.json"
# The plan's peak memory against three real steps, for every kind of training, in halves.
part plan-small 420 python benchmarks/plan_vs_measured.py --only 0 1 2 3 4 --json "$out/plan-small.json"
part plan-large 420 python benchmarks/plan_vs_measured.py --only 5 6 7 --json "$out/plan-large.json"
# Parity with Hugging Face, the two-level softmax's properties, cuDNN's attention against XLA's, on the device.
part parity 240 python -m pytest -q tests/core/test_hf_parity.py tests/core/test_hierarchical_softmax.py \
  tests/core/test_attention.py
part step-1b 200 python benchmarks/train_step.py --size 1b --train lora full --rows 8 --positions 512 \
  --json "$out/step-1b.json"
# From how many items on the two-level head is cheaper: what --head auto decides by.
part softmax 180 python benchmarks/softmax.py --positions 4096 --width 384 --items 3416 30000 100000 300000 \
  --json "$out/softmax.json"
# Whether the host's batches keep up with a step that takes milliseconds.
part data 60 python -m efficientids prepare --source generated --output "$out/data"
part batches 120 python benchmarks/batches.py --recommender sasrec --data_dir "$out/data"
# Items a second of a 1b-shaped frozen Llama, predicted against real peak: in its metrics.jsonl.
part run-1b 200 python train_llama.py --llama_size 1b --random_weights --freeze_llama --num_steps 60 --batch_size 16 \
  --seq_len 512 --log_every 20 --checkpoint_dir "$out/run-1b"
# Semantic IDs against Hugging Face's generate, and the trie's cost a step.
part generate 300 python benchmarks/generate.py --json "$out/generate.json"
# ETEGRec whole, where prepared sets and their tokenizers (configs/etegrec_amazon.yaml says how they are made) lie in a
# folder that git ignores: the lent machine has no data. A run that was cut off leaves its folder; the next has its own.
for set in beauty14 instruments18; do
  for seed in 0 1 2; do
    if [ -d "benchmarks/data/$set" ]; then
      part "etegrec-$set-$seed" 560 python train_llama.py --config configs/etegrec_amazon.yaml --seed "$seed" \
        --data_dir "benchmarks/data/$set" --semantic_ids "benchmarks/data/$set-ids" \
        --checkpoint_dir "$out/etegrec-$set-$seed-$(date +%s)"
    fi
  done
done
[ "$failures" -eq 0 ]
