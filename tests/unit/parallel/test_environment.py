"""The variables of a run follow from its config, and what is exported stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import BatchConfig, DataConfig, ParallelConfig, TrainConfig
from megatron_prism.parallel import environment, hardware

ALWAYS = {"NCCL_NVLS_ENABLE": "0", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
ORDERED = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
UNORDERED = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
OVERLAPPED = {"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20", "TORCH_NCCL_HIGH_PRIORITY": "1"}
CHUNKS = {"NCCL_P2P_NET_CHUNKSIZE": "2097152"}
OPTED = {"NVTE_NORM_FWD_USE_CUDNN": "1", "NCCL_CTA_POLICY": "1"}  # change bits or need more: only where a config asks
WHOLE_FP32 = {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "tf32x3"}  # no TF32
SAME_BITS = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run(**keys: Any) -> TrainConfig:
    data = DataConfig(prepared=Path("data"), seq_length=64)
    return TrainConfig(run_dir=Path("run"), steps=1, data=data, batch=BatchConfig(global_size=1), **keys)


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        ({}, UNORDERED),
        ({"parallel": ParallelConfig(tp=2)}, ORDERED),
        ({"parallel": ParallelConfig(cp=2)}, ORDERED),
        ({"parallel": ParallelConfig(pp=2)}, CHUNKS),
        ({"parallel": ParallelConfig(pp=2, vpp=2)}, CHUNKS | OVERLAPPED),
        ({"parallel": ParallelConfig(overlap_grad_reduce=True)}, UNORDERED | OVERLAPPED),
        ({"parallel": ParallelConfig(tp=2, overlap_grad_reduce=True)}, ORDERED | OVERLAPPED),
        ({"cuda_graphs": True}, UNORDERED | {"NCCL_GRAPH_REGISTER": "0"}),
        ({"deterministic": True}, UNORDERED | SAME_BITS),
        ({"precision": "fp32"}, UNORDERED | WHOLE_FP32),
        ({"environment": {"NCCL_NVLS_ENABLE": "1", "NCCL_DEBUG": "INFO"}}, UNORDERED | {"NCCL_NVLS_ENABLE": "1", "NCCL_DEBUG": "INFO"}),
        ({"environment": {"NVTE_NORM_FWD_USE_CUDNN": "1", "NCCL_CTA_POLICY": "1"}}, UNORDERED | OPTED),
    ],
)
def test_variables_follow_from_the_config_and_its_own_win(keys: dict[str, Any], more: dict[str, str]) -> None:
    assert environment.variables(run(**keys)) == ALWAYS | more


def test_what_is_exported_wins_over_both_and_is_told() -> None:
    wanted = environment.variables(run(parallel=ParallelConfig(tp=2), environment={"NCCL_DEBUG": "INFO"}))
    exported = {"NCCL_DEBUG": "WARN", "CUDA_DEVICE_MAX_CONNECTIONS": "32", "HOME": "/home/a"}
    values = environment.effective(wanted, exported)
    assert values == ALWAYS | {"NCCL_DEBUG": "WARN", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    line = environment.in_words(wanted, values)
    assert "NCCL_NVLS_ENABLE=0  " in line and "\n" not in line
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32 (as exported; the run's own: 1)" in line and line.count("as exported") == 2


def test_the_allocators_older_name_is_kept_as_exported() -> None:
    values = environment.effective(ALWAYS, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"})
    assert values == ALWAYS | {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}


def test_a_process_that_was_started_with_them_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run(deterministic=True)
    for name in ALWAYS | UNORDERED | SAME_BITS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    first = environment.set_variables(config)
    assert environment.set_variables(config) == first == ALWAYS | UNORDERED | SAME_BITS


@pytest.mark.parametrize(
    ("text", "version"), [("12.9", (12, 9)), ("2.11.0+cu130", (2, 11)), ("2.2.0.dev0", (2, 2)), ("", None), (None, None)]
)
def test_a_version_is_major_and_minor(text: str | None, version: tuple[int, int] | None) -> None:
    assert hardware.version(text) == version


def test_a_host_is_a_machine_without_anything() -> None:
    assert hardware.read() == hardware.Machine(has_cuda=False)
