"""Rotary positions as transformers reads them from a config.json. Keys that mean something only together are read together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prism.core.errors import Problem

KINDS = ("default", "llama3")
FACTORS = ("factor", "low_freq_factor", "high_freq_factor")  # what transformers asks of llama3
ORIGINAL = "original_max_position_embeddings"
ORIGINAL_POSITIONS = 8192  # Megatron-Core fixes it
BASE = 10000.0  # the default of every class that we know


def read(hf: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Problem]]:
    """Return ModelConfig's rotary fields, and a problem for each key that transformers refuses or Megatron-Core cannot honour.

    `rope_scaling` (transformers 4) replaces the whole of `rope_parameters` (transformers 5) where both are there, its base included. The base
    beside them, `rope_theta`, stands in where the object has none.
    Source: transformers 5.24, RotaryEmbeddingConfigMixin.convert_rope_params_to_dict, standardize_rope_params and validate_rope.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
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
    fields = {"rotary_base": rope.get("rope_theta", hf.get("rope_theta", BASE)), "rope_scaling": None}
    if kind == "default":
        return fields, []
    problems = [
        Problem(f"{where}:{key}.{name}", "no value", "a number: transformers refuses llama3 without it")
        for name in FACTORS
        if name not in rope
    ]
    rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        problems.append(Problem(f"{where}:{key}.partial_rotary_factor", repr(rotated), "1.0: all of a head is rotated"))
    original = hf.get(ORIGINAL, rope.get(ORIGINAL))  # beside the object it takes precedence, as in transformers
    if original is None and hf.get("max_position_embeddings") != ORIGINAL_POSITIONS:
        found = f"no value, for which transformers takes max_position_embeddings {hf.get('max_position_embeddings')!r}"
        problems.append(Problem(f"{where}:{key}.{ORIGINAL}", found, f"{ORIGINAL_POSITIONS}: Megatron-Core fixes it"))
    scaling = {name: rope[name] for name in FACTORS if name in rope} | {ORIGINAL: ORIGINAL_POSITIONS if original is None else original}
    return {**fields, "rope_scaling": scaling}, problems


def unread(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return ModelConfig's rotary fields of a model without rotary positions. No class reads them there, so no value is wrong."""
    rope: Mapping[str, Any] = next((hf[key] for key in ("rope_parameters", "rope_scaling") if isinstance(hf.get(key), dict)), {})
    base = rope.get("rope_theta", hf.get("rope_theta", BASE))
    return {"rotary_base": base if type(base) in (int, float) and 0 < base < float("inf") else BASE, "rope_scaling": None}
