"""Qwen2 and Qwen2.5: HF Qwen2ForCausalLM (transformers/models/qwen2), LLaMA with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.families import dense
from megatron_prism.families.rules import Rule, require

NAME = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)
MODEL_TYPE = "qwen2"
WINDOW, FULL_LAYERS, GROUPS = 4096, 28, 32  # the defaults of transformers' Qwen2Config


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes.

    Raises: CheckpointError as dense.read_config, and for a window, which Qwen2 gives to some of its layers only.
    """
    layers, kinds = hf.get("num_hidden_layers"), hf.get("layer_types")
    is_windowed = hf.get("use_sliding_window", False) and hf.get("sliding_window", WINDOW) is not None
    if kinds is not None or (isinstance(layers, int) and hf.get("max_window_layers", FULL_LAYERS) >= layers):
        is_windowed = False  # layer_types decides where it is there; else the window begins after the last layer
    problems = [*require({"use_sliding_window": is_windowed}, "use_sliding_window", [False], where, False)]
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}):
        problems.append(Problem(f"{where}:layer_types", repr(kinds), "full_attention for every layer"))
    if problems:
        raise CheckpointError(problems)
    return dense.read_config(hf, where, NAME, reads=("hidden_act",), groups=GROUPS, qkv_bias=True)


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    return {**dense.write_config(model, ARCHITECTURES[0], MODEL_TYPE), "use_sliding_window": False}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    return dense.rules(model)
