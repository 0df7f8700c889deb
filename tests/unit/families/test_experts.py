"""Mixtures of experts are refused by name; a config that only names a count of none is not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prism.core.errors import CheckpointError
from megatron_prism.families import registry

DENSE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
HYBRID = {"shared_intermediate_size": 96, "layer_types": ["full_attention"] * 2}
NEMOTRON = {"layers_block_type": ["mamba", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16, "layer_norm_epsilon": 1e-5}


def read(kind: str, **keys: Any) -> Any:
    config = {**DENSE, **keys, "architectures": [f"{kind}ForCausalLM"]}
    return registry.of_hf(config, "config").read_config(config, "config")


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
def test_experts_are_refused_by_their_key(kind: str, keys: dict[str, Any], named: list[str]) -> None:
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
def test_no_experts_are_not_refused(kind: str, keys: dict[str, Any]) -> None:
    assert read(kind, **keys).hidden_size == 64


def test_an_unknown_architecture_is_not_said_to_have_experts() -> None:
    with pytest.raises(CheckpointError) as caught:
        read("Gemma")
    assert [problem.fix for problem in caught.value.problems] == [""]
