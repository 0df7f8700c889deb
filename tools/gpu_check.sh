#!/usr/bin/env bash
# What only a GPU can show, in one command and at most 8 minutes: parity, resumes, kills, saves, text, throughput; a table, and gpu_check.json.
#   bash tools/gpu_check.sh [--site FOLDER] [--tiny] [--budget-s S] [--out FILE.json] [--data FOLDER] [--work FOLDER] [--parts PART...]
# --site: a machine without a network. FOLDER holds site.tar.xz, unpack.sh and enter.sh: it is unpacked to a temporary folder and entered.
# --tiny: small and few on a CPU, to see that the programs run. PRISM_PYTHON: another interpreter than .venv's, or else python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

site='' arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --site) site=$(cd "$2" && pwd) && shift 2 ;;
    *) arguments+=("$1") && shift ;;
    esac
done

python=${PRISM_PYTHON:-$root/.venv/bin/python}
if [ -n "$site" ]; then
    python=${PRISM_PYTHON:-python3}
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    bash "$site/unpack.sh" "$unpacked/site"
    # shellcheck disable=SC1091
    . "$site/enter.sh" "$unpacked/site"
elif [ ! -x "$python" ]; then
    python=$(command -v python3)
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
status=0
"$python" -m tests.gpu "${arguments[@]}" || status=$? # not exec: the site folder is removed at the end
exit "$status"
