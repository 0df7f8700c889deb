#!/usr/bin/env bash
# NeMo Evaluator 0.3.0's own `nel gate` on what prism evaluate compare writes, in an environment of its own (.venv-nel, Python 3.12, 0.6 GB). By hand.
# PRISM_NEL_PYTHON: a Python 3.12 or 3.13. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${PRISM_NEL_VENV:-.venv-nel}")
stamp=$venv/prism-setup
wanted=$(sha256sum tools/test_nel_gate.sh | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$venv"
    "${PRISM_NEL_PYTHON:-python3.12}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q "nemo-evaluator[stats]==0.3.0"
    printf '%s\n' "$wanted" >"$stamp"
fi
export PRISM_NEL="$venv/bin/nel" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PRISM_VENV:-.venv}"/bin/python -m pytest -q tests/nel -p no:cacheprovider "$@" </dev/null
