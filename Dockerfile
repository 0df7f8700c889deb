# Two images of megatron_prism:
#   docker build -t megatron-prism .                                # H100: NVIDIA's PyTorch image, its Transformer Engine and apex
#   docker build -t megatron-prism:cpu --target cpu .               # no GPU: the demo, the tests, planning
# For Slurm with pyxis: enroot import dockerd://megatron-prism, and the .sqsh file into configs/clusters/h100_pyxis.yaml.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_BASE=python:3.11-slim

FROM ${CPU_BASE} AS cpu
ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1 PATH=/opt/megatron_prism/.venv/bin:$PATH
# the tests ask git which files there are; any version does
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /opt/megatron_prism
WORKDIR /opt/megatron_prism
COPY . .
RUN PRISM_TORCH="${TORCH}" bash tools/setup.sh && python tools/smoke.py
CMD ["prism", "--help"]

FROM ${BASE} AS gpu
ARG MEGATRON_CORE=0.19.2
ARG MAMBA_SSM=2.3.2.post1
ARG CAUSAL_CONV1D=1.6.2.post1
ARG MAX_JOBS=8
# the base pins all its packages for pip: without the pins newer tokenizers and transformers go in; the smoke test sees to it that torch stays
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# kernels of the Mamba layers, compiled for this torch. No dependencies: what mamba-ssm names beyond these serves Mamba-3
RUN python -c 'import torch; print(torch.__version__)' | tee /etc/torch_of_base \
    && export MAX_JOBS="${MAX_JOBS}" CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
    && python -m pip install --no-build-isolation --no-deps --no-binary :all: "causal-conv1d==${CAUSAL_CONV1D}" "mamba-ssm==${MAMBA_SSM}"
# contains the code that the grader runs
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron_prism
COPY . .
RUN python -m pip install "megatron-core==${MEGATRON_CORE}" \
    && python -m pip install -e '.[report,rl,fast]' \
    && git config --system --add safe.directory /opt/megatron_prism \
    && python tools/smoke.py --torch "$(cat /etc/torch_of_base)"
CMD ["prism", "--help"]
