"""The tensor arithmetic behind a family's rules: Hugging Face parts to one Megatron-Core tensor, and back. Bit-exact.

Shape legend: G query groups, R queries a group, D channels a head, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.families.rules import Rule


def pack(rule: Rule, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Return the Megatron-Core tensor of a rule from its Hugging Face parts (of a slice, its rows), in the rule's order."""
    if rule.op in ("copy", "slice"):
        return parts[0]
    if rule.op == "rows":
        return torch.cat(list(parts))
    groups = model.num_query_groups
    by_group = [part.reshape(groups, part.shape[0] // groups, -1) for part in parts]  # q (G, R*D, H), k and v (G, D, H)
    return torch.cat(by_group, dim=1).reshape(rule.shape)


def unpack(rule: Rule, tensor: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Return the Hugging Face parts of a rule (of a slice, its rows) from its Megatron-Core tensor, in the rule's order."""
    if rule.op in ("copy", "slice"):
        return [tensor]
    rows = [shape[0] for _, shape in rule.hf]
    if rule.op == "rows":
        return list(tensor.split(rows))
    groups = model.num_query_groups
    by_group = tensor.reshape(groups, tensor.shape[0] // groups, -1).split([count // groups for count in rows], dim=1)
    return [part.reshape(shape) for part, (_, shape) in zip(by_group, rule.hf, strict=True)]
