"""What a family's rules do to tensors: a Megatron-Core tensor is made of blocks of rows of its Hugging Face parts, no value changed.

A block's rows lie together on either side, so files are converted block by block (convert.py) and tensors by cat and split (here).
Shape legend: G query groups, R queries a group, D channels a head, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.families.rules import Rule


class Block(NamedTuple):
    """Rows [start, start + rows) of one of a rule's parts."""

    part: int
    start: int
    rows: int


def blocks(rule: Rule, model: ModelConfig) -> list[Block]:
    """Return the blocks of rows that make up a rule's Megatron-Core tensor, from its top to its bottom."""
    counts = [shape[0] for _, shape in rule.hf]
    if rule.op in ("copy", "rows"):
        return [Block(part, 0, count) for part, count in enumerate(counts)]
    groups = model.num_query_groups  # of each: R*D rows of q (G*R*D, H), D of k and of v (G*D, H)
    return [Block(part, group * (count // groups), count // groups) for group in range(groups) for part, count in enumerate(counts)]


def pack(rule: Rule, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Return the Megatron-Core tensor of a rule from its Hugging Face parts, in the rule's order."""
    return torch.cat([parts[part][start : start + rows] for part, start, rows in blocks(rule, model)])


def unpack(rule: Rule, tensor: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Return the Hugging Face parts of a rule from its Megatron-Core tensor, in the rule's order."""
    found = blocks(rule, model)
    pieces = sorted(zip(found, tensor.split([block.rows for block in found]), strict=True), key=lambda pair: pair[0])
    return [torch.cat([piece for block, piece in pieces if block.part == part]) for part in range(len(rule.hf))]
