"""What a family's rules mean: a Megatron-Core tensor is made of blocks of rows of its Hugging Face parts, and no value is changed.

A block's rows lie together on either side, so that files are converted block by block.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_prism.core.config import ModelConfig
from megatron_prism.families.rules import Rule


class Block(NamedTuple):
    """Rows [start, start + rows) of one of a rule's parts."""

    part: int
    start: int
    rows: int


def blocks(rule: Rule, model: ModelConfig) -> list[Block]:
    """Return the blocks of rows that make up a rule's Megatron-Core tensor, from its top to its bottom."""
    if rule.rows is not None:
        start, stop = rule.rows
        return [Block(0, start, stop - start)]
    counts = [shape[0] for _, shape in rule.hf]
    if rule.op != "qkv":
        return [Block(part, 0, count) for part, count in enumerate(counts)]
    groups = model.num_query_groups  # of each group: its queries' rows, its key's, its value's
    return [Block(part, group * (count // groups), count // groups) for group in range(groups) for part, count in enumerate(counts)]
