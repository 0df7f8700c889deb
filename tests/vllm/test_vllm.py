"""vLLM beside the trainer: the gate at the start and after each update, for every family. By hand: tools/test_vllm.sh. Skipped where vLLM is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.rl.gate import BOUNDS
from tests.parity.tiny import FAMILIES, random_model
from tests.vllm import on_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: tools/test_vllm.sh")
SIZES: dict[str, dict[str, Any]] = {  # vLLM has no kernel for smaller heads on a host
    "mistral": {"head_dim": 32},
    "mistral_small": {"head_dim": 64},
    "nemotron_h": {"head_dim": 32},
    "granite_h_micro": {"mamba_n_heads": 16},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from megatron_prism.jobs import convert

    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            root = made[family] = tmp_path_factory.mktemp(family)
            random_model(family, hidden_size=128, **SIZES.get(family, {})).save_pretrained(root / "hf")
            convert.run_import(root / "hf", root / "ckpt", dry_run=False)
        return made[family] / "ckpt"

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_trainers_sampler_at_the_start_and_after_each_update(run_distributed: Any, checkpoint: Any, family: str) -> None:
    (said,) = run_distributed(on_ranks.trusted, 1, timeout_s=400.0, ckpt=str(checkpoint(family)))
    print(family, said["trusts"])
    assert len(said["trusts"]) == 3 and all(kl < BOUNDS["fp32"].kl and most < BOUNDS["fp32"].difference for kl, most, _ in said["trusts"])
    assert said["num_updates"] == 3  # not once more for the calls without a change
    assert said["again"] and said["tokens"] != said["other"] and said["order"] == [[p, s] for p in range(4) for s in range(2)]
    assert said["greedy"] == said["cached"]
    assert said["ended"][0] == "end_token" and said["ended"][1:] == [True, True, 1]
    assert said["full"] == ["max_context", 5]
    assert said["generators"]
    for same, flat, num_logprobs in said["distances"].values():  # by temperature and top_p, and by top_k
        assert same < 0.1 < 0.4 < flat and num_logprobs == 0


def test_bf16_is_within_its_bound(run_distributed: Any, checkpoint: Any) -> None:
    (said,) = run_distributed(on_ranks.trusted, 1, timeout_s=400.0, ckpt=str(checkpoint("llama")), precision="bf16")
    print("bf16", said["trusts"])
    assert all(0 < kl < BOUNDS["bf16"].kl and most < BOUNDS["bf16"].difference for kl, most, _ in said["trusts"])


@pytest.mark.parametrize(
    ("family", "parallel", "tensor_parallel"),
    [
        ("llama", {"tp": 2, "sequence_parallel": True}, 2),
        ("llama", {"pp": 2}, 1),
        ("llama", {}, 1),
        ("llama", {"pp": 2}, 2),
        ("nemotron_h", {"tp": 2, "sequence_parallel": True}, 2),
    ],
    ids=["tp2-tp2", "pp2-dp2", "dp2-dp2", "pp2-tp2", "hybrid-tp2-tp2"],
)
def test_layouts(run_distributed: Any, checkpoint: Any, family: str, parallel: dict[str, Any], tensor_parallel: int) -> None:
    own = {"ckpt": str(checkpoint(family)), "tensor_parallel": tensor_parallel, "num_updates": 1}
    one, other = run_distributed(on_ranks.trusted, 2, timeout_s=400.0, parallel=parallel, **own)
    print(family, parallel, tensor_parallel, one["trusts"], "alone", one["alone"] == one["tokens"][4:6])
    assert one == other
    assert all(kl < BOUNDS["fp32"].kl and most < BOUNDS["fp32"].difference for kl, most, _ in one["trusts"])
    assert one["greedy"] == one["cached"]


FAULTS = {
    "llama": [
        ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"],
        ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"],
        ["model.layers.0.input_layernorm.weight", "model.layers.2.input_layernorm.weight"],
        ["lm_head.weight"],
    ],
    "granite_h_micro": [
        ["model.layers.0.mamba.A_log", "model.layers.2.mamba.A_log"],
        ["model.layers.0.mamba.conv1d.weight", "model.layers.2.mamba.conv1d.weight"],
        ["model.embed_tokens.weight"],  # and with it the tied head
    ],
}


@pytest.mark.parametrize("family", FAULTS)
def test_a_tensor_that_vllm_does_not_hold_is_named(run_distributed: Any, checkpoint: Any, family: str) -> None:
    (said,) = run_distributed(on_ranks.faulty, 1, timeout_s=400.0, ckpt=str(checkpoint(family)), faults=FAULTS[family])
    print(family, said)
    for names in FAULTS[family]:
        assert "does not hold the trainer's weights" in said[" ".join(names)]
        assert all(name in said[" ".join(names)] for name in names)
    assert (said["no repacked head"][0] > 1e-6) == (family == "granite_h_micro")  # tied: the sums are right, and the gate sees it
    assert said["stale"][0] > 1e-6 > BOUNDS["fp32"].kl > said["healed"][0]
