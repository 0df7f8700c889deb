"""How an architecture becomes a Megatron model, and how the next token is chosen."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.models.build import uneven_ends, uneven_stages
from megatron_prism.models.generate import Sampling, choose

CONFIGS = """
import json, torch, types
from megatron_prism.parallel import host
host.install()
from megatron_prism.core.errors import InputError
from megatron_prism.models import multipliers
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig, RecomputeConfig
from megatron_prism.models.build import transformer_config

model = ModelConfig(family="llama", num_layers=5, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=2,
                    kv_channels=16, vocab_size=390, max_position_embeddings=128, norm_epsilon=3e-6)
layouts = {"one": {}, "pp2": {"pp": 2}, "vpp2": {"pp": 2, "vpp": 2}, "tp2": {"tp": 2, "sequence_parallel": True}}
names = ("batch_p2p_comm", "overlap_p2p_comm", "virtual_pipeline_model_parallel_size", "calculate_per_token_loss", "layernorm_epsilon",
         "sequence_parallel", "recompute_method", "recompute_num_layers", "hidden_dropout", "attention_dropout", "bf16", "add_bias_linear")
found = {}
for name, layout in layouts.items():
    config = transformer_config(model, GangConfig(parallel=ParallelConfig(**layout)))
    found[name] = {key: getattr(config, key) for key in names}
for name, recompute in {"all": {}, "some": {"num_layers": 2}}.items():
    config = transformer_config(model, GangConfig(precision="fp32", recompute=RecomputeConfig(granularity="full", **recompute)))
    found[name] = {key: getattr(config, key) for key in names}
granite = ModelConfig(**{**vars(model), "logits_scaling": 8.0})
for name, settings in {"native": {}, "te": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
                       "linear": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "linear"}}.items():
    chunk = torch.nn.Module()
    chunk.output_layer, chunk.config = torch.nn.Linear(2, 2), types.SimpleNamespace(**{"cross_entropy_loss_fusion": False, "cross_entropy_fusion_impl": "native", **settings})
    try:
        multipliers.scale_ends(chunk, granite, False, True)
        found[name] = len(chunk.output_layer._forward_hooks)
    except InputError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what CONFIGS prints, from a process of its own: the host's stand-in for CUDA stays there."""
    done = subprocess.run([sys.executable, "-c", CONFIGS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def configs(found: dict[str, Any]) -> dict[str, dict]:
    """Return TransformerConfigs by layout."""
    return {name: value for name, value in found.items() if isinstance(value, dict)}


@pytest.fixture
def losses(found: dict[str, Any]) -> dict[str, Any]:
    """Return the output layer's hooks by fused loss, or why it was refused."""
    return {name: value for name, value in found.items() if not isinstance(value, dict)}


def test_with_model_chunks_messages_are_never_batched(configs: dict[str, dict]) -> None:
    """Two batched messages between the same two ranks are paired wrongly at pp 2: wrong gradients, silently."""
    found = {name: (config["batch_p2p_comm"], config["overlap_p2p_comm"]) for name, config in configs.items()}
    assert found.pop("vpp2") == (False, True)
    assert set(found.values()) == {(True, False)}


def test_config_carries_what_a_llama_is(configs: dict[str, dict]) -> None:
    for config in configs.values():
        assert config["calculate_per_token_loss"] is True and config["layernorm_epsilon"] == 3e-6 and not config["add_bias_linear"]
        assert config["hidden_dropout"] == config["attention_dropout"] == 0.0
    assert (configs["tp2"]["sequence_parallel"], configs["one"]["sequence_parallel"]) == (True, False)
    assert (configs["one"]["bf16"], configs["all"]["bf16"]) == (True, False)
    recompute = {name: (configs[name]["recompute_method"], configs[name]["recompute_num_layers"]) for name in ("one", "all", "some")}
    assert recompute == {"one": (None, None), "all": ("uniform", 1), "some": ("block", 2)}


def test_a_fused_loss_that_skips_the_output_layer_is_refused_with_granite(losses: dict[str, Any]) -> None:
    assert losses["native"] == losses["te"] == 1
    assert "cross_entropy_fusion_impl: found linear; required the logits divided by logits_scaling 8.0" in losses["linear"]


def test_stages_of_five_layers_on_two_and_four_stages() -> None:
    assert uneven_stages(6, 2) is None and uneven_stages(1, 1) is None
    assert uneven_stages(5, 2) == [["embedding", "decoder", "decoder", "decoder"], ["decoder", "decoder", "loss"]]
    assert uneven_stages(5, 4) == [["embedding", "decoder", "decoder"], ["decoder"], ["decoder"], ["decoder", "loss"]]


@given(num_stages=st.integers(2, 12), data=st.data())
def test_stages_hold_every_layer_once_and_stages_differ_by_one(num_stages: int, data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(num_stages, 60))
    stages = uneven_stages(num_layers, num_stages)
    assert (stages is None) == (num_layers % num_stages == 0)
    if stages is not None:
        counts = [stage.count("decoder") for stage in stages]
        assert len(stages) == num_stages and sum(counts) == num_layers
        assert max(counts) - min(counts) == 1 and counts == sorted(counts, reverse=True)
        assert stages[0][0] == "embedding" and stages[-1][-1] == "loss" and sum(map(len, stages)) == num_layers + 2


@given(num_stages=st.integers(1, 12), data=st.data())
def test_a_hybrids_uneven_ends(num_stages: int, data: st.DataObject) -> None:
    """Every stage holds a layer, and only the two ends differ from the rest: what MambaStack and TransformerLayer cut by."""
    num_layers = data.draw(st.integers(num_stages, 60))
    first, last = uneven_ends(num_layers, num_stages)
    if num_layers % num_stages == 0:
        assert (first, last) == (None, None)
    elif num_stages > 1:
        assert first is not None and last is not None and first >= last >= 1
        middle = num_layers - first - last
        assert (middle == 0) if num_stages == 2 else (middle % (num_stages - 2) == 0 and middle // (num_stages - 2) >= 1)


def test_nemotron_h_on_eight_stages() -> None:
    assert uneven_ends(52, 8) == (5, 5)  # and seven each between
    assert uneven_ends(5, 4) == (2, 1) and uneven_ends(9, 2) == (5, 4)


LOGITS = torch.tensor([1.0, 3.0, 2.0, -5.0])


def drawn(sampling: Sampling, count: int = 400) -> dict[int, float]:
    """Return the share of each token among many choices."""
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = [int(choose(LOGITS, sampling, generator)) for _ in range(count)]
    return {token: tokens.count(token) / count for token in set(tokens)}


def test_greedy_takes_the_likeliest() -> None:
    assert drawn(Sampling(), 3) == {1: 1.0}


@pytest.mark.parametrize(("top_p", "tokens"), [(0.0, {1}), (0.5, {1}), (0.7, {1, 2}), (0.95, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p: float, tokens: set[int]) -> None:
    """The probabilities are 0.665, 0.245, 0.090, 0.0002."""
    assert set(drawn(Sampling(1.0, top_p))) == tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_shapes_the_shares(temperature: float) -> None:
    wanted = torch.softmax(LOGITS / temperature, 0)
    found = drawn(Sampling(temperature), 2000)
    assert all(abs(found.get(token, 0) - float(wanted[token])) < 0.05 for token in range(4))


def test_a_seed_decides_the_choice() -> None:
    assert drawn(Sampling(1.0, seed=1)) == drawn(Sampling(1.0, seed=1)) != drawn(Sampling(1.0, seed=2))
