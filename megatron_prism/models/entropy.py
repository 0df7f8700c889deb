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
from megatron_prism.models.chunked_loss import ValuesOf
from megatron_prism.parallel.groups import Groups

PIECE_BYTES = 2**28  # of a rank's fp32 logits processed at a time


@contextmanager
def beside_loss(model: torch.nn.Module, groups: Groups) -> Iterator[None]:
    """Within the block, let a model with labels return its loss and its entropy (2, B, S), fp32; a chunk without an output layer is as it was.

    Where the model computes its loss in parts, the entropy is computed of the same parts.
    """
    last = unwrap(model)
    if not last.post_process:
        yield
        return

    def both_of(loss_of: ValuesOf) -> ValuesOf:
        def both(labels_BS: torch.Tensor, logits_SBV: torch.Tensor) -> torch.Tensor:
            entropy_BS = entropy(logits_SBV, groups).transpose(0, 1)  # first: the loss overwrites the logits
            return torch.stack([loss_of(labels_BS, logits_SBV).float(), entropy_BS])

        return both

    with chunked_loss.replaced_loss(last, both_of):
        yield


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
