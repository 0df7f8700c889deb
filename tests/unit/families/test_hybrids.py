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
        (NEMOTRON, "mlp_hidden_act", "silu"),
        (NEMOTRON, "use_conv_bias", False),
        (NEMOTRON, "use_bias", True),
        (NEMOTRON, "mlp_bias", True),
        (GRANITE, "layers_block_type", ["mamba", "mamba", "mamba"]),
        (GRANITE, "attention_bias", True),
        (NEMOTRON, "layer_norm_epsilon", 1e-6),
        (NEMOTRON, "chunk_size", -1),
    ],
)
def test_what_megatron_cannot_do_is_refused_by_key(config: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read({**config, key: value})
    assert f"config:{key}: found" in str(caught.value)


UNREAD = {
    "expand": 3,
    "num_hidden_layers": 9,
    "hidden_act": "gelu",
    "attention_bias": True,
    "mamba_proj_bias": True,
    "residual_in_fp32": True,
    "sliding_window": 512,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_theta": 5e5,
}


def test_what_nemotron_hs_class_does_not_read_changes_nothing() -> None:
    """And transformers builds the same model from it: the class is asked for the shapes of its tensors, and for its logits."""
    import torch
    import transformers

    said = {key: value for key, value in UNREAD.items() if key != "rope_theta"}
    assert {key: value for key, value in vars(read({**NEMOTRON, **said})).items() if read(NEMOTRON).__dict__[key] != value} == {}
    logits = []
    for more in ({}, {**UNREAD}):
        config = transformers.NemotronHConfig(**{**NEMOTRON, **more})
        torch.manual_seed(0)
        model = transformers.NemotronHForCausalLM._from_config(config, attn_implementation="eager").eval()
        logits.append(model(torch.arange(40)[None]).logits)
    assert torch.equal(*logits)


def test_nemotron_hs_old_keys_come_before_the_new() -> None:
    mamba = read({**NEMOTRON, "n_groups": 4, "mamba_n_groups": 2, "mamba_d_conv": 3, "conv_kernel": 4, "mamba_chunk_size": 64}).mamba
    assert (mamba.num_groups, mamba.conv_kernel, mamba.chunk_size) == (2, 3, 64)
    with pytest.raises(InputError, match="use_conv_bias: found False"):
        read({**NEMOTRON, "mamba_conv_bias": False})
    listed = {"layers_block_type": None, "hybrid_override_pattern": "M-*-M"}  # null is no value
    assert read({**NEMOTRON, **listed}) == read(NEMOTRON)


@pytest.mark.parametrize("given", [{"mamba_d_head": "auto"}, {}])
def test_a_mamba_head_of_granite_is_its_share_of_the_width(given: dict[str, Any]) -> None:
    silent = {key: value for key, value in GRANITE.items() if key != "mamba_d_head"}
    assert read({**silent, **given, "mamba_expand": 4}).mamba.head_dim == 32


def test_granites_without_positions_do_not_read_rotary_keys() -> None:
    assert read({**GRANITE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}) == read(GRANITE)
    with pytest.raises(InputError, match="config:rope_scaling.rope_type: found 'linear'"):
        read({**GRANITE, "position_embedding_type": "rope", "rope_scaling": {"rope_type": "linear", "factor": 2.0}})


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
