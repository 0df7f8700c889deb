"""Code shared by the Mamba hybrids: their layers' names and mixers' sizes in config.json, in transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_prism.core.config import MambaConfig, ModelConfig
from megatron_prism.core.errors import Problem
from megatron_prism.families.rules import NO_EXPERTS, require

LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-"}  # Megatron's, by HF's names


def letters(kinds: Any, allowed: str, where: str) -> tuple[str, list[Problem]]:
    """Return layers (HF's names, or already letters) as letters, and a problem where a letter is not in `allowed`."""
    spelled = [LETTERS.get(kind, str(kind)) for kind in kinds] if isinstance(kinds, (list, str)) else []
    wrong = sorted({kind for kind in spelled if kind not in allowed or len(kind) != 1})
    if spelled and not wrong:
        return "".join(spelled), []
    known = sorted(name for name, letter in LETTERS.items() if letter in allowed)
    fix = NO_EXPERTS if {"moe", "E"} & set(wrong) else ""
    return "", [Problem(where, f"layers of kinds {wrong}" if spelled else repr(kinds), f"a list of {', '.join(known)}", fix)]


def check_names(hf: Mapping[str, Any], where: str) -> list[Problem]:
    """Return a problem where config.json has the layers twice, and not the same: to transformers the two keys are one."""
    one, other = hf.get("layer_types"), hf.get("layers_block_type")
    if None in (one, other) or one == other:
        return []
    return [Problem(f"{where}:layers_block_type", repr(other), "the same as layer_types: they are two names of one key")]


def read_mamba(hf: Mapping[str, Any], keys: Mapping[str, str], where: str) -> tuple[dict[str, Any], list[Problem]]:
    """Return MambaConfig's fields from a config.json, by the family's keys, and problems where Megatron-Core's MambaMixer cannot do it.

    MambaMixer does not clamp the time step.
    """
    wrong = [key for key in keys.values() if type(hf.get(key)) is not int or hf[key] < 1]
    problems = [Problem(f"{where}:{key}", repr(hf.get(key)), "a whole number above 0") for key in wrong]
    limit = hf.get("time_step_limit", (0.0, math.inf))
    ends = (
        [float(end["__float__"]) if isinstance(end, dict) and "__float__" in end else end for end in limit]
        if isinstance(limit, (list, tuple))
        else []
    )
    if ends != [0.0, math.inf]:
        problems.append(
            Problem(f"{where}:time_step_limit", repr(limit), "[0.0, Infinity]", "Megatron-Core's mixer does not clamp the time step")
        )
    return {field: hf.get(key) for field, key in keys.items()}, problems


def check_width(model: ModelConfig, hf: Mapping[str, Any], where: str, expand: str) -> list[Problem]:
    """Return a problem where a hybrid's heads do not make up the mixer's width, expand x hidden_size."""
    assert model.mamba is not None
    width = model.mamba.num_heads * model.mamba.head_dim
    return require(hf, expand, [width / model.hidden_size], where, 2)


def check_norms(model: ModelConfig, where: str, epsilon: str) -> list[Problem]:
    """Return a problem where a hybrid's norms have another epsilon than 1e-5, which MambaMixer's own norm has."""
    return require({epsilon: model.norm_epsilon}, epsilon, [1e-5], where, None)


def written_mamba(model: ModelConfig, keys: Mapping[str, str], expand: str) -> dict[str, Any]:
    """Return a mixer's sizes as a family's config.json spells them. transformers takes a whole number alone for `expand`."""
    mamba = model.mamba
    assert isinstance(mamba, MambaConfig)
    times, rest = divmod(mamba.num_heads * mamba.head_dim, model.hidden_size)
    return {key: getattr(mamba, field) for field, key in keys.items()} | ({} if rest else {expand: times})
