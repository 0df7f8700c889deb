"""Apply a family's rules: a Megatron-Core tensor consists of blocks of rows of its Hugging Face parts, and no value changes.

A block's rows are contiguous on both sides. checkpoint/convert.py moves files block by block; to_mcore and to_hf do the same with tensors
in memory. Both sides are whole tensors. Tensors split by tensor or pipeline parallelism must be gathered first, and a vocabulary's padding
rows removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from megatron_prism.families.rules import Rule

if TYPE_CHECKING:
    from torch import Tensor


class Block(NamedTuple):
    """Rows [start, start + rows) of one of a rule's parts."""

    part: int
    start: int
    rows: int


def blocks(rule: Rule) -> list[Block]:
    """Return the blocks of rows that make up a rule's Megatron-Core tensor, from top to bottom."""
    if rule.rows is not None:
        start, stop = rule.rows
        return [Block(0, start, stop - start)]
    counts = [shape[0] // rule.num_groups for _, shape in rule.hf]  # qkv: for each group the rows of its queries, key and value
    return [Block(part, group * count, count) for group in range(rule.num_groups) for part, count in enumerate(counts)]


def to_mcore(rule: Rule, parts: Mapping[str, Tensor]) -> Tensor:
    """Return a rule's Megatron-Core tensor, built from the Hugging Face tensors in `parts` that the rule names.

    A tensor of a single block is a view of its part.
    """
    import torch

    named = [parts[name] for name, _ in rule.hf]
    for (name, shape), tensor in zip(rule.hf, named, strict=True):
        assert tensor.shape == shape, (name, tensor.shape, shape)
    rows = [named[part][start : start + count] for part, start, count in blocks(rule)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def to_hf(rule: Rule, tensor: Tensor) -> dict[str, Tensor]:
    """Return a rule's Hugging Face tensors by name. A slice gives only its own rows; hf_tensors joins slices.

    A part of a single block is a view of the tensor.
    """
    import torch

    assert tensor.shape == rule.shape, (rule.mcore, tensor.shape, rule.shape)
    rows: list[list[Tensor]] = [[] for _ in rule.hf]
    made_of = blocks(rule)
    for block, part in zip(made_of, tensor.split([block.rows for block in made_of]), strict=True):
        rows[block.part].append(part)
    return {name: own[0] if len(own) == 1 else torch.cat(own) for (name, _), own in zip(rule.hf, rows, strict=True)}


def hf_tensors(rules: Iterable[Rule], read: Callable[[Rule], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor of a model with its name. `read` returns a rule's Megatron-Core tensor.

    Memory holds the tensors of one rule, or all slices of one tensor.
    """
    import torch

    slices: dict[str, list[Tensor]] = {}
    for rule in rules:
        for name, tensor in to_hf(rule, read(rule)).items():
            if rule.rows is None:
                yield name, tensor
                continue
            slices.setdefault(name, []).append(tensor)
            if rule.rows[1] == rule.hf[0][1][0]:  # the last slice: rules.check_names has checked that slices are complete and in order
                yield name, torch.cat(slices.pop(name))
