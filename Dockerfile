# Images of megatron_prism, by BuildKit, which builds only the stages that a target needs:
#   docker build -t megatron-prism .                                # H100: NVIDIA's PyTorch image, its Transformer Engine and apex
#   docker build -t megatron-prism:cpu --target cpu .               # no GPU: the demo, the tests, planning
#   docker build -t megatron-prism:rl --target rl .                 # the first, with vLLM: another engine of prism rl
#   docker build -t nemo-aligner:0.7.0 --target aligner .           # without megatron_prism: NeMo-Aligner, for prism rl export nemo_aligner
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
    && python -m pip install -e '.[report,rl,fast,eval]' \
    && git config --system --add safe.directory /opt/megatron_prism \
    && python tools/smoke.py --torch "$(cat /etc/torch_of_base)"
CMD ["prism", "--help"]

FROM gpu AS rl
ARG VLLM=v0.32.0
ARG CUDA_ARCHITECTURES=9.0a
ARG MAX_JOBS=8
# vLLM's wheels are compiled for the torch that they pin, and would replace the base's, under which Transformer Engine and the Mamba kernels stand:
# so it is compiled for this torch, after its own script has struck torch from what it requires. The smoke test sees to it that torch stays
WORKDIR /opt/vllm
RUN git clone --depth 1 --branch "${VLLM}" https://github.com/vllm-project/vllm . \
    && python use_existing_torch.py \
    && python -m pip install -r requirements/build/cuda.txt \
    && export MAX_JOBS="${MAX_JOBS}" TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    && python -m pip install --no-build-isolation . \
    && rm -rf build .git
WORKDIR /opt/megatron_prism
RUN python tools/smoke.py --torch "$(cat /etc/torch_of_base)" --vllm "${VLLM#v}"
CMD ["prism", "--help"]

# The pins are those of NeMo-Aligner's last Dockerfile (its commit af2b3bd9)
FROM nvcr.io/nvidia/pytorch:24.07-py3 AS aligner
ARG ALIGNER=v0.7.0
ARG NEMO=19668e5320a2e2af0199b6d5e0b841993be3a634
ARG NEMO_PICKS="0c92fe17df4642ffc33d5d8c0c83fda729e3910c 60e677423667c029dd05875da72bf0719774f844 0deaf6716cb4f20766c995ce25d129795f1ae200"
ARG MEGATRON_LM=25059d3bbf68be0751800f3644731df12a88f3f3
ARG TRANSFORMER_ENGINE=7d576ed25266a17a7b651f2c12e8498f67e0baea
ARG TENSORRT_LLM=v0.13.0
ARG MAX_JOBS=8
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 LD_LIBRARY_PATH=/usr/local/cuda-12/compat/lib.real/:$LD_LIBRARY_PATH
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# NeMo's requests 10651, 10652 and 10863 are picked onto its commit, which needs an author
RUN git config --global user.name nobody && git config --global user.email nobody@localhost
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git-lfs && rm -rf /var/lib/apt/lists/* && git lfs install
WORKDIR /opt/NeMo-Aligner
RUN git clone --depth 1 --branch "${ALIGNER}" https://github.com/NVIDIA/NeMo-Aligner .
# the actor does not start without TensorRT-LLM
WORKDIR /opt/TensorRT-LLM
# hadolint ignore=SC1091
RUN git clone --branch "${TENSORRT_LLM}" https://github.com/NVIDIA/TensorRT-LLM . \
    && . docker/common/install_tensorrt.sh \
    && python3 scripts/build_wheel.py --job_count "${MAX_JOBS}" --trt_root /usr/local/tensorrt --python_bindings --benchmarks \
    && python -m pip install -e . "pynvml==11.5.3" \
    && patch -p1 </opt/NeMo-Aligner/setup/trtllm.patch
WORKDIR /opt/TransformerEngine
RUN python -m pip uninstall -y transformer-engine \
    && git clone https://github.com/NVIDIA/TransformerEngine . \
    && git checkout "${TRANSFORMER_ENGINE}" && git submodule update --init --recursive \
    && MAX_JOBS="${MAX_JOBS}" NVTE_FRAMEWORK=pytorch NVTE_WITH_USERBUFFERS=1 MPI_HOME=/usr/local/mpi python -m pip install .
WORKDIR /opt/NeMo
RUN git clone https://github.com/NVIDIA/NeMo . && git checkout "${NEMO}" \
    && for head in ${NEMO_PICKS}; do \
         git fetch origin "${head}" && git cherry-pick --allow-empty "$(git merge-base origin/main "${head}")..${head}" || exit 1; \
       done \
    && python -m pip install --upgrade-strategy only-if-needed "nvidia-pytriton==0.5.10" "jsonlines==4.0.0" \
    && python -m pip uninstall -y nemo_toolkit sacrebleu && python -m pip install -e '.[nlp]' \
    && make -C nemo/collections/nlp/data/language_modeling/megatron \
    && python -m pip install "triton==3.1.0" && python -m pip install --no-deps "protobuf==4.24.4"
WORKDIR /opt/Megatron-LM
RUN python -m pip uninstall -y megatron-core \
    && git clone https://github.com/NVIDIA/Megatron-LM . && git checkout "${MEGATRON_LM}" && python -m pip install -e .
WORKDIR /opt/NeMo-Aligner
RUN python -m pip install --no-deps -e .

# what a build without a target gives: the last stage
FROM gpu
