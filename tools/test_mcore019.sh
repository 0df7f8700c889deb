#!/usr/bin/env bash
# The distributed and parity tests with Megatron-Core 0.19: Python 3.12 and torch's CUDA wheel, which also runs without a GPU (5 GB of disk).
# PYTHON names the interpreter; further arguments go to pytest: bash tools/test_mcore019.sh -k layouts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-mcore019

if [ ! -x $venv/bin/prism ]; then
    "${PYTHON:-python3.12}" -m venv $venv
    $venv/bin/python -m pip install -q torch==2.13.0 "megatron-core>=0.19,<0.20"
    $venv/bin/python -m pip install -q -e '.[cpu,dev]'
fi
$venv/bin/python -m pip list 2>/dev/null | grep -E '^(megatron-core|torch|transformers) '
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec $venv/bin/python -m pytest -q tests/distributed tests/parity -p no:cacheprovider "$@" </dev/null
