"""The entropy of a model's next token, from logits whose vocabulary is split over the tensor-parallel ranks.

Shape legend: B sequences, S tokens of a sequence, T = S * B tokens, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.models import chunked_loss
from megatron_prism.models.build import unwrap
from megatron_prism.parallel.groups import Groups

PIECE_BYTES = 2**28  # of a rank's fp32 logits processed at a time


@contextmanager
def of_output(model: torch.nn.Module, groups: Groups) -> Iterator[list[torch.Tensor]]:
    """Yield a list. Each pass of the output layer appends its entropy (B, S); a chunk without an output layer appends nothing.

    The entropy is computed as the logits leave the layer (scaled, padding rows masked), because the model's loss overwrites them.
    """
    entropies: list[torch.Tensor] = []
    last = unwrap(model)
    if not last.post_process:
        yield entropies
        return

    def add(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        entropies.append(entropy(output[0], groups).transpose(0, 1))

    hook = last.output_layer.register_forward_hook(add)
    try:
        with chunked_loss.whole(last):
            yield entropies
    finally:
        hook.remove()


def entropy(logits_SBV: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the entropy in nats (S, B), fp32.

    No rank gathers another's part of the vocabulary. The memory beside the logits is a few times PIECE_BYTES.
    """
    entropies = []
    for logits_TV in logits_SBV.flatten(0, 1).split(max(1, PIECE_BYTES // (4 * logits_SBV.shape[-1]))):
        largest_T = logits_TV.amax(-1).float()
        _reduce(largest_T, dist.ReduceOp.MAX, groups)
        shifted_TV = logits_TV.float() - largest_T[:, None]
        exp_TV = shifted_TV.exp()
        sums_2T = torch.stack([exp_TV.sum(-1), shifted_TV.mul_(exp_TV).sum(-1)])
        _reduce(sums_2T, dist.ReduceOp.SUM, groups)
        entropies.append(sums_2T[0].log() - sums_2T[1] / sums_2T[0])
    return torch.cat(entropies).view(logits_SBV.shape[:2])


def _reduce(values: torch.Tensor, op: Any, groups: Groups) -> None:
    if groups.tp > 1:
        dist.all_reduce(values, op=op, group=groups.tp_group)
