"""The reference model of the KL term: a copy of this rank's parameters, in the model's dtype, which takes their place for a block.

There is no second model: the reference is computed by the same modules, with the same kernels, on the same layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_prism.checkpoint import sharded
from megatron_prism.core.config import ReferenceConfig
from megatron_prism.models.build import unwrap

PREFIX = "reference."  # of its keys in a checkpoint


class Reference:
    """A copy of what the chunks hold now. A checkpoint keeps it beside the weights, laid out as they are (sharded.Beside).

    A parameter that two modules share, as tied embeddings are on one pipeline stage, is one parameter here too.
    """

    def __init__(self, chunks: Sequence[Any], config: ReferenceConfig):
        self._chunks, self._config = chunks, config
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._values = [parameter.detach().clone() for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the chunks are the reference: their parameters hold its values. Call it within optim.settled, and do not train."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._values[index] = self._values[index], parameter.data

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the reference towards the policy, every reference.interval steps. Call it within optim.settled.

        Source: soft updates of Gorbatovski et al. (arXiv 2404.09656), which the paper names.
        """
        if self._config.interval == 0 or step % self._config.interval:
            return
        alpha = self._config.alpha
        for parameter, value in zip(self._parameters, self._values, strict=True):
            value.lerp_(parameter, alpha)  # one rounding: in bf16 a second one would keep it from arriving, or move it where both are equal

    def sharded(self) -> dict[str, Any]:
        """Return it as Megatron's sharded state, under names of its own."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedBase
        from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

        with self.in_place():
            state = sharded.weights(self._chunks)
            for shard in nested_values(state):
                if isinstance(shard, ShardedBase) and isinstance(shard.data, torch.Tensor):
                    shard.data = shard.data.detach()  # it is the parameter itself, which holds the policy again after the block
        add_prefix_for_sharding(state, PREFIX)
        return state

    def restore(self, loaded: Mapping[str, Any]) -> None:
        """Take the values that a checkpoint has of `sharded`."""
        with self.in_place():
            for index, chunk in enumerate(self._chunks):
                unwrap(chunk).load_state_dict(loaded[f"chunk{index}"])
