#!/usr/bin/env bash
# The merges of two models: bash examples/merge.sh BASE MID OUT (Hugging Face folders, checkpoints or runs; without arguments those of quickstart_text.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
base=${1:-runs/quickstart/base_hf} mid=${2:-runs/quickstart/mid} out=${3:-runs/quickstart/merged}

echo "== what would be merged" >&2
prism merge --model "$base=0.15" --model "$mid=0.85" --out "$out/linear" --dry-run
echo "== the paper's: 15 % base, 85 % mid-trained" >&2
prism merge --model "$base=0.15" --model "$mid=0.85" --out "$out/linear"
echo "== the same way along the sphere" >&2
prism merge --method slerp --model "$base" --model "$mid" --t 0.85 --out "$out/slerp"
echo "== 85 % of what mid-training moved: the same as linear with one model" >&2
prism merge --method task_arithmetic --base "$base" --model "$mid=0.85" --out "$out/task_arithmetic"
echo "== of what it moved, the largest 30 % of each tensor" >&2
prism merge --method ties --base "$base" --model "$mid=1" --density 0.3 --out "$out/ties"
echo "where it comes from: $out/linear/README.md, $out/linear/merge.json" >&2
