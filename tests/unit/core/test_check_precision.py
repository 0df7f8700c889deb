"""FP8, offloading, determinism, the environment: one change to a valid config, architecture or machine a rule, named by its key."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_prism.core.check import precision, train
from megatron_prism.core.check.precision import Machine
from megatron_prism.core.config import MambaConfig, ModelConfig, TrainConfig
from megatron_prism.core.errors import Problem
from megatron_prism.core.load import build

MODEL = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=390,
    max_position_embeddings=128,
)
MAMBA = MambaConfig(num_heads=32, head_dim=16, state_dim=16, num_groups=2)
HYBRID = dataclasses.replace(MODEL, layer_pattern="M-*-", mamba=MAMBA)
H100 = Machine(has_cuda=True, capability=(9, 0), cuda=(12, 9), transformer_engine=(2, 11))
HOST = Machine(has_cuda=False)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> TrainConfig:
    for key, value in {"precision": "bf16", **changes}.items():
        part, names = values, key.split(".")
        for name in names[:-1]:
            part = part.setdefault(name, {})
        part[names[-1]] = value
    return build(values, TrainConfig, str)


def keys(problems: list[Problem]) -> list[str]:
    return [problem.where for problem in problems]


@pytest.mark.parametrize("model", [MODEL, HYBRID], ids=["dense", "hybrid"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fp8": {}},
        {"fp8.recipe": "blockwise"},
        {"fp8": {"recipe": "delayed", "amax_history_len": 16, "amax_compute_algo": "most_recent", "margin": 1}},
        {"fp8": {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}},
        {"fp8": {}, "parallel": {"tp": 2, "sequence_parallel": True}},
        {"fp8.recipe": "blockwise", "parallel": {"tp": 2, "sequence_parallel": True}, "data.seq_length": 128},
        {"offload.optimizer_fraction": 1.0},
        {"cuda_graphs": True, "fp8": {}, "parallel": {"tp": 2, "sequence_parallel": True}, "recompute.granularity": "selective"},
        {"deterministic": True, "environment": {"NCCL_ALGO": "Ring,CollnetChain", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}},
        {"environment": {"UCX_TLS": "rc", "OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_ALGO": "Tree"}},
    ],
)
def test_a_config_that_holds_has_no_problem(values: dict, model: ModelConfig, changes: dict) -> None:
    config = changed(values, changes)
    assert train.check_train(config, 2) == [] == train.check_model(model, config)
    assert precision.check_machine(config, H100) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fp8.recipe": "mxfp8"}, "fp8.recipe"),
        ({"fp8": {}, "precision": "fp32"}, "precision"),
        ({"fp8.amax_history_len": 16}, "fp8.amax_history_len"),
        ({"fp8": {"recipe": "blockwise", "amax_compute_algo": "most_recent"}}, "fp8.amax_compute_algo"),
        ({"fp8.margin": 1}, "fp8.margin"),
        ({"fp8": {"recipe": "delayed", "amax_history_len": 0}}, "fp8.amax_history_len"),
        ({"fp8.num_layers_at_end_in_bf16": -1}, "fp8.num_layers_at_end_in_bf16"),
        ({"fp8": {"recipe": "delayed", "num_layers_at_start_in_bf16": 1}}, "fp8.num_layers_at_start_in_bf16, num_layers_at_end_in_bf16"),
        ({"fp8.param": True}, "fp8.param"),
        ({"fp8.param": True, "init": {"tokenizer": "t"}, "model": vars(MODEL), "parallel.distributed_optimizer": False}, "fp8.param"),
        ({"offload.optimizer_fraction": 1.5}, "offload.optimizer_fraction"),
        ({"offload.optimizer_fraction": float("nan")}, "offload.optimizer_fraction"),
        ({"offload.optimizer_fraction": 0.5, "parallel.distributed_optimizer": False}, "offload.optimizer_fraction"),
        (
            {"offload.optimizer_fraction": 0.5, "fp8.param": True, "init": {"tokenizer": "t"}, "model": vars(MODEL)},
            "offload.optimizer_fraction",
        ),
        ({"offload.activation_layers": -1}, "offload.activation_layers"),
        ({"offload.activation_layers": 1, "parallel.pp": 2}, "offload.activation_layers"),
        ({"offload.activation_layers": 1, "recompute.granularity": "selective"}, "offload.activation_layers"),
        ({"cuda_graphs": True, "parallel": {"pp": 2}}, "cuda_graphs"),
        ({"cuda_graphs": True, "data.document_mask": True}, "cuda_graphs"),
        ({"cuda_graphs": True, "trainable": ["*.self_attention.*"]}, "cuda_graphs"),
        ({"cuda_graphs": True, "offload.optimizer_fraction": 0.5}, "cuda_graphs"),
        ({"cuda_graphs": True, "offload.activation_layers": 1}, "cuda_graphs"),
        ({"cuda_graphs": True, "recompute.granularity": "full"}, "cuda_graphs"),
        ({"cuda_graphs": True, "environment": {"NCCL_GRAPH_REGISTER": "1"}}, "environment.NCCL_GRAPH_REGISTER"),
        ({"deterministic": True, "environment": {"NCCL_ALGO": "Ring,Tree"}}, "environment.NCCL_ALGO"),
        ({"deterministic": True, "environment": {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}}, "environment.NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
        ({"environment": {"NCCL_DEBUG": "INFO\nx"}}, "environment.NCCL_DEBUG"),
        ({"environment": {"PYTORCH_CUDA_ALLOC_CONF": "a"}}, "environment.PYTORCH_CUDA_ALLOC_CONF"),
        *(
            ({"environment": {name: "a"}}, f"environment.{name}")
            for name in ("LD_PRELOAD", "PATH", "PYTHONPATH", "NCCL_", "nccl_debug", "MY_NCCL_DEBUG")
        ),
    ],
)
def test_keys_that_do_not_hold_are_named(values: dict, changes: dict, key: str) -> None:
    assert keys(train.check_train(changed(values, changes), 2)) == [key]


TOKENS = "batch.micro_size x data.seq_length (tokens of a microbatch)"
QKV = "model.(num_attention_heads + 2 x num_query_groups) x kv_channels"
START, END = "fp8.num_layers_at_start_in_bf16", "fp8.num_layers_at_end_in_bf16"
TP2, SP2 = {"fp8": {}, "parallel": {"tp": 2}}, {"fp8": {}, "parallel": {"tp": 2, "sequence_parallel": True}}
BLOCKS = SP2 | {"fp8": {"recipe": "blockwise"}}


@pytest.mark.parametrize(
    ("model", "sizes", "changes", "found"),
    [
        (MODEL, {}, {"fp8": {}, "data.seq_length": 60}, [TOKENS]),
        (MODEL, {}, {**SP2, "data.seq_length": 24}, [TOKENS]),
        (MODEL, {}, BLOCKS, [TOKENS]),
        (MODEL, {"hidden_size": 144}, {**BLOCKS, "data.seq_length": 128}, ["model.hidden_size"]),
        (MODEL, {"hidden_size": 120}, {"fp8": {}}, ["model.hidden_size"]),
        (MODEL, {"ffn_hidden_size": 272}, TP2, ["model.ffn_hidden_size"]),
        (MODEL, {"kv_channels": 20, "num_query_groups": 1}, {"fp8": {}}, [QKV]),
        (MODEL, {"kv_channels": 4, "num_query_groups": 4}, TP2, ["model.num_attention_heads x kv_channels", QKV]),
        (HYBRID, {"mamba": dataclasses.replace(MAMBA, num_heads=8)}, {"fp8": {}}, ["model.mamba (in_proj)"]),
        (HYBRID, {"mamba": dataclasses.replace(MAMBA, num_heads=16, head_dim=1, state_dim=4)}, TP2, ["model.mamba (out_proj)"]),
        (MODEL, {}, {START: 5}, [START, "fp8"]),
        (MODEL, {}, {END: 3, "parallel.pp": 2}, [END]),
        (MODEL, {}, {START: 2, END: 2}, ["fp8"]),
        (MODEL, {}, {"offload.activation_layers": 4}, ["offload.activation_layers"]),
        (HYBRID, {}, {"offload.activation_layers": 1}, ["offload.activation_layers"]),
    ],
)
def test_sizes_that_fp8_or_offloading_cannot_are_named(
    values: dict, model: ModelConfig, sizes: dict, changes: dict, found: list[str]
) -> None:
    assert keys(train.check_model(dataclasses.replace(model, **sizes), changed(values, changes))) == found


@pytest.mark.parametrize(("value", "is_held"), [("1", True), ("0", False)])
def test_megatron_core_lets_transformer_engine_choose_its_attention(values: dict, value: str, is_held: bool) -> None:
    config = changed(values, {"environment": {"NVTE_FUSED_ATTN": value}})
    found = [*precision.check_keys(config), *precision.check_variables(changed(values, {}), {"NVTE_FUSED_ATTN": value, "HOME": "/"})]
    assert {problem.where for problem in found} == (set() if is_held else {"environment.NVTE_FUSED_ATTN"})


@pytest.mark.parametrize(
    ("changes", "machine", "named"),
    [
        ({"fp8": {}}, HOST, "without a CUDA device"),
        ({"offload.optimizer_fraction": 0.5}, HOST, "without a CUDA device"),
        ({"offload.activation_layers": 1}, HOST, "without a CUDA device"),
        ({"cuda_graphs": True}, HOST, "without a CUDA device"),
        ({"offload.activation_layers": 1}, dataclasses.replace(H100, transformer_engine=None), "no Transformer Engine"),
        ({"precision": "bf16"}, dataclasses.replace(H100, transformer_engine=None), "no Transformer Engine"),
        ({"fp8": {}}, dataclasses.replace(H100, transformer_engine=(2, 1)), "Transformer Engine 2.1"),
        ({"fp8.recipe": "blockwise"}, dataclasses.replace(H100, transformer_engine=(2, 2)), "Transformer Engine 2.2"),
        ({"fp8.recipe": "delayed"}, dataclasses.replace(H100, capability=(8, 0)), "compute capability 8.0"),
        ({"fp8.recipe": "blockwise"}, dataclasses.replace(H100, capability=(8, 9)), "compute capability 8.9"),
        ({"fp8.recipe": "blockwise"}, dataclasses.replace(H100, cuda=(12, 8)), "12.8"),
        ({"fp8.recipe": "tensorwise"}, dataclasses.replace(H100, capability=(8, 9), cuda=(12, 8)), None),
        ({"precision": "fp32"}, HOST, None),
        ({"deterministic": True}, HOST, None),
    ],
)
def test_what_a_machine_lacks_is_named(values: dict, changes: dict, machine: Machine, named: str | None) -> None:
    problems = precision.check_machine(changed(values, changes), machine)
    assert len(problems) == (named is not None)
    assert named is None or named in problems[0].found
