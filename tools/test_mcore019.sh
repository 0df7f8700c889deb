#!/usr/bin/env bash
# The distributed, parity and reshard tests with Megatron-Core 0.19, in an environment of their own (tools/setup_mcore019.sh).
# PYTHON names the interpreter; further arguments go to pytest: bash tools/test_mcore019.sh -k layouts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_mcore019.sh
venv=.venv-mcore019

$venv/bin/python -m pip list 2>/dev/null | grep -E '^(megatron-core|torch|transformers) '
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec $venv/bin/python -m pytest -q tests/distributed tests/parity tests/reliability/test_reshard.py -p no:cacheprovider "$@" </dev/null
