#!/usr/bin/env bash
# Set up the virtual environment where needed, then run the tests. What takes long is marked `slow` and runs with --all, or where it is named:
#   bash tests/run.sh                                      what a change needs: all that is not slow
#   bash tests/run.sh --all                                everything
#   bash tests/run.sh -k house, or tests/unit/models       tests by name or path, slow or not; all arguments but --all go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh

tier=(-m "not slow") arguments=()
for argument in "$@"; do
    if [[ $argument == tests/* && ! -e ${argument%%::*} ]]; then # pytest-xdist would run nothing, and say nothing
        echo "tests/run.sh: there is no ${argument%%::*}" >&2
        exit 4
    fi
    [ "$argument" != --all ] && arguments+=("$argument")
    if [[ $argument == @(--all|-k*) || -e ${argument%%::*} ]]; then tier=(); fi
done

# the tests start gangs of processes: one thread each, or they fight over the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 # nothing is fetched, and nothing depends on the order of a set
export PYTHONDONTWRITEBYTECODE= # hundreds of processes would compile the sources, each anew
# two at a time, a file each (tests/conftest.py): most tests wait for processes that start. The order is kept, so that the short ones come last
exec "${PRISM_VENV:-.venv}"/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 \
    "${tier[@]}" "${arguments[@]}" </dev/null
