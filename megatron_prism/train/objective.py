"""What a training step minimises, as a value: what it needs of a batch, and a pure function from the labels' negative log-likelihood.

A new objective is a function like cross_entropy below and an Objective that names what it reads; the step, the layouts and packing know
none by name. It sees per-token tensors alone: what belongs to a sequence or a group (an advantage, 1 / its length) comes as one value a token.
Shape legend: B sequences of a microbatch, S tokens of a sequence. In one row of masked documents B is 1 and S is T = B * S, under
context parallelism S is this rank's part; so an objective says nothing of neighbouring positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_prism.models.batch import Batch


@dataclass(frozen=True)
class Terms:
    """What one microbatch adds to the step's sums: scalars on its device, of which only `loss` has a gradient.

    The step minimises its loss sum over its weight sum, summed over all microbatches and ranks; the weight may be any number above 0.
    sums: to report, by the names in Objective.reports; each is divided by the weight as well.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A pure function (nll_BS, batch) -> Terms, the per-token tensors it reads beside tokens, position_ids and labels, and its reports.

    nll_BS is fp32, with its gradient. Only it is given: logits stay where they lie, split over tensor parallelism. What an objective wants
    of another model, or of earlier weights (log-probabilities, entropies), comes with the batch, from models.forward.
    """

    terms: Callable[[torch.Tensor, Batch], Terms]
    needs: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()


def cross_entropy(nll_BS: torch.Tensor, batch: Batch) -> Terms:
    """Return the negative log-likelihood of the labels where loss_mask is 1, and how many those are."""
    mask_BS = batch["loss_mask"]
    return Terms((nll_BS * mask_BS).sum(), mask_BS.sum())


CROSS_ENTROPY = Objective(cross_entropy, needs=("loss_mask",))
