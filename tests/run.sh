#!/usr/bin/env bash
# Set up .venv where needed, then run the tests; further arguments go to pytest: bash tests/run.sh -k house
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh

# the tests start gangs of processes: one thread each, or they fight over the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 # nothing is fetched, and nothing depends on the order of a set
# two at a time, a file each (tests/conftest.py): most tests wait for processes that start. The order is kept, so that the short ones come last
exec .venv/bin/python -m pytest -q tests -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@" </dev/null
