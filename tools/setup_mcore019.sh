# To be sourced from the repository's root: make .venv-mcore019, and let tools/setup.sh and tests/run.sh use it. It holds Python 3.12, for which
# pip chooses Megatron-Core 0.19, and torch's CUDA wheel, which also runs without a GPU (5 GB of disk; it brings triton).
export PRISM_VENV=.venv-mcore019 PRISM_PYTHON="${PRISM_PYTHON:-python3.12}" PRISM_TORCH=torch==2.13.0
bash tools/setup.sh
