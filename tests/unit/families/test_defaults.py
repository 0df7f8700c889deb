"""Where a config.json is silent, a family takes what transformers would: old checkpoints leave keys out."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prism.families import registry

SAME = {"norm_epsilon": "rms_norm_eps", "num_query_groups": "num_key_value_heads", "tie_word_embeddings": "tie_word_embeddings"}
OWN: dict[str, dict[str, str]] = {
    "Llama": {},
    "Mistral": {"window_size": "sliding_window"},
    "Qwen2": {},
    "Granite": {key: key for key in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")},
}


@pytest.mark.parametrize("kind", OWN)
def test_a_silent_config_reads_as_transformers_reads_it(kind: str, needed: dict[str, Any]) -> None:
    import transformers

    given: dict[str, Any] = {**needed, "num_attention_heads": 32, "head_dim": 16}
    silent = {"architectures": [f"{kind}ForCausalLM"], **given}
    ours = registry.of_hf(silent, "config").read_config(silent, "config")
    theirs = getattr(transformers, f"{kind}Config")(**given)
    assert {name: getattr(ours, name) for name in SAME | OWN[kind]} == {
        name: getattr(theirs, key) for name, key in (SAME | OWN[kind]).items()
    }
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("padding", [0, 128])
def test_nemotron_h_without_keys_reads_as_its_class(needed: dict[str, Any], padding: int) -> None:
    """Its class has 8 key and value heads, and no row for padding in its embedding."""
    import transformers

    given: dict[str, Any] = {key: value for key, value in needed.items() if key != "num_hidden_layers"}
    given |= {"num_attention_heads": 16, "layers_block_type": ["linear_attention", "full_attention"], "pad_token_id": padding}
    silent = {"architectures": ["NemotronHForCausalLM"], **given}
    ours, theirs = registry.of_hf(silent, "config").read_config(silent, "config"), transformers.NemotronHConfig(**given)
    assert (ours.num_query_groups, ours.kv_channels) == (theirs.num_key_value_heads, theirs.head_dim) == (8, 128)
