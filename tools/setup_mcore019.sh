#!/usr/bin/env bash
# Make .venv-mcore019: Megatron-Core 0.19, Python 3.12 and torch's CUDA wheel, which also runs without a GPU (5 GB of disk; it brings triton).
# PYTHON names the interpreter. A second run returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-mcore019

if [ ! -x $venv/bin/prism ]; then
    "${PYTHON:-python3.12}" -m venv $venv
    $venv/bin/python -m pip install -q torch==2.13.0 "megatron-core>=0.19,<0.20"
    $venv/bin/python -m pip install -q -e '.[cpu,dev]'
fi
