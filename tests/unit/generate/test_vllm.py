"""What the vLLM engine refuses, and under which parameter of vLLM's it looks for a Hugging Face tensor. Without vLLM."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.config.rl import RolloutConfig, VLLMConfig
from megatron_prism.core.errors import BackendMissing, ResultFailure
from megatron_prism.families import registry
from megatron_prism.generate import engines, vllm, vllm_weights
from megatron_prism.generate.engine import Sampling

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "in_proj": ["in_proj"]}


def rollout(tensor_parallel: int | None = None, **values: Any) -> RolloutConfig:
    return RolloutConfig(engine="vllm", max_tokens=8, vllm=VLLMConfig(tensor_parallel=tensor_parallel), **values)


def test_a_layout_that_does_not_divide_is_named(nemotron: ModelConfig) -> None:
    assert engines.check(rollout(), nemotron, 1, tp=1) == []
    wrong = engines.check(rollout(3), nemotron, 4, tp=1)
    assert engines.check(rollout(), nemotron, 4, tp=3) == wrong  # the trainer's, where it names none
    assert [problem.where for problem in wrong] == ["rollout.vllm.tensor_parallel"] * 3  # ranks, query groups, the mixers' groups
    assert [problem.where for problem in engines.check(rollout(3), nemotron, 4, tp=1, section="")] == ["vllm.tensor_parallel"] * 3
    assert "4 ranks" in wrong[0].required and "query groups" in wrong[1].required and "mixers'" in wrong[2].required


def test_log_probabilities_are_those_of_temperature_1_or_none() -> None:
    assert all(vllm.has_logprobs(Sampling(max_tokens=1, temperature=temperature)) for temperature in (0, 1.0))
    for own in ({"temperature": 0.6}, {"temperature": 1.0, "top_p": 0.95}, {"temperature": 1.0, "top_k": 5}):
        assert not vllm.has_logprobs(Sampling(max_tokens=1, **own))


def test_vllm_sees_the_expandable_segments_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks under the older name alone. Where it does not see them its sleep gives no memory back."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert vllm._environment() == vllm.ENVIRONMENT
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert vllm._environment() == vllm.ENVIRONMENT | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def test_without_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match="vllm is not installed; it is needed for engine: vllm"):
        vllm.require()


def test_every_tensor_has_its_place_in_vllm(nemotron: ModelConfig) -> None:
    shapes = {name: shape for rule in registry.rules(nemotron) for name, shape in rule.hf}
    parts = vllm_weights.parts(shapes, {"qkv_proj": PACKED["qkv_proj"]})
    attention = nemotron.layer_pattern.index("*") if nemotron.layer_pattern else 0
    held = [name for name, _ in parts[f"model.layers.{attention}.mixer.qkv_proj.weight"]]
    assert held == [f"backbone.layers.{attention}.mixer.{part}.weight" for part in PACKED["qkv_proj"]]
    assert "model.layers.0.mixer.A" in parts and "model.embed_tokens.weight" in parts
    assert sorted(name for of in parts.values() for name, _ in of) == sorted(shapes)
    assert any(name.endswith(".up_proj.weight") for name in parts)  # no gate beside it, so vLLM does not pack it
    dense = vllm_weights.parts({"a.up_proj.weight": (2, 3), "a.gate_proj.weight": (2, 3)}, PACKED)
    assert [name for name, _ in dense["a.gate_up_proj.weight"]] == ["a.gate_proj.weight", "a.up_proj.weight"]


def test_a_tensor_is_summed_as_vllm_holds_it() -> None:
    values = torch.tensor([0.5, 1.5])
    assert torch.equal(vllm_weights.as_held("model.layers.0.mamba.A_log", values.bfloat16(), torch.bfloat16), -values.exp())
    assert vllm_weights.as_held("model.norm.weight", values, torch.bfloat16).dtype == torch.bfloat16


def test_an_answer_that_did_not_end_is_no_rollout() -> None:
    class Output:
        token_ids, logprobs, finish_reason = [7], [{7: type("Logprob", (), {"logprob": -1.0})}], "abort"

    with pytest.raises(ResultFailure, match="ended sample 2 of prompt 1 with 'abort'"):
        vllm._rollout(1, 2, 0, Output, Sampling(max_tokens=4))
    for reason, most, ending in (("stop", 4, "end_token"), ("length", 1, "max_tokens"), ("length", 4, "max_context")):
        Output.finish_reason = reason
        assert vllm._rollout(1, 2, 0, Output, Sampling(max_tokens=most)).ended == ending


@pytest.fixture
def nemotron(presets: dict[str, ModelConfig]) -> ModelConfig:
    return presets["nemotron-h-8b"]
