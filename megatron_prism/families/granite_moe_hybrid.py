"""Granite 4.0 Micro: HF GraniteMoeHybridForCausalLM (transformers/models/granitemoehybrid) without experts and without Mamba.

The class also holds the Mamba hybrids (Granite 4.0 H) and the experts of larger models: both are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.families import dense, granite
from megatron_prism.families.rules import Rule, require

NAME = "granite_moe_hybrid"
ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)
ATTENTION = ("attention", "full_attention")  # as transformers 4 and 5 spell it


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes.

    Raises: CheckpointError as dense.read_config, and for Mamba layers, experts and missing rotary positions.
    """
    problems = [
        *require(hf, "num_local_experts", [0], where, 8),
        *require(hf, "position_embedding_type", ["rope"], where, None),
    ]
    layers = hf.get("layer_types") or hf.get("layers_block_type") or []
    if not isinstance(layers, list):
        raise CheckpointError([*problems, Problem(f"{where}:layer_types", repr(layers), "a list")])
    other = sorted({str(kind) for kind in layers} - set(ATTENTION))
    if other or len(layers) != hf.get("num_hidden_layers"):
        found = f"{len(layers)} layers, of kinds {other} too" if other else f"{len(layers)} layers"
        problems.append(Problem(f"{where}:layer_types", found, f"{hf.get('num_hidden_layers')} attention layers", "Mamba hybrids are not supported yet"))
    if problems:
        raise CheckpointError(problems)
    return dense.read_config(hf, where, NAME, ffn_key="shared_intermediate_size", **granite.multipliers(hf))


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    own = {
        "shared_intermediate_size": model.ffn_hidden_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "layer_types": ["full_attention"] * model.num_layers,
    }
    return {**dense.write_config(model, ARCHITECTURES[0], "granitemoehybrid"), **granite.written_multipliers(model), **own}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    return dense.rules(model, fused_mlp=True)
