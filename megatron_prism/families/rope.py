"""Rotary positions as transformers 5 reads them from a config.json, and as both transformers 4 and 5 read them when we write one.

Keys that mean something only together are read together. rope_v4.py is how transformers 4 reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import ModelConfig, YarnRope
from megatron_prism.core.errors import Problem

KINDS = ("default", "llama3", "yarn")
FACTORS = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}  # what transformers asks of a kind
YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "truncate")
ORIGINAL = "original_max_position_embeddings"
ORIGINAL_POSITIONS = 8192  # Megatron-Core fixes it for llama3
KEYS = ("rope_parameters", "rope_scaling", "rope_theta", ORIGINAL)  # of config.json
BASE = 10000.0  # the default of every class that we know


def key_of(hf: Mapping[str, Any]) -> str:
    """Return the key that the rotary parameters are read from."""
    return "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"


def read(hf: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Problem]]:
    """Return ModelConfig's rotary fields, and a problem for each key that transformers refuses, takes in silence for something else, or
    Megatron-Core cannot honour.

    `rope_scaling` (transformers 4) replaces the whole of `rope_parameters` (transformers 5) where both are there, its base included. The base
    beside them, `rope_theta`, stands in where the object has none.
    Source: transformers 5.24, RotaryEmbeddingConfigMixin.convert_rope_params_to_dict, standardize_rope_params and validate_rope.
    """
    key = key_of(hf)
    rope = hf.get(key) or {}
    if not isinstance(rope, dict):
        return {}, [Problem(f"{where}:{key}", repr(rope), "an object")]
    by_layer = [name for name, value in rope.items() if isinstance(value, dict)]
    if by_layer:
        return {}, [Problem(f"{where}:{key}", f"parameters by kind of layer ({', '.join(by_layer)})", "one object for all layers")]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        beside = " (transformers takes it, and not rope_parameters)" if key == "rope_scaling" and hf.get("rope_parameters") else ""
        return {}, [Problem(f"{where}:{key}.rope_type", f"{kind!r}{beside}", " or ".join(map(repr, KINDS)))]
    base = rope.get("rope_theta", hf.get("rope_theta", BASE))
    fields: dict[str, Any] = {"rotary_base": base, "rope_scaling": None}
    problems = _lost_base(hf, rope, where)
    if kind == "default":
        return fields, problems
    problems += [
        Problem(f"{where}:{key}.{name}", "no value", f"a number: transformers refuses {kind} without it")
        for name in FACTORS[kind]
        if rope.get(name) is None
    ]
    rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        problems.append(Problem(f"{where}:{key}.partial_rotary_factor", repr(rotated), "1.0: all of a head is rotated"))
    original = hf.get(ORIGINAL, rope.get(ORIGINAL))  # beside the object it takes precedence, as in transformers
    if original is None and (kind == "yarn" or hf.get("max_position_embeddings") != ORIGINAL_POSITIONS):
        found = f"no value, for which transformers takes max_position_embeddings {hf.get('max_position_embeddings')!r}"
        required = f"{ORIGINAL_POSITIONS}: Megatron-Core fixes it" if kind == "llama3" else "the positions before the model was extended"
        problems.append(Problem(f"{where}:{key}.{ORIGINAL}", found, required))
    if kind == "yarn":
        return {**fields, "yarn": None if problems else {"factor": rope["factor"], ORIGINAL: original, **yarn_options(rope)}}, problems
    scaling = {name: rope[name] for name in FACTORS[kind] if name in rope} | {
        ORIGINAL: ORIGINAL_POSITIONS if original is None else original
    }
    return {**fields, "rope_scaling": scaling}, problems


def _lost_base(hf: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> list[Problem]:
    """Return a problem where only rope_parameters has a base, and rope_scaling beside it makes transformers take the default."""
    beside = hf.get("rope_parameters")
    lost = beside.get("rope_theta", BASE) if rope is not beside and isinstance(beside, dict) else BASE
    if lost == BASE or "rope_theta" in rope or "rope_theta" in hf:
        return []
    found = f"{lost!r} beside a rope_scaling without it, for which transformers takes {BASE!r}"
    fix = f"set rope_theta to what the model was trained with: {lost!r}?"
    return [Problem(f"{where}:rope_parameters.rope_theta", found, "a rope_theta outside both objects", fix)]


def yarn_options(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return yarn's other keys. Null, and 0 for a beta, mean the default, and one of the two mscale alone means nothing, as in transformers."""
    given = {name: rope[name] for name in YARN_OPTIONS if rope.get(name) is not None}
    given = {name: value for name, value in given.items() if value or not name.startswith("beta")}
    both = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
    return given | (both if all(both.values()) else {})


def unread(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return ModelConfig's rotary fields of a model without rotary positions. No class reads them there, so no value is wrong."""
    rope: Mapping[str, Any] = next((hf[key] for key in ("rope_parameters", "rope_scaling") if isinstance(hf.get(key), dict)), {})
    base = rope.get("rope_theta", hf.get("rope_theta", BASE))
    return {"rotary_base": base if type(base) in (int, float) and 0 < base < float("inf") else BASE, "rope_scaling": None}


def written(model: ModelConfig) -> dict[str, Any]:
    """Return the rotary keys of a config.json, which transformers 4 and 5 read alike.

    rope_parameters is transformers 5's. transformers 4 reads rope_theta and rope_scaling alone; for transformers 5 the latter replaces
    rope_parameters, with rope_theta as its base.
    """
    scaling: dict[str, Any] = {}
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **vars(model.rope_scaling)}
    elif model.yarn is not None:
        yarn = vars(model.yarn)
        plain = vars(YarnRope(factor=model.yarn.factor, original_max_position_embeddings=model.yarn.original_max_position_embeddings))
        named = {key: value for key, value in yarn.items() if key in ("factor", ORIGINAL) or value != plain[key]}
        scaling = {"rope_type": "yarn", **named}
    keys = {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": model.rotary_base}, "rope_theta": model.rotary_base}
    return {**keys, "rope_scaling": scaling} if scaling else keys
