"""The cache of a batch of rows between forward passes: keys and values, convolution and state-space states, allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_prism.generate.blocks import Block
from megatron_prism.parallel import host


class Cache:
    """The states of each block: states[block] has the shape (rows, *shape per row)."""

    def __init__(self, blocks: Sequence[Block], num_rows: int, size_K: int):
        self._states = [block.states(size_K) for block in blocks]
        # zeros, not empty: masked values are multiplied by zero, so they must not be NaN
        self.states = [
            tuple(torch.zeros(num_rows, *state.shape, dtype=state.dtype, device=host.device()) for state in states)
            for states in self._states
        ]

    def copy_rows(self, rows: Sequence[int], source: Cache, source_rows: Sequence[int], num_tokens: int) -> None:
        """Copy rows of a cache (this one or another) into rows of this one. num_tokens: the tokens of the longest source row."""
        to_R, from_R = (torch.tensor(part, device=host.device()) for part in (rows, source_rows))
        for states, others, kinds in zip(self.states, source.states, self._states, strict=True):
            for state, other, kind in zip(states, others, kinds, strict=True):
                if kind.has_tokens:
                    state[to_R, :, :num_tokens] = other[from_R, :, :num_tokens]
                else:
                    state[to_R] = other[from_R]
