"""The time model: what adds up, what must grow, and figures made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_prism.core.config import MambaConfig, ModelConfig, TrainConfig
from megatron_prism.core.load import build
from megatron_prism.planning import throughput
from megatron_prism.planning.gpus import H100
from megatron_prism.planning.predict import checkpoint_bytes, figures, predict, write_bytes_s
from megatron_prism.planning.stage import Stage, letters_of, of_sizes

MODEL = ModelConfig(
    family="llama",
    num_layers=8,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=131072,
)
LAYER = 218_112_000  # about: what one layer multiplies
BASE: dict[str, Any] = {"run_dir": "none", "steps": 100, "data": {"prepared": "none", "seq_length": 8192}, "batch": {"global_size": 128}}


def config_of(**keys: Any) -> TrainConfig:
    return build({**BASE, **keys}, TrainConfig, str)


def pipeline(pp: int, **changes: Any) -> list[Stage]:
    size = LAYER * MODEL.num_layers // pp
    stage = Stage("*-" * (MODEL.num_layers // pp), False, False, size, size, size, size, 0)
    return [dataclasses.replace(stage, is_first=index == 0, is_last=index == pp - 1, **changes) for index in range(pp)]


def seconds(pp: int = 1, world_size: int = 8, **keys: Any) -> throughput.StepTime:
    return throughput.of_step(pipeline(pp), MODEL, config_of(**keys), world_size)


def test_matrix_products_by_hand() -> None:
    """6 FLOPs a parameter and token, at the rate that is said, of 8 layers and the output layer."""
    tokens_a_gpu = 128 * 8192 / 8
    flops = 6 * tokens_a_gpu * (8 * LAYER + 4096 * 128256)
    found = seconds()
    assert found.matmul_s == pytest.approx(flops / (0.60 * 989e12))
    assert found.tensor_s == found.context_s == found.pipeline_s == found.recompute_s == found.scan_s == 0


def test_fp8_makes_the_layers_faster_and_nothing_else() -> None:
    bf16, fp8 = seconds(), seconds(fp8={})
    assert fp8.matmul_s < bf16.matmul_s and fp8.elementwise_s < bf16.elementwise_s  # it keeps fewer bytes
    assert fp8.attention_s == bf16.attention_s


def test_a_pipeline_waits_for_its_slowest_stage_and_chunks_make_the_bubble_smaller() -> None:
    plain, chunks = (seconds(4, parallel={"pp": 4, "vpp": vpp}) for vpp in (None, 2))
    assert chunks.pipeline_s == pytest.approx(plain.pipeline_s / 2)
    stages = pipeline(4)
    uneven = [*stages[:3], dataclasses.replace(stages[3], matrices=2 * stages[3].matrices, trainable_matrices=2 * stages[3].matrices)]
    assert throughput.of_step(uneven, MODEL, config_of(parallel={"pp": 4}), 8).matmul_s > 1.4 * plain.matmul_s
    few = seconds(4, parallel={"pp": 4}, batch={"global_size": 16})
    assert few.pipeline_s == plain.pipeline_s and few.step_s < plain.step_s  # the bubble stays, and weighs more


def test_tensor_parallelism_leaves_the_node_at_a_price() -> None:
    within, beyond = (seconds(world_size=16, parallel={"tp": tp, "sequence_parallel": True}) for tp in (8, 16))
    assert 0 < within.tensor_s < within.matmul_s
    assert beyond.tensor_s > 5 * within.tensor_s


def test_attention_hides_the_passing_of_keys_and_values_where_it_is_long() -> None:
    assert seconds(parallel={"cp": 8}).context_s == 0
    short = config_of(parallel={"cp": 16}, data={"prepared": "none", "seq_length": 2048}, batch={"global_size": 8})
    assert throughput.of_step(pipeline(1), MODEL, short, 16).context_s > 0  # between nodes, and few scores to hide behind


def test_recompute_and_frozen_layers() -> None:
    none, half, whole = (seconds(recompute=keys) for keys in ({}, {"granularity": "full", "num_layers": 4}, {"granularity": "full"}))
    assert none.recompute_s == 0 and whole.recompute_s == pytest.approx(2 * half.recompute_s)
    assert whole.recompute_s < none.step_s / 3
    frozen = throughput.of_step(pipeline(1, trainable_matrices=0), MODEL, config_of(), 8)
    output = 6 * 131072 * 4096 * 128256 / (0.60 * 989e12)
    assert frozen.matmul_s - output == pytest.approx((none.matmul_s - output) * 2 / 3)  # no gradients of weights


def test_gradients_are_exchanged_once_a_step_unless_they_are_hidden() -> None:
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    alone, hidden, single = seconds(), seconds(parallel=overlap), seconds(world_size=1)
    assert alone.data_s > 0 == hidden.data_s == single.data_s
    within, between = seconds(world_size=8), seconds(world_size=64)
    assert between.data_s > within.data_s * 63 / 64  # a ring over nodes is no faster
    assert seconds(offload={"optimizer_fraction": 0.5}).optimizer_s > alone.optimizer_s
    assert seconds(parallel={"distributed_optimizer": False}).optimizer_s == pytest.approx(8 * alone.optimizer_s)


def test_gradients_in_bf16_are_half_of_what_is_exchanged() -> None:
    """4 bytes of gradients and 2 of weights, then 2 and 2."""
    fp32, bf16 = seconds(), seconds(parallel={"grad_reduce": "bf16"})
    assert bf16.data_s / fp32.data_s == pytest.approx(4 / 6)


def test_a_mamba_layer_scans_and_exchanges_tokens_for_heads() -> None:
    mamba = MambaConfig(num_heads=128, head_dim=64, state_dim=128, num_groups=8)
    hybrid = dataclasses.replace(MODEL, layer_pattern="M-M-M-M-", mamba=mamba, position_embedding="none")
    stage = [dataclasses.replace(pipeline(1)[0], letters="M-M-M-M-")]
    one, two = (throughput.of_step(stage, hybrid, config_of(parallel={"cp": cp}), 8) for cp in (1, 2))
    assert one.scan_s > 0 and one.attention_s == 0 == one.context_s < two.context_s


def test_the_figures_hang_together() -> None:
    config = config_of(parallel={"overlap_grad_reduce": True})
    found = figures(predict(pipeline(1), MODEL, config, 8), config, 8, usd_per_gpu_hour=2.0)
    assert found["tokens"] == 100 * 128 * 8192
    assert found["tokens_per_s_per_gpu"] * 8 * found["step_s"] == pytest.approx(128 * 8192)
    assert found["gpu_hours"] == pytest.approx(8 * 100 * found["step_s"] / 3600) == pytest.approx(8 * found["hours"])
    assert found["usd"] == 2 * found["gpu_hours"]
    assert found["mfu_causal"] < found["mfu_full"] < 1
    assert found["tflops_per_gpu_full"] == pytest.approx(found["mfu_full"] * 989)
    assert found["memory_gib_per_gpu_max"] == max(stage["total_gib"] for stage in found["stages"])
    parts = ("weights", "gradients", "optimizer", "activations", "working", "allowance")
    assert found["stages"][0]["total_gib"] == pytest.approx(sum(found["stages"][0][f"{part}_gib"] for part in parts))
    assert checkpoint_bytes(pipeline(2), config_of(parallel={"tp": 2, "pp": 2})) == 2 * 14 * LAYER * 8


def test_what_a_stage_is() -> None:
    sizes = {
        "embedding.word_embeddings.weight": 100,
        "decoder.layers.0.self_attention.linear_qkv.weight": 30,
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": 4,
        "decoder.layers.0.mlp.linear_fc1.weight": 50,
    }
    found = of_sizes(sizes, "*-", True, False, config_of(trainable=["*.self_attention.*"], fp8={}))
    assert found == Stage("*-", True, False, parameters=184, trainable=34, matrices=80, trainable_matrices=30, fp8=80)
    assert of_sizes(sizes, "*-", True, False, config_of()).fp8 == 0
    assert letters_of(MODEL, [0, 1]) == "*-*-"
    assert letters_of(dataclasses.replace(MODEL, layer_pattern="M-*-M-M-"), [2, 3, 4]) == "*-M"


def test_recomputed_mlps_cost_their_share_of_the_forward_pass() -> None:
    def of(**recompute: Any) -> throughput.StepTime:
        return throughput.of_step(pipeline(1), MODEL, config_of(recompute=recompute), 8)

    none, mlp, full = of(), of(granularity="selective", modules=["mlp"]), of(granularity="full")
    share = 3 * 4096 * 14336 / LAYER
    assert none.recompute_s == 0 and 0.5 * share < mlp.recompute_s / full.recompute_s < share
    assert mlp.elementwise_s == none.elementwise_s, "what is made again is passed through memory all the same"


def test_a_microbatch_by_hand() -> None:
    """Of a stage in the middle, whose recomputed forward pass is a third of all that it does; then what the last stage adds."""

    def of(is_last: bool = False, **keys: Any) -> dict[str, float]:
        stage = dataclasses.replace(pipeline(1)[0], is_last=is_last)
        return throughput.microbatch(stage, MODEL, config_of(**keys), throughput.ATTENTION, H100)

    full = of(recompute={"granularity": "full"})
    assert full["recompute_s"] == pytest.approx(sum(full[name] for name in ("matmul_s", "attention_s", "elementwise_s")) / 3)
    product = 8192 * 4096 * 128256 / (0.60 * 989e12)
    last, chunked = of(True), of(True, logits_chunk_tokens=1024)
    assert last["matmul_s"] - full["matmul_s"] == pytest.approx(6 * product)
    assert chunked["matmul_s"] - full["matmul_s"] == pytest.approx(8 * product), "the logits are computed again"
    moved = 8192 * 4 * 6 * 128256 / (H100.hbm_bytes_s * throughput.HBM)
    assert last["elementwise_s"] - full["elementwise_s"] == pytest.approx(moved)
    short = of(parallel={"tp": 2, "cp": 8}, data={"prepared": "none", "seq_length": 2048})
    keys_bytes = 2 * 8 * 128 * 2 / 2 * 8  # keys and values of 8 groups in bf16, on one of 2 tp ranks, of 8 layers
    passed = 2048 / 8 * 3 * 7 * keys_bytes / throughput.INFINIBAND_BYTES_S  # 16 ranks leave the node
    assert short["context_s"] == pytest.approx(passed - short["attention_s"]) and short["context_s"] > 0


def test_the_bubble_and_the_exchange_of_gradients_by_hand() -> None:
    config = config_of(parallel={"pp": 4})
    each = [sum(throughput.microbatch(stage, MODEL, config, throughput.ATTENTION, H100).values()) for stage in pipeline(4)]
    assert seconds(4, parallel={"pp": 4}).pipeline_s == pytest.approx(3 * sum(each) / 4)
    within = seconds(parallel={"tp": 2}).data_s  # the 4 replicas of a node whose GPUs are paired
    assert within == pytest.approx((4 + 2) * 8 * LAYER * 3 / 4 / throughput.NVLINK_BYTES_S)
    part = seconds(parallel={"distributed_optimizer": False}).optimizer_s
    assert part == pytest.approx((18 + 4 * 4) * 8 * LAYER / (H100.hbm_bytes_s * throughput.HBM))


def test_what_fits_is_the_fullest_stage_and_all_nodes_write() -> None:
    config = config_of(parallel={"pp": 2})
    stages = pipeline(2)
    assert predict(stages, MODEL, config, 8).fits
    full = [dataclasses.replace(stages[0], parameters=60 * 10**9), stages[1]]
    assert not predict(full, MODEL, config, 8).fits
    assert [write_bytes_s(size) / write_bytes_s(8) for size in (1, 8, 64)] == [1, 1, 8]
    frozen = [dataclasses.replace(stage, trainable=0) for stage in stages]
    assert checkpoint_bytes(frozen, config) == 2 * LAYER * 8, "what is not trained has weights alone"
