"""The hybrids' config.json: both spellings of transformers, what a Mamba mixer of Megatron-Core cannot do, every key named."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prism.core.errors import InputError
from megatron_prism.families import registry
from megatron_prism.families.rules import Rule, check_names

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256}
GRANITE: dict[str, Any] = {
    **SIZES,
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "position_embedding_type": "nope",
    "rms_norm_eps": 1e-5,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "tie_word_embeddings": True,
}
NEMOTRON: dict[str, Any] = {
    **SIZES,
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "M-*-M",
    "num_hidden_layers": 5,
    "intermediate_size": 96,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
}


def read(config: dict[str, Any]) -> Any:
    return registry.of_hf(config, "config").read_config(config, "config")


def test_the_spellings_of_transformers_4_and_5_read_alike() -> None:
    five = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "position_embedding_type": None,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    assert read(GRANITE) == read({**GRANITE, **five})
    assert (read(GRANITE).layer_pattern, read(GRANITE).num_layers, read(GRANITE).position_embedding) == ("M-*-M-", 6, "none")
    newer = {key: value for key, value in NEMOTRON.items() if key not in ("hybrid_override_pattern", "num_hidden_layers", "head_dim")}
    newer |= {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"], "attention_head_dim": 16}
    assert read(NEMOTRON) == read({**newer, "time_step_limit": [0.0, float("inf")]})


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (GRANITE, "num_local_experts", 8),
        (GRANITE, "position_embedding_type", "alibi"),
        (GRANITE, "layer_types", ["mamba", "moe", "mamba"]),
        (GRANITE, "layer_types", ["mamba"]),
        (GRANITE, "layer_types", 3),
        (GRANITE, "mamba_n_heads", "8"),
        (GRANITE, "mamba_n_heads", 0),
        (GRANITE, "mamba_n_groups", True),
        (GRANITE, "mamba_conv_bias", False),
        (GRANITE, "mamba_proj_bias", True),
        (GRANITE, "mamba_expand", 3),
        (GRANITE, "time_step_limit", [0.001, 0.1]),
        (GRANITE, "time_step_limit", None),
        (GRANITE, "rms_norm_eps", 1e-6),
        (GRANITE, "hidden_size", None),
        (NEMOTRON, "hybrid_override_pattern", "M-*-E"),
        (NEMOTRON, "hybrid_override_pattern", ""),
        (NEMOTRON, "hybrid_override_pattern", "*-*-*"),
        (NEMOTRON, "hybrid_override_pattern", "M-"),
        (NEMOTRON, "mlp_hidden_act", "silu"),
        (NEMOTRON, "use_conv_bias", False),
        (NEMOTRON, "use_bias", True),
        (NEMOTRON, "residual_in_fp32", True),
        (NEMOTRON, "sliding_window", 512),
        (NEMOTRON, "expand", 4),
        (NEMOTRON, "num_nextn_predict_layers", 1),
        (NEMOTRON, "layer_norm_epsilon", 1e-6),
        (NEMOTRON, "chunk_size", -1),
        (NEMOTRON, "attention_bias", True),
    ],
)
def test_what_megatron_cannot_do_is_refused_by_key(config: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read({**config, key: value})
    assert f"config:{key}: found" in str(caught.value)


def test_all_problems_come_together() -> None:
    with pytest.raises(InputError) as caught:
        read({**NEMOTRON, "use_bias": True, "mlp_hidden_act": "silu", "ssm_state_size": 0})
    assert len(caught.value.problems) == 3


def test_an_unknown_family_is_named() -> None:
    import dataclasses

    with pytest.raises(InputError, match=r"model.family: found 'lama'; required one of llama, "):
        registry.rules(dataclasses.replace(read(NEMOTRON), family="lama"))


@pytest.mark.parametrize("rows", [[(0, 3)], [(0, 3), (3, 9)], [(1, 8)], [(0, 5), (4, 8)], [(0, 4), (5, 8)]])
def test_a_sliced_tensor_is_covered_once(rows: list[tuple[int, int]]) -> None:
    """Of 8 rows, none left out and none stored twice."""
    check_names([Rule("whole", "slice", (("a", (8, 2)),), (0, 8))])
    with pytest.raises(AssertionError, match="rows of a named by none or more than one rule"):
        check_names([Rule(f"piece{index}", "slice", (("a", (8, 2)),), part) for index, part in enumerate(rows)])
