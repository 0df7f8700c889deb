"""The memory model against what tiny models hold: weights, gradients and optimizer exactly, activations within 10%."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import MambaConfig, ModelConfig, TrainConfig
from megatron_prism.core.load import build
from megatron_prism.planning import memory
from megatron_prism.planning.predict import checkpoint_bytes
from megatron_prism.planning.stage import Stage

WORKER = Path(__file__).with_name("memory_worker.py")
DENSE = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=1024,
    max_position_embeddings=128,
)
HYBRID = dataclasses.replace(
    DENSE,
    family="nemotron_h",
    num_layers=8,
    layer_pattern="M-M*-M-M",
    activation="relu2",
    position_embedding="none",
    mamba=MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=2, chunk_size=16),
)
TALL = dataclasses.replace(DENSE, num_query_groups=4, ffn_hidden_size=512, tie_word_embeddings=True)
CASES: dict[str, tuple[ModelConfig, dict[str, Any], int, int]] = {
    "dense": (DENSE, {}, 1, 0),
    "dense of fp32": (DENSE, {"precision": "fp32"}, 1, 0),
    "tall, tied": (TALL, {}, 1, 0),
    "tp 2": (DENSE, {"parallel": {"tp": 2, "sequence_parallel": True}}, 2, 0),
    "tp 2 without sequence parallelism": (DENSE, {"parallel": {"tp": 2}}, 2, 0),
    "pp 2, first": (DENSE, {"parallel": {"pp": 2}}, 2, 0),
    "pp 2, last": (DENSE, {"parallel": {"pp": 2}}, 2, 1),
    "pp 2, tied, last": (TALL, {"parallel": {"pp": 2}}, 2, 1),
    "pp 2, vpp 2": (DENSE, {"parallel": {"pp": 2, "vpp": 2}}, 2, 0),
    "cp 2": (DENSE, {"parallel": {"cp": 2}}, 2, 0),
    "dp 4": (DENSE, {}, 4, 0),
    "dp 4 without a distributed optimizer": (DENSE, {"parallel": {"distributed_optimizer": False}}, 4, 0),
    "every layer recomputed": (DENSE, {"recompute": {"granularity": "full"}}, 1, 0),
    "two layers recomputed": (DENSE, {"recompute": {"granularity": "full", "num_layers": 2}}, 1, 0),
    "every layer of fp32 recomputed": (DENSE, {"precision": "fp32", "recompute": {"granularity": "full"}}, 1, 0),
    "every MLP recomputed": (DENSE, {"recompute": {"granularity": "selective", "modules": ["mlp"]}}, 1, 0),
    "hybrid": (HYBRID, {}, 1, 0),
    "hybrid, every MLP recomputed": (HYBRID, {"recompute": {"granularity": "selective", "modules": ["mlp"]}}, 1, 0),
    "hybrid, tp 2": (HYBRID, {"parallel": {"tp": 2, "sequence_parallel": True}}, 2, 0),
}


BASE = {"run_dir": "none", "steps": 1, "data": {"prepared": "none", "seq_length": 64}, "batch": {"global_size": 16, "micro_size": 4}}
Held = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """Return what memory_worker.py measures, in a process of its own: the host's stand-in for CUDA stays there."""
    root = tmp_path_factory.mktemp("held")
    cases = [
        {"name": name, "model": dataclasses.asdict(model), "config": {**BASE, **keys}, "world_size": world_size, "rank": rank}
        for name, (model, keys, world_size, rank) in CASES.items()
    ]
    (root / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run([sys.executable, str(WORKER), str(root)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "held.json").read_text())


def predicted(held: Held, name: str) -> tuple[memory.Memory, float]:
    """Return the memory of a case's rank, and the bytes that it keeps of one microbatch: layers, and the loss on the last stage."""
    model, keys, world_size, rank = CASES[name]
    config = build({**BASE, **keys}, TrainConfig, str)
    grid = config.parallel
    index, dp = rank // (world_size // grid.pp), world_size // (grid.tp * grid.pp * grid.cp)
    stage = Stage(**held[name]["built"][index])
    kept = memory.kept_by_stage(stage, model, config)
    if stage.is_last:  # of the loss its fp32 softmax stays; the final norm's input and output too
        element, split = 4 if config.precision == "fp32" else 2, grid.tp if grid.sequence_parallel else 1
        kept += memory.tokens_of_rank(config) * (4 * model.vocab_size / grid.tp + 2 * element * model.hidden_size / split)
    return memory.of_stage(stage, index, model, config, dp), kept


@pytest.mark.parametrize("name", CASES)
def test_stages_without_building_are_those_that_are_built(held: Held, name: str) -> None:
    assert held[name]["derived"] == held[name]["built"]
    assert all(stage["letters"] for stage in held[name]["built"])


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimizer_are_exact(held: Held, name: str) -> None:
    found, (wanted, _) = held[name], predicted(held, name)
    assert found["weights"] == wanted.weights
    assert found["gradients"] == wanted.gradients
    assert found["buffers"] == pytest.approx(wanted.gradients, rel=0.01)  # padded, for tiny models the more
    padding = 0.01 if CASES[name][2] > 1 else 0.0  # the ranks of a group hold as much only within it
    assert found["optimizer"] == pytest.approx(wanted.optimizer, rel=padding)


@pytest.mark.parametrize("name", CASES)
def test_activations_are_within_a_tenth(held: Held, name: str) -> None:
    found, (_, wanted) = sum(held[name]["kept"]), predicted(held, name)
    print(f"{name}: {found:,} bytes kept, {wanted:,.0f} predicted, {wanted / found - 1:+.1%}")
    assert wanted == pytest.approx(found, rel=0.1)


def test_microbatches_in_flight() -> None:
    def flights(microbatches: int, **grid: Any) -> list[float]:
        config = build({**BASE, "parallel": grid}, TrainConfig, str)
        return [memory.in_flight(config, stage, microbatches) for stage in range(config.parallel.pp)]

    assert flights(8) == [1]
    assert flights(8, pp=4) == [4, 3, 2, 1]
    assert flights(2, pp=4) == [2, 2, 2, 1]  # there are no more
    assert flights(8, pp=4, vpp=2) == [11 / 2, 9 / 2, 7 / 2, 5 / 2]  # chunks of half a stage each
    assert flights(1, pp=4, vpp=2) == [1, 1, 1, 1]


def stage_of(model: ModelConfig, **changes: int) -> Stage:
    whole = Stage("*-" * model.num_layers, True, True, 1000, 1000, 800, 800, 0)
    return dataclasses.replace(whole, **changes)


def test_fp8_keeps_inputs_in_a_byte_and_copies_of_the_weights() -> None:
    bf16, fp8 = (build({**BASE, **keys}, TrainConfig, str) for keys in ({}, {"fp8": {}}))
    stage = stage_of(DENSE, fp8=800)
    assert memory.of_stage(stage, 0, DENSE, fp8, 4).weights == 2 * 1000 + 2 * 800
    param = build({**BASE, "fp8": {"param": True}}, TrainConfig, str)
    assert memory.of_stage(stage, 0, DENSE, param, 4).weights == 2 * 200 + 2 * 800
    saved = memory.kept_by_layer("-", DENSE, bf16) - memory.kept_by_layer("-", DENSE, fp8)
    assert saved == DENSE.hidden_size + DENSE.ffn_hidden_size  # the inputs of both matrices


def test_frozen_parameters_are_weights_alone_and_offloading_takes_its_share() -> None:
    config = build({**BASE, "offload": {"optimizer_fraction": 0.5, "activation_layers": 1}}, TrainConfig, str)
    found = memory.of_stage(stage_of(DENSE, trainable=100), 0, DENSE, config, 1)
    assert (found.weights, found.gradients, found.optimizer) == (2000, 400, 600)
    all_kept = memory.of_stage(stage_of(DENSE), 0, DENSE, build(BASE, TrainConfig, str), 1).activations
    assert found.activations == pytest.approx(all_kept * 3 / 4)


def test_moments_in_bf16_take_half_in_memory_and_in_checkpoints() -> None:
    fp32, bf16 = (build({**BASE, "optimizer": {"moments": kept}}, TrainConfig, str) for kept in ("fp32", "bf16"))
    needs = {config.optimizer.moments: memory.of_stage(stage_of(DENSE, trainable=100), 0, DENSE, config, 2) for config in (fp32, bf16)}
    assert (needs["fp32"].optimizer, needs["bf16"].optimizer) == (600, 400)
    assert dataclasses.replace(needs["bf16"], optimizer=600) == needs["fp32"]
    assert checkpoint_bytes([stage_of(DENSE)], fp32) - checkpoint_bytes([stage_of(DENSE)], bf16) == 4 * 1000


def test_a_window_of_logits_grows_with_what_copies_them() -> None:
    config = build(BASE, TrainConfig, str)
    tokens = memory.tokens_of_rank(config)
    wide = dataclasses.replace(DENSE, vocab_size=128_000)
    assert memory.of_stage(stage_of(wide), 0, wide, config, 1).working == 6 * 128_000 * tokens
    granite = dataclasses.replace(wide, vocab_size=127_999, logits_scaling=8.0)  # one row of padding, and a division
    assert memory.of_stage(stage_of(granite), 0, granite, config, 1).working == 10 * 128_000 * tokens
    chunked = dataclasses.replace(config, logits_chunk_tokens=tokens // 4)
    assert memory.of_stage(stage_of(wide), 0, wide, chunked, 1).working == 6 * 128_000 * tokens // 4
    assert (
        memory.of_stage(stage_of(wide), 0, wide, dataclasses.replace(config, logits_chunk_tokens=10 * tokens), 1).working
        == 6 * 128_000 * tokens
    )


def test_working_memory_by_hand() -> None:
    """The largest layer's gradients, the recomputed layer, the gathered sequence under tp, and the states of a Mamba layer; no logits but on the last stage."""
    inner = dataclasses.replace(stage_of(DENSE), is_last=False)
    plain, full = (build({**BASE, **keys}, TrainConfig, str) for keys in ({}, {"recompute": {"granularity": "full"}}))
    tokens = memory.tokens_of_rank(plain)
    attention, mlp = (memory.kept_by_layer(letter, DENSE, plain) for letter in "*-")
    assert memory.of_stage(inner, 0, DENSE, plain, 1).working == max(attention, mlp) * tokens
    assert memory.of_stage(inner, 0, DENSE, full, 1).working == (attention + mlp + max(attention, mlp)) * tokens
    split = build({**BASE, "parallel": {"tp": 2}}, TrainConfig, str)
    largest = max(memory.kept_by_layer(letter, DENSE, split) for letter in "*-")
    assert memory.of_stage(inner, 0, DENSE, split, 1).working == (largest + 2 * 2 * DENSE.hidden_size) * tokens
    mamba = dataclasses.replace(inner, letters="M")
    states = 8 * 128 * 16 / 16 + 2 * 2 * 128  # 128 channels, 16 states, of chunks of 16 tokens
    assert memory.of_stage(mamba, 0, HYBRID, plain, 1).working == (memory.kept_by_layer("M", HYBRID, plain) + states) * tokens


def test_what_attention_keeps_under_recompute_and_fp8() -> None:
    plain, selective, fp8 = (
        memory.kept_by_layer("*", DENSE, build({**BASE, **keys}, TrainConfig, str))
        for keys in ({}, {"recompute": {"granularity": "selective", "modules": ["core_attn"]}}, {"fp8": {}})
    )
    assert plain - selective == 4 * DENSE.num_attention_heads
    assert plain - fp8 == DENSE.hidden_size - DENSE.num_attention_heads * DENSE.kv_channels  # the next layer's own copy of the output


def test_microbatches_groups_and_chunks_count() -> None:
    def of(num_layers: int | None = None, **grid: Any) -> tuple[memory.Memory, float]:
        recompute = {"granularity": "full", "num_layers": num_layers} if num_layers else {}
        config = build({**BASE, "parallel": grid, "recompute": recompute}, TrainConfig, str)
        return memory.of_stage(stage_of(DENSE), 0, DENSE, config, 1), memory.kept_by_stage(stage_of(DENSE), DENSE, config)

    deep, kept = of(pp=8)
    assert deep.activations == 4 * kept, "16 sequences are 4 microbatches of 4"
    halves, _ = of(cp=2)
    groups = (halves.allowance - memory.FRAGMENTATION * (halves.activations + halves.working)) / memory.GIB - memory.CONTEXT_GIB
    assert groups == pytest.approx(2 * memory.GROUP_GIB), "of context parallelism, and of the gradients over it"
    assert of(1, pp=2, vpp=2)[1] == of(2, pp=2)[1], "so many layers of each chunk"
