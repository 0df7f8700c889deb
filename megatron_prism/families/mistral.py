"""Mistral 7B and Mistral Small: HF MistralForCausalLM (transformers/models/mistral), LLaMA with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.families import dense
from megatron_prism.families.rules import Rule

NAME = "mistral"
ARCHITECTURES = ("MistralForCausalLM",)
MODEL_TYPE = "mistral"
DEFAULT_WINDOW, GROUPS = 4096, 8  # the defaults of transformers' MistralConfig; null means no window


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes (dense.read_config says what is refused)."""
    return dense.read_config(hf, where, NAME, reads=("hidden_act",), groups=GROUPS, window_size=hf.get("sliding_window", DEFAULT_WINDOW))


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    return {**dense.write_config(model, ARCHITECTURES[0], MODEL_TYPE), "sliding_window": model.window_size}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    return dense.rules(model)
