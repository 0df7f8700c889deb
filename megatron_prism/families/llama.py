"""LLaMA: HF LlamaForCausalLM (transformers/models/llama) as a Megatron-Core GPTModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.families import dense
from megatron_prism.families.rules import Rule

NAME = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)
MODEL_TYPE = "llama"


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes (dense.read_config says what is refused)."""
    return dense.read_config(hf, where, NAME)


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    return dense.write_config(model, ARCHITECTURES[0], MODEL_TYPE)


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    return dense.rules(model)
