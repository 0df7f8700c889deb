"""What a training step minimises: the tensors that it reads of a batch, and a pure function of the labels' negative log-likelihood.

A new objective is a function like cross_entropy below, and an Objective that names the tensors it reads. The step, the layouts and packing do
not change. An objective gets per-token tensors only: a value of a sequence or a group (an advantage, 1 / its length) is repeated for each token.
Shape legend: B sequences of a microbatch, S tokens of a sequence. With a document mask B is 1 and S is the tokens of all sequences. Under
context parallelism S is this rank's part. So an objective must not combine neighbouring positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_prism.models.batch import Batch


@dataclass(frozen=True)
class Terms:
    """What one microbatch adds to the step's sums: scalars on its device. Only `loss` has a gradient.

    The step minimises the sum of the losses divided by the sum of the weights, over all microbatches and ranks. The weights may be any numbers
    whose sum is above 0. sums: what is reported, by the names in Objective.reports, each divided by the weight too.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A pure function (nll_BS, batch) -> Terms, the per-token tensors it reads beside tokens, position_ids and labels, and its reports.

    nll_BS is fp32 and has a gradient. Logits are not given: they are split over tensor parallelism. Values of another model or of earlier
    weights (log-probabilities, entropies) are computed by models.forward and come with the batch.
    """

    terms: Callable[[torch.Tensor, Batch], Terms]
    needs: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()


def cross_entropy(nll_BS: torch.Tensor, batch: Batch) -> Terms:
    """Return the negative log-likelihood of the labels where loss_mask is 1, and the number of these labels."""
    mask_BS = batch["loss_mask"]
    return Terms((nll_BS * mask_BS).sum(), mask_BS.sum())


CROSS_ENTROPY = Objective(cross_entropy, needs=("loss_mask",))
