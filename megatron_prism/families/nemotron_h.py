"""Nemotron-H: HF NemotronHForCausalLM (transformers/models/nemotron_h), without experts.

Each HF layer is one norm and one mixer (Mamba-2, attention without positions, or a squared-ReLU MLP), as in Megatron-Core's hybrid
model. Names are those on disk (`backbone.*`); transformers renames them to `model.*` in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem, raise_problems
from megatron_prism.families import dense, hybrid, layers
from megatron_prism.families.rules import Rule, require

NAME = "nemotron_h"
ARCHITECTURES = ("NemotronHForCausalLM",)
MODEL_TYPE = "nemotron_h"
MAMBA_KEYS = {
    "num_heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "state_dim": "ssm_state_size",
    "num_groups": "n_groups",
    "conv_kernel": "conv_kernel",
    "chunk_size": "chunk_size",
}
PATTERNS = ("layers_block_type", "layer_types", "hybrid_override_pattern")  # in order of precedence
MAMBA_DEFAULTS = {"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "chunk_size": 128}
KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}  # as transformers 5 spells them
EPSILON = "layer_norm_epsilon"
OLD_KEYS = {  # a key of before, which takes precedence in NemotronHConfig.__post_init__
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
HEAD_DIM, GROUPS = 128, 8  # the defaults of transformers' NemotronHConfig


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the architecture a config.json describes.

    Keys of the published config.json that the class in transformers does not read are not looked at: expand (the mixer is as wide as its
    heads), num_hidden_layers (the pattern counts them), hidden_act, attention_bias, mamba_proj_bias, residual_in_fp32, sliding_window,
    num_nextn_predict_layers, tie_word_embeddings, and rotary positions.
    Raises: CheckpointError as dense.read_config, and for experts, biases and what MambaMixer cannot do.
    """
    hf = {**hf, **{key: hf[old] for old, key in OLD_KEYS.items() if old in hf}}
    named = next((key for key in PATTERNS if hf.get(key) is not None), PATTERNS[-1])
    pattern, problems = hybrid.letters(hf.get(named), "M*-", f"{where}:{named}")
    mamba, more = hybrid.read_mamba({**MAMBA_DEFAULTS, **hf}, MAMBA_KEYS, where)
    problems += [
        *hybrid.check_names(hf, where),
        *more,
        *require(hf, "mlp_hidden_act", ["relu2"], where, "relu2"),
        *require(hf, "mamba_hidden_act", ["silu", "swish"], where, "silu"),
        *require(hf, "use_conv_bias", [True], where, True),
        *require(hf, "use_bias", [False], where, False),
    ]
    if pattern and "M" not in pattern:
        problems.append(Problem(f"{where}:{named}", pattern, "at least one Mamba layer"))
    if problems:
        raise CheckpointError(problems)
    own: dict[str, Any] = {"layer_pattern": pattern, "mamba": mamba, "activation": "relu2", "position_embedding": "none"}
    own |= {"norm_epsilon": hf.get(EPSILON, 1e-5), "kv_channels": hf.get("head_dim") or hf.get("attention_head_dim") or HEAD_DIM}
    # transformers writes n_routed_experts for a model without experts too; what counts is that no layer has experts. Its class does not tie.
    # Nor has its embedding a row for padding.
    known = {"num_hidden_layers": len(pattern), "n_routed_experts": 0, "tie_word_embeddings": False, "pad_token_id": None}
    model = dense.read_config({**hf, **known}, where, NAME, reads=("mlp_bias",), groups=GROUPS, **own)
    raise_problems(hybrid.check_norms(model, where, EPSILON))
    return model


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch."""
    assert model.layer_pattern is not None
    written = dense.write_config(model, ARCHITECTURES[0], MODEL_TYPE)
    for key in ("hidden_act", "rms_norm_eps", "rope_parameters", "rope_theta"):  # keys that this class does not have
        del written[key]
    own = {
        "layers_block_type": [KINDS[kind] for kind in model.layer_pattern],
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
        EPSILON: model.norm_epsilon,
    }
    return {**written, **hybrid.written_mamba(model, MAMBA_KEYS, "expand"), **own}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map."""
    assert model.layer_pattern is not None
    layer_rules: list[Rule] = []
    for index, kind in enumerate(model.layer_pattern):
        norm, mixer = f"backbone.layers.{index}.norm.weight", f"backbone.layers.{index}.mixer"
        if kind == "M":
            layer_rules += layers.mamba(index, norm, mixer, model)
        elif kind == "*":
            layer_rules += layers.attention(index, norm, mixer, model)
        else:
            layer_rules += layers.mlp(index, norm, [f"{mixer}.up_proj.weight"], f"{mixer}.down_proj.weight", model)
    return layers.ends("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight", layer_rules, model)
