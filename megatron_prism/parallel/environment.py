"""The environment variables of a run, which NCCL, CUDA, torch and Transformer Engine read when they start.

Source: NVIDIA's recipes for H100 (DGXC benchmarking, Megatron-Bridge's perf_recipes); megatron/training/determinism.py (0.19).
Set here is what orders work on the device or leaves it room, and cannot change a bit. Two that those recipes have are for `environment`:
NVTE_NORM_FWD_USE_CUDNN and NVTE_NORM_BWD_USE_CUDNN, since cuDNN's norms round otherwise than Transformer Engine's own and need a cuDNN that works;
NCCL_CTA_POLICY: 1, for which NCCL takes fewer blocks a collective: it may take longer, and another split of a sum rounds otherwise.
TORCH_NCCL_AVOID_RECORD_STREAMS is not set. It is torch's default now, and torch warns where it is set (read in 2.13's NCCL process group).
Under interleaved pipelines it has given wrong losses (Megatron-LM, issue 1586).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_prism.core.config import GangConfig

# Otherwise factors in fp32 are rounded to TF32: by cuBLAS, where Transformer Engine or the image (NGC's TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) asks
# for it, and by Triton's kernels (mamba_ssm's) by default. A decoding step multiplies none, so sampler and trainer would differ by more than the
# trust gate allows. tf32x3 are three products whose sum has fp32's bits but for the last ones; Triton's `ieee` compiles five times as long.
FP32 = {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "tf32x3"}


def variables(gang: GangConfig) -> dict[str, str]:
    """Return the variables that follow from a gang's config, overridden by its own `environment`."""
    grid = gang.parallel
    derived = {"NCCL_NVLS_ENABLE": "0", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if grid.tp * grid.cp > 1:  # communication can then start before the GEMMs that it overlaps; CUDA reads this at its start
        derived["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    elif grid.pp == 1:  # pure data parallelism needs no such order: a queue for each stream, so that none waits for another
        derived["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    if grid.pp > 1:
        derived["NCCL_P2P_NET_CHUNKSIZE"] = "2097152"
    if grid.overlap_grad_reduce or grid.overlap_param_gather or grid.vpp is not None:
        # the norms' kernels leave SMs for NCCL's, which are scheduled first where both are ready
        derived |= {"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20", "TORCH_NCCL_HIGH_PRIORITY": "1"}
    if (
        gang.cuda_graphs
    ):  # else NCCL registers captured buffers, which expandable segments may move: Megatron-Core's transformer/cuda_graphs.py
        derived["NCCL_GRAPH_REGISTER"] = "0"
    if gang.precision == "fp32":
        derived |= FP32
    if gang.deterministic:
        derived |= {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return derived | gang.environment


def effective(wanted: Mapping[str, str], exported: Mapping[str, str]) -> dict[str, str]:
    """Return the values of the wanted variables. An exported variable keeps its value."""
    if old := exported.get("PYTORCH_CUDA_ALLOC_CONF"):  # the older name of the same setting; torch reads either
        exported = {"PYTORCH_ALLOC_CONF": old, **exported}
    return {name: exported.get(name, value) for name, value in wanted.items()}


def set_variables(gang: GangConfig) -> dict[str, str]:
    """Set a run's variables for this process and its children, before CUDA and NCCL read them. Return their values.

    Child processes find them exported, so a second call changes nothing.
    """
    values = effective(variables(gang), os.environ)
    os.environ.update(values)
    return values


def in_words(wanted: Mapping[str, str], values: Mapping[str, str]) -> str:
    """Return one line: the variables set, and those kept as exported."""
    kept = {name: f" (as exported; the run's own: {value})" for name, value in wanted.items() if values[name] != value}
    return "  ".join(f"{name}={value}{kept.get(name, '')}" for name, value in values.items())
