"""What a merge alone asks of a model at rest: its provenance, the tensor that stands for a missing head, and all that is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from megatron_prism.checkpoint.at_rest import AtRest, Opened
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.families import names
from megatron_prism.hf import bits
from megatron_prism.hf.files import read_object

PROVENANCE = "merge.json"
BYTES_OF_A_VALUE = 16  # that a piece is cut by: of each parent in fp32, and what is made of them


def provenance(parent: AtRest) -> Mapping[str, Any] | None:
    """Return what a parent says of its own parents, where it is a merge; a merge.json of another program says nothing."""
    path = parent.assets / PROVENANCE
    if not path.is_file():
        return None
    try:
        facts = read_object(path, "a merge's provenance")
    except CheckpointError:
        return None
    return facts if facts.get("kind") == "merge" else None


def stands_for(parent: AtRest, name: str) -> str:
    """Return the rules' name of the parent's tensor that stands for a tensor: its embedding for a head that it does not have apart."""
    return parent.rules[names.EMBEDDING].hf[0][0] if name == names.HEAD and name not in parent.own else name


def nonfinite(opened: list[Opened]) -> list[Problem]:
    """Return a problem for each tensor of each parent that holds a NaN or an inf. It reads all of them."""
    problems: list[Problem] = []
    for each in opened:
        for name, shape in each.at_rest.shapes.items():
            try:
                with each.tensor(name) as read:
                    for first, count in pieces(shape):
                        read(first, count)
            except CheckpointError as error:
                problems += error.problems
    return problems


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of the pieces in which a tensor is merged: a row at least.

    A piece's numbers of some parents fit in a core's own cache.
    """
    return bits.spans(0, shape[0], prod(shape[1:]) * BYTES_OF_A_VALUE)
