#!/usr/bin/env bash
# models/ssd.py against the official Mamba-2 kernels, which Triton's interpreter runs without a GPU: some minutes.
# In the environment of tools/setup_mcore019.sh; arguments go to pytest: bash tools/test_mamba_kernels.sh -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_mcore019.sh
python=$PRISM_VENV/bin/python

# In a folder of its own, never in a virtual environment: built without CUDA it half imports, and Megatron-Core then takes it for whole.
kernels=.venv-mamba-kernels
if [ ! -d $kernels/mamba_ssm ]; then
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
        $python -m pip install -q --target $kernels --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
fi
$python -m pip list 2>/dev/null | grep -E '^(megatron-core|torch|triton) '
$python -m pip list --path $kernels 2>/dev/null | grep '^mamba'
export PYTHONPATH="$PWD/$kernels${PYTHONPATH:+:$PYTHONPATH}" PRISM_SSD_ORACLE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec $python -m pytest -q -s tests/parity/test_mamba_kernels.py -p no:cacheprovider "$@" </dev/null
