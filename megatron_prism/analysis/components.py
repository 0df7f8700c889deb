"""The part of a model that a tensor belongs to, by its name in a Hugging Face folder: the groups of the paper's Table 23."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Component = Literal["q", "k", "v", "o", "gate", "up", "down", "in_proj", "out_proj", "conv1d", "A/dt", "embed/lm_head", "norm"]
Kind = Literal["attention", "mlp", "mamba", "embed/lm_head", "norm"]

KIND_OF: Mapping[Component, Kind] = {
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
    **dict.fromkeys(("in_proj", "out_proj", "conv1d", "A/dt"), "mamba"),
    "embed/lm_head": "embed/lm_head",
    "norm": "norm",
}
_BY_MODULE: Mapping[str, Component] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "output_linear": "down",  # Granite 4.0's shared_mlp
    "in_proj": "in_proj",
    "out_proj": "out_proj",
    "conv1d": "conv1d",
    "A_log": "A/dt",
    "D": "A/dt",
    "dt_bias": "A/dt",
    "embed_tokens": "embed/lm_head",
    "embeddings": "embed/lm_head",
    "lm_head": "embed/lm_head",
}
GATE_AND_UP = "input_linear"  # of Granite 4.0's shared_mlp: the gate's rows, then those of up


def parts_of(name: str, rows: int) -> dict[Component, tuple[int, int]]:
    """Return the components that a tensor holds, each with its rows [start, end). Nearly all tensors hold one.

    Raises: KeyError for a name of no known component.
    """
    module = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    if module == GATE_AND_UP:
        return {"gate": (0, rows // 2), "up": (rows // 2, rows)}
    if module == "norm" or module.endswith(("norm", "norm_f", "layernorm")):
        return {"norm": (0, rows)}
    return {_BY_MODULE[module]: (0, rows)}
