"""Mixtures of experts are refused by name; a config that only names a count of none is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_prism.core.errors import CheckpointError
from megatron_prism.families import registry

HYBRID = {"shared_intermediate_size": 96, "layer_types": ["full_attention"] * 2}
NEMOTRON = {"layers_block_type": ["mamba", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16, "layer_norm_epsilon": 1e-5}


Read = Callable[..., Any]


@pytest.fixture
def read(needed: dict[str, Any]) -> Read:
    """Return a function that reads the config.json of a class with some more keys."""

    def read_config(kind: str, **keys: Any) -> Any:
        config = {**needed, **keys, "architectures": [f"{kind}ForCausalLM"]}
        return registry.of_hf(config, "config").read_config(config, "config")

    return read_config


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        ("Mixtral", {"num_local_experts": 8}, ["architectures", "num_local_experts"]),
        ("GraniteMoe", {"num_local_experts": 62}, ["architectures", "num_local_experts"]),
        ("Qwen2Moe", {"num_experts": 60}, ["architectures", "num_experts"]),
        ("Qwen3Moe", {}, ["architectures"]),
        ("DeepseekV3", {"n_routed_experts": 256}, ["architectures", "n_routed_experts"]),
        ("Llama", {"num_local_experts": 8}, ["num_local_experts"]),
        ("Mistral", {"moe_num_experts": "8"}, ["moe_num_experts"]),
        ("Qwen2", {"num_experts": 1}, ["num_experts"]),
        ("GraniteMoeHybrid", {**HYBRID, "num_local_experts": 8}, ["num_local_experts"]),
        ("GraniteMoeHybrid", HYBRID, ["num_local_experts"]),  # silent: 8, as transformers has it
        ("NemotronH", {**NEMOTRON, "layers_block_type": ["mamba", "moe"]}, ["layers_block_type"]),
        ("NemotronH", {"hybrid_override_pattern": "M-ME", "mamba_num_heads": 8, "mamba_head_dim": 16}, ["hybrid_override_pattern"]),
    ],
)
def test_experts_are_refused_by_their_key(read: Read, kind: str, keys: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(kind, **keys)
    about_experts = [problem.where for problem in caught.value.problems if "experts are not supported" in problem.fix]
    assert about_experts == [f"config:{key}" for key in named]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Llama", {"num_local_experts": 0, "num_experts": None}),
        ("GraniteMoeHybrid", {**HYBRID, "num_local_experts": 0}),
        ("NemotronH", {**NEMOTRON, "n_routed_experts": 8}),  # transformers writes it for a model without experts too
    ],
)
def test_no_experts_are_not_refused(read: Read, kind: str, keys: dict[str, Any]) -> None:
    assert read(kind, **keys).hidden_size == 64


def test_an_unknown_architecture_is_not_said_to_have_experts(read: Read) -> None:
    with pytest.raises(CheckpointError) as caught:
        read("Gemma")
    assert [problem.fix for problem in caught.value.problems] == [""]
