#!/usr/bin/env bash
# The paper's main path at toy scale, on this machine without a GPU: base model, mid-training, reinforcement learning from both, scores, report.
#   bash examples/quickstart.sh
# It is a part of configs/studies/tiny.yaml, whose other stages go on from here: prism study configs/studies/tiny.yaml
# A finished stage is not run again: to start again, remove runs/tiny.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
run=runs/tiny

prism study configs/studies/tiny.yaml \
  --until evaluate_base,evaluate_rl_base_mcs,evaluate_rl_mcs_mcs,gate_mid_mcs >&2
prism report $run --out $run/report >&2
python examples/quickstart_problem.py --before $run/scores/base --after $run/scores/rl_mcs_mcs
echo "report: $PWD/$run/report/report.html"
