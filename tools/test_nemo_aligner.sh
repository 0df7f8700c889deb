#!/usr/bin/env bash
# NeMo-Aligner 0.7.0's own client, data set and arithmetic against ours, on a CPU, in an environment of their own (.venv-nemo-aligner, 3 GB). By hand.
# PRISM_NEMO_ALIGNER_REPO=/a/checkout/of/NeMo-Aligner also composes its Hydra config. PRISM_TORCH as for tools/setup.sh. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-nemo-aligner
stamp=$venv/prism-setup
wanted=$(sha256sum tools/test_nemo_aligner.sh | cut -d' ' -f1)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    rm -rf $venv
    "${PRISM_PYTHON:-python3.11}" -m venv $venv
    pip="$venv/bin/python -m pip install -q"
    $pip "setuptools<81" wheel
    $pip "${PRISM_TORCH:-torch==2.13.0}"
    $pip "${PRISM_TORCH:-torch==2.13.0}" "nemo_toolkit[nlp]==2.2.1" megatron-core==0.11.0 nemo-aligner==0.7.0 "setuptools<81"
    # What that resolves to does not import: torchvision's build is for CUDA, and numpy 1.26 needs older neighbours.
    $venv/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
    $pip pangu==4.0.6.1 pyarrow==18.1.0 pandas==2.2.3 datasets==3.6.0 dill==0.3.8 multiprocess==0.70.16
    $pip nvidia-pytriton==0.5.14 "tritonclient[http]==2.73.0"
    $pip --no-deps protobuf==6.33.6 # NeMo pins 3.20.3, which tritonclient does not import with
    printf '%s\n' "$wanted" >$stamp
fi
export PRISM_NEMO_ALIGNER="$PWD/$venv/bin/python" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PRISM_VENV:-.venv}"/bin/python -m pytest -q -s tests/aligner -p no:cacheprovider "$@" </dev/null
