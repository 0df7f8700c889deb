"""Granite 4.0 Micro and H-Micro: HF GraniteMoeHybridForCausalLM (transformers/models/granitemoehybrid), without experts.

Each HF layer is a mixer (attention or Mamba-2) and an MLP. If any mixer is Mamba, Megatron-Core's hybrid model holds mixer and MLP as
separate layers (HF layer i is Megatron's 2i and 2i + 1). If all are attention, the model is an ordinary decoder with Granite's multipliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem, raise_problems
from megatron_prism.families import dense, granite, hybrid, layers
from megatron_prism.families.rules import Rule, check_experts, require

NAME = "granite_moe_hybrid"
ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)
MODEL_TYPE = "granitemoehybrid"
MAMBA_KEYS = {
    "num_heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "state_dim": "mamba_d_state",
    "num_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "chunk_size": "mamba_chunk_size",
}
MAMBA_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_state": 256,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 256,
}
MIXERS = {"M": "linear_attention", "*": "full_attention"}  # as transformers 5 spells them


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes.

    Raises: CheckpointError as dense.read_config, and for experts and what a Mamba-2 mixer of Megatron-Core cannot do.
    """
    kinds, problems = hybrid.letters(hf.get("layer_types") or hf.get("layers_block_type"), "M*", f"{where}:layer_types")
    positions = hf.get("position_embedding_type")
    problems += [
        *hybrid.check_names(hf, where),
        *check_experts({"num_local_experts": 8, **hf}, where),  # the default of transformers' GraniteMoeHybridConfig
        *require(hf, "position_embedding_type", ["rope", "nope", None], where, None),
    ]
    if not problems and len(kinds) != hf.get("num_hidden_layers"):
        problems.append(Problem(f"{where}:layer_types", f"{len(kinds)} layers", f"num_hidden_layers {hf.get('num_hidden_layers')}"))
    own = {"position_embedding": "rope" if positions == "rope" else "none", **granite.multipliers(hf)}
    if "M" in kinds and not problems:
        mamba, problems = hybrid.read_mamba({**MAMBA_DEFAULTS, **hf, **_head_dim(hf)}, MAMBA_KEYS, where)
        problems += [
            *require(hf, "mamba_conv_bias", [True], where, True),
            *require(hf, "mamba_proj_bias", [False], where, False),
        ]
        own |= {"layer_pattern": "".join(f"{kind}-" for kind in kinds), "num_layers": 2 * len(kinds), "mamba": mamba}
    if problems:
        raise CheckpointError(problems)
    model = dense.read_config(hf, where, NAME, ffn_key="shared_intermediate_size", reads=("hidden_act", "attention_bias"), **own)
    if model.mamba is not None:
        raise_problems([*hybrid.check_width(model, hf, where, "mamba_expand"), *hybrid.check_norms(model, where, "rms_norm_eps")])
    return model


def _head_dim(hf: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of a Mamba head where it is not given, or "auto": its share of mamba_expand x hidden_size, as in transformers."""
    if hf.get("mamba_d_head", "auto") != "auto":
        return {}
    expand, hidden, heads = hf.get("mamba_expand", 2), hf.get("hidden_size"), hf.get("mamba_n_heads", MAMBA_DEFAULTS["mamba_n_heads"])
    return {"mamba_d_head": expand * hidden // heads} if all(type(size) is int and size > 0 for size in (expand, hidden, heads)) else {}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    kinds = "*" * model.num_layers if model.layer_pattern is None else model.layer_pattern[::2]
    own: dict[str, Any] = {
        "num_hidden_layers": len(kinds),
        "shared_intermediate_size": model.ffn_hidden_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope" if model.position_embedding == "rope" else None,
        "layer_types": [MIXERS[kind] for kind in kinds],
    }
    if model.mamba is not None:
        own |= hybrid.written_mamba(model, MAMBA_KEYS, "mamba_expand") | {"mamba_conv_bias": True, "mamba_proj_bias": False}
    return {**dense.write_config(model, ARCHITECTURES[0], MODEL_TYPE), **granite.written_multipliers(model), **own}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    layer_rules: list[Rule] = []
    kinds = "*" * model.num_layers if model.layer_pattern is None else model.layer_pattern[::2]
    for index, kind in enumerate(kinds):
        hf, layer = f"model.layers.{index}", index if model.layer_pattern is None else 2 * index
        mixer, prefix = (layers.mamba, f"{hf}.mamba") if kind == "M" else (layers.attention, f"{hf}.self_attn")
        layer_rules += mixer(layer, f"{hf}.input_layernorm.weight", prefix, model)
        up, down = f"{hf}.shared_mlp.input_linear.weight", f"{hf}.shared_mlp.output_linear.weight"
        layer_rules += layers.mlp(layer + (model.layer_pattern is not None), f"{hf}.post_attention_layernorm.weight", [up], down, model)
    return layers.ends("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", layer_rules, model)
