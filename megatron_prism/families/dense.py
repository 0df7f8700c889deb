"""Code shared by the dense families: pre-norm attention and a gated MLP, rotary positions, HF names under `model.layers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.core.load import build
from megatron_prism.families import layers, rope
from megatron_prism.families.rules import Rule, check_experts, check_padding, require

NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
READ: Mapping[str, list[Any]] = {
    "hidden_act": ["silu", "swish"],
    "attention_bias": [False, None],
    "mlp_bias": [False, None],
}  # accepted values, where a class reads the key
KEYS: Mapping[str, tuple[str, ...]] = {  # of config.json, by ModelConfig's fields: what a message names
    "num_layers": ("num_hidden_layers",),
    "ffn_hidden_size": ("shared_intermediate_size", "intermediate_size"),
    "num_query_groups": ("num_key_value_heads",),
    "kv_channels": ("head_dim",),
    "norm_epsilon": ("layer_norm_epsilon", "rms_norm_eps"),
    "rotary_base": ("rope_theta",),
    "window_size": ("sliding_window",),
    "init_method_std": ("initializer_range",),
}


def read_config(
    hf: Mapping[str, Any],
    where: str,
    family: str,
    ffn_key: str = "intermediate_size",
    reads: Iterable[str] = READ,
    groups: int | None = None,
    **more: Any,
) -> ModelConfig:
    """Return the architecture of a config.json, in the spelling of transformers 4 or 5. `more`: fields of the family itself.

    reads: the keys of READ that the class in transformers reads. Any value of the others means the same model.
    groups: the class's num_key_value_heads where config.json has no such key; None: as many as attention heads.

    Raises: CheckpointError listing every key that is missing or holds an unsupported value.
    """
    problems = [
        *[problem for key in reads for problem in require(hf, key, READ[key], where, READ[key][0])],
        *check_experts(hf, where),
    ]
    problems += check_padding(hf, where)
    needed = (*NEEDED, ffn_key)
    problems += [Problem(f"{where}:{key}", "no value", "a whole number") for key in needed if key not in hf]
    wrong = [key for key in needed if key in hf and (type(hf[key]) is not int or hf[key] < 1)]
    problems += [Problem(f"{where}:{key}", repr(hf[key]), "a whole number above 0") for key in wrong]
    rotary, wrong_rotary = (rope.unread(hf), []) if more.get("position_embedding") == "none" else rope.read(hf, where)
    problems += wrong_rotary
    if problems:
        raise CheckpointError(problems)
    heads = hf["num_attention_heads"]
    values = {
        "family": family,
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf[ffn_key],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads", groups) or heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "vocab_size": hf["vocab_size"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        **rotary,
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "init_method_std": hf.get("initializer_range", 0.02),
        **more,
    }
    return build(values, ModelConfig, lambda key: f"{where}:{key_of('.'.join(map(str, key)), hf)}")


def key_of(field: str, hf: Mapping[str, Any]) -> str:
    """Return the key of a config.json that a ModelConfig field is read from; the field's name where it has no other."""
    if field.startswith("yarn."):
        return field.replace("yarn", rope.key_of(hf), 1)
    keys = KEYS.get(field, (field,))
    return next((key for key in keys if key in hf), keys[-1])


def write_config(model: ModelConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """Return the config.json of a model trained from scratch, without the family's own keys."""
    return {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": False,
        "model_type": model_type,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_epsilon,
        **rope.written(model),
        "tie_word_embeddings": model.tie_word_embeddings,
        "vocab_size": model.vocab_size,
    }


def extended(hf: Mapping[str, Any], before: ModelConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model that was `before` when it was read, and is extended to longer texts.

    Its rotary positions are spelled so that transformers 4 and 5 read the same: what stood there may have said one of them nothing, or have
    left the original positions to max_position_embeddings. All other keys stay.
    """
    changed: dict[str, Any] = {"max_position_embeddings": model.max_position_embeddings}
    if model.window_size != before.window_size:
        changed["sliding_window"] = model.window_size
    if model.position_embedding != "rope":
        return {**hf, **changed}
    return {key: value for key, value in hf.items() if key not in rope.KEYS} | changed | rope.written(model)


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map, in Megatron-Core's order."""
    layer_rules: list[Rule] = []
    for layer in range(model.num_layers):
        hf = f"model.layers.{layer}"
        up = [f"{hf}.mlp.{name}_proj.weight" for name in ("gate", "up")]
        layer_rules += layers.attention(layer, f"{hf}.input_layernorm.weight", f"{hf}.self_attn", model)
        layer_rules += layers.mlp(layer, f"{hf}.post_attention_layernorm.weight", up, f"{hf}.mlp.down_proj.weight", model)
    return layers.ends("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", layer_rules, model)
