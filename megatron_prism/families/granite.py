"""Granite 3: HF GraniteForCausalLM (transformers/models/granite), LLaMA with four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.families import dense
from megatron_prism.families.rules import Rule

NAME = "granite"
ARCHITECTURES = ("GraniteForCausalLM",)
MODEL_TYPE = "granite"
MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes (dense.read_config says what is refused)."""
    return dense.read_config(hf, where, NAME, **multipliers(hf))


def multipliers(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return Granite's four multipliers. A missing one is 1, as in transformers' GraniteConfig."""
    return {key: hf.get(key, 1.0) for key in MULTIPLIERS}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    return {**dense.write_config(model, ARCHITECTURES[0], MODEL_TYPE), **written_multipliers(model)}


def written_multipliers(model: ModelConfig) -> dict[str, float]:
    """Return the four multipliers as config.json spells them."""
    scale = model.kv_channels**-0.5 if model.attention_multiplier is None else model.attention_multiplier
    return {**{key: getattr(model, key) for key in MULTIPLIERS}, "attention_multiplier": scale}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    return dense.rules(model)
