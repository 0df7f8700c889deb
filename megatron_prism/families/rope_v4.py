"""Rotary positions as transformers 4 reads them from a config.json: other tools do so to this day. It does not know `rope_parameters`.

Source: transformers 4.57, modeling_rope_utils.py, and the configuration classes of the families here; its classes are not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import Llama3Rope, ModelConfig, YarnRope
from megatron_prism.core.errors import Problem
from megatron_prism.families.rope import BASE, FACTORS, ORIGINAL, yarn_options


def is_number(value: Any) -> bool:
    """Say whether a value of a config.json is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < float("inf")


def has_keys(hf: Mapping[str, Any]) -> bool:
    """Say whether a config.json speaks to transformers 4 at all of its rotary positions."""
    return bool(hf.get("rope_scaling")) or hf.get("rope_theta") is not None


def read(hf: Mapping[str, Any], model: ModelConfig, where: str) -> tuple[ModelConfig, list[Problem]]:
    """Return an architecture with the rotary positions that transformers 4 reads, and problems where it refuses the config.

    The base is rope_theta's or the class's default, whatever rope_parameters says. yarn without its original positions takes the extended
    ones; llama3 does not load without them. `type` goes over `rope_type`, as in LlamaConfig and Qwen2Config.
    """
    base, rope = hf.get("rope_theta", BASE), hf.get("rope_scaling") or {}
    if not is_number(base):
        return model, [Problem(f"{where}:rope_theta", repr(base), "a number above 0: transformers 4 reads it")]
    plain = dataclasses.replace(model, rotary_base=base, rope_scaling=None, yarn=None)
    kind = rope.get("type", rope.get("rope_type", "default"))
    if kind not in ("default", *FACTORS):
        return plain, [Problem(f"{where}:rope_scaling", f"{kind!r} to transformers 4", " or ".join(("default", *FACTORS)))]
    if kind == "default":
        return plain, []
    original = rope.get(ORIGINAL) or (hf.get("max_position_embeddings") if kind == "yarn" else None)
    given: dict[str, Any] = {name: rope.get(name) for name in FACTORS[kind]} | {ORIGINAL: original}
    problems = [
        Problem(f"{where}:rope_scaling.{name}", repr(value), f"a number above 0: transformers 4 does not load {kind} without it")
        for name, value in given.items()
        if not is_number(value)
    ]
    if problems:
        return plain, problems
    if kind == "yarn":
        return dataclasses.replace(plain, yarn=YarnRope(**given, **yarn_options(rope))), []
    return dataclasses.replace(plain, rope_scaling=Llama3Rope(**given)), []
