"""Qwen2 and Qwen2.5: HF Qwen2ForCausalLM (transformers/models/qwen2), LLaMA with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError
from megatron_prism.families import dense
from megatron_prism.families.rules import Rule, require

NAME = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes.

    Raises: CheckpointError as dense.read_config, and for a window, which Qwen2 gives to some of its layers only.
    """
    if problems := require(hf, "use_sliding_window", [False], where, False):
        raise CheckpointError(problems)
    return dense.read_config(hf, where, NAME, qkv_bias=True)


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    return {**dense.write_config(model, ARCHITECTURES[0], "qwen2"), "use_sliding_window": False}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    return dense.rules(model)
