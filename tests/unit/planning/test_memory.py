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
from megatron_prism.jobs import plan
from megatron_prism.planning import memory

WORKER = Path(__file__).with_name("memory_worker.py")
DENSE = ModelConfig(family="llama", num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, num_query_groups=2, kv_channels=16,
                    vocab_size=1024, max_position_embeddings=128)  # fmt: skip
HYBRID = dataclasses.replace(DENSE, family="nemotron_h", num_layers=8, layer_pattern="M-M*-M-M", activation="relu2", position_embedding="none",
                             mamba=MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=2, chunk_size=16))  # fmt: skip
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
    "hybrid": (HYBRID, {}, 1, 0),
    "hybrid, tp 2": (HYBRID, {"parallel": {"tp": 2, "sequence_parallel": True}}, 2, 0),
}


def config_of(keys: dict[str, Any]) -> TrainConfig:
    base = {"run_dir": "none", "steps": 1, "data": {"prepared": "none", "seq_length": 64}, "batch": {"global_size": 16, "micro_size": 4}}
    return build({**base, **keys}, TrainConfig, str)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("held")
    base = {"run_dir": "none", "steps": 1, "data": {"prepared": "none", "seq_length": 64}, "batch": {"global_size": 16, "micro_size": 4}}
    cases = [{"name": name, "model": dataclasses.asdict(model), "config": {**base, **keys}, "world_size": world_size, "rank": rank}
             for name, (model, keys, world_size, rank) in CASES.items()]  # fmt: skip
    (root / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run([sys.executable, str(WORKER), str(root)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "held.json").read_text())


def predicted(name: str) -> tuple[memory.Memory, float]:
    """Return the memory of a case's rank, and the bytes that it keeps of one microbatch: layers, and the loss on the last stage."""
    model, keys, world_size, rank = CASES[name]
    config = config_of(keys)
    grid = config.parallel
    index = rank // (world_size // grid.pp)
    stage = plan.derived(model, config)[index]
    dp = world_size // (grid.tp * grid.pp * grid.cp)
    kept = memory._kept_by_stage(stage, model, config)
    if stage.is_last:  # of the loss its fp32 softmax stays; the final norm's input and output too
        tokens, rows = memory.tokens_of_rank(config), model.vocab_size
        element, split = memory._element(config), memory._sequence_split(config)
        kept += tokens * (4 * rows / grid.tp + 2 * element * model.hidden_size / split)
    return memory.of_stage(stage, index, model, config, dp), kept


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimizer_are_exact(held: dict[str, dict[str, Any]], name: str) -> None:
    found, (wanted, _) = held[name], predicted(name)
    assert found["weights"] == wanted.weights
    assert found["gradients"] == wanted.gradients
    assert found["buffers"] == pytest.approx(wanted.gradients, rel=0.01)  # padded, for tiny models the more
    padding = 0.01 if CASES[name][2] > 1 else 0.0  # the ranks of a group hold as much only within it
    assert found["optimizer"] == pytest.approx(wanted.optimizer, rel=padding)


@pytest.mark.parametrize("name", CASES)
def test_activations_are_within_a_tenth(held: dict[str, dict[str, Any]], name: str) -> None:
    found, (_, wanted) = sum(held[name]["kept"]), predicted(name)
    print(f"{name}: {found:,} bytes kept, {wanted:,.0f} predicted, {wanted / found - 1:+.1%}")
    assert wanted == pytest.approx(found, rel=0.1)
