#!/usr/bin/env bash
# prism merge beside mergekit, which lives in an environment of its own (.venv-mergekit, 1.5 GB). By hand. Arguments go to pytest; PRISM_TORCH as for tools/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${PRISM_MERGEKIT_VENV:-.venv-mergekit}
stamp=$venv/prism-setup
wanted=$(sha256sum <tools/test_mergekit.sh | cut -d' ' -f1)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    rm -rf $venv
    "${PRISM_PYTHON:-python3.11}" -m venv $venv
    $venv/bin/python -m pip install -q "${PRISM_TORCH:-torch==2.13.0+cpu}" "mergekit==0.1.5"
    printf '%s\n' "$wanted" >$stamp
fi
export PRISM_MERGEKIT="$(realpath -m "$venv")/bin/mergekit-yaml" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PRISM_VENV:-.venv}"/bin/python -m pytest -q -s tests/mergekit -p no:cacheprovider "$@" </dev/null
