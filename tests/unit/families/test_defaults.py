"""Where a config.json is silent, a family takes what transformers would: old checkpoints leave keys out."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prism.families import registry

SAME = {"norm_epsilon": "rms_norm_eps", "num_query_groups": "num_key_value_heads", "tie_word_embeddings": "tie_word_embeddings"}
OWN: dict[str, dict[str, str]] = {
    "Llama": {},
    "Mistral": {"window_size": "sliding_window"},
    "Granite": {key: key for key in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")},
}


@pytest.mark.parametrize("kind", OWN)
def test_a_silent_config_reads_as_transformers_reads_it(kind: str, needed: dict[str, Any]) -> None:
    import transformers

    # MistralConfig's own default of key/value heads and head size is that of the 7B: both are given here
    given: dict[str, Any] = {**needed, "num_key_value_heads": 4, "head_dim": 16}
    silent = {"architectures": [f"{kind}ForCausalLM"], **given}
    ours = registry.of_hf(silent, "config").read_config(silent, "config")
    theirs = getattr(transformers, f"{kind}Config")(**given)
    assert {name: getattr(ours, name) for name in SAME | OWN[kind]} == {
        name: getattr(theirs, key) for name, key in (SAME | OWN[kind]).items()
    }
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
