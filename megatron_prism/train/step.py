"""The forward and backward passes of one step, and a validation pass, through Megatron-Core's schedules. Any objective runs on any layout.

A step is five calls: forward_backward, optim.measure, read, guard.decide, optim.apply. In `read` the host waits for the device, and nowhere else
(tests/unit/train/test_waits.py counts; docs/GPU.md says what Megatron-Core adds).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.models import forward
from megatron_prism.models.batch import INPUTS, Batch, model_batch, packed_documents
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups
from megatron_prism.train.objective import Objective
from megatron_prism.train.timers import Timers


@dataclass(frozen=True)
class Means:
    """An objective's loss and reports, each divided by its weight, and the weight: over all microbatches and ranks, equal on every rank.

    num_tokens: the tokens of the loss mask. Without a loss mask: all tokens.
    """

    loss: float
    weight: float
    num_tokens: int
    reports: Mapping[str, float]


@dataclass(frozen=True)
class Sums:
    """An objective's sums over all microbatches and ranks, still on the device: [loss, weight, tokens, reports...] in fp64, and the reports' names."""

    values: torch.Tensor
    names: tuple[str, ...]


def read(sums: Sums, grad_norm: Any = 0.0) -> tuple[Means, float]:
    """Wait for the device, once, and return the means, and the norm that optim.measure returned (a float or a scalar tensor)."""
    beside = [grad_norm.view(1).double()] if isinstance(grad_norm, torch.Tensor) else []
    loss, weight, num_tokens, *rest = torch.cat([sums.values, *beside]).tolist()
    norm = rest.pop() if beside else float(grad_norm)
    means = [value / (weight if weight > 0 else 1.0) for value in (loss, *rest)]
    return Means(means[0], weight, int(num_tokens), dict(zip(sums.names, means[1:], strict=True))), norm


def mean_of(parts: Sequence[Means]) -> Means:
    """Return the means over several batches, each by its weight."""
    weight = sum(part.weight for part in parts)
    shares = [part.weight / weight if weight else 1 / len(parts) for part in parts]

    def mean(values: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    reports = {name: mean([part.reports[name] for part in parts]) for name in parts[0].reports}
    return Means(mean([part.loss for part in parts]), weight, sum(part.num_tokens for part in parts), reports)


def forward_backward(chunks: Sequence[Any], microbatches: Sequence[Batch], objective: Objective, groups: Groups, timers: Timers) -> Sums:
    """Compute the gradient of the objective's mean into the wrapped chunks' buffers, reduced over the ranks as their optimizer needs it.

    Nothing waits for the device. Without weight the gradients stay sums.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
        chunk.zero_grad()
    chunks[0].config.timers = timers
    sums = _run(chunks, microbatches, objective, groups, forward_only=False)
    chunks[0].config.timers = None
    with timers.phase("optimizer", on_device=True):
        reduced = _reduce(sums, objective, groups)
        factor_1 = _reciprocal(reduced.values[1])
        for chunk in chunks:
            chunk.scale_gradients(factor_1)
    return reduced


def _reciprocal(weight: torch.Tensor) -> torch.Tensor:
    """Return 1 / weight, or 1 where there is no weight. Shape (1,): a tensor without dimensions would be rounded to the gradients' bf16 before it multiplies."""
    return torch.where(weight > 0, 1.0 / weight, 1.0).float().view(1)


def evaluate(chunks: Sequence[Any], microbatches: Sequence[Batch], objective: Objective, groups: Groups) -> Means:
    """Return the objective's means over the microbatches of all data-parallel ranks, without gradients. The model's state does not change."""
    with forward.evaluating(chunks):
        return read(_reduce(_run(chunks, microbatches, objective, groups, forward_only=True), objective, groups))[0]


def _run(chunks: Sequence[Any], microbatches: Sequence[Batch], objective: Objective, groups: Groups, forward_only: bool) -> torch.Tensor:
    """Return [loss, weight, tokens, reports...] summed over this rank's microbatches. They are zeros before the last pipeline stage."""
    names = (*INPUTS, *objective.needs)

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        microbatch = next(iterator)
        batch, documents = model_batch(microbatch, names, groups), packed_documents(microbatch)
        nll_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=documents)
        return nll_BS, partial(_loss, objective=objective, batch=batch)

    outputs = forward.schedule(chunks, forward_step, microbatches, forward_only)
    if not outputs:  # only the last stage has a loss
        return torch.zeros(3 + len(objective.reports), dtype=torch.float64, device=host.device())
    return torch.stack([output["sums"] for output in outputs]).double().sum(0)


def _loss(nll_BS: torch.Tensor, objective: Objective, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (loss sum, 0 tokens, sums), the form of Megatron's schedules. They count tokens in int32, so forward_backward divides by the weight."""
    terms = objective.terms(nll_BS.float(), batch)
    num_tokens = batch["loss_mask"].sum() if "loss_mask" in batch else torch.full((), nll_BS.numel(), device=nll_BS.device)
    sums = [terms.loss, terms.weight, num_tokens, *(terms.sums[name] for name in objective.reports)]
    return terms.loss, torch.tensor(0, dtype=torch.int), {"sums": torch.stack([value.detach().to(terms.loss.dtype) for value in sums])}


def _reduce(sums: torch.Tensor, objective: Objective, groups: Groups) -> Sums:
    """Sum over data and context parallelism, and broadcast from the last pipeline stage."""
    if groups.is_last_stage and groups.dp * groups.cp > 1:
        dist.all_reduce(sums, group=groups.dp_cp_group)
    if groups.pp > 1:
        dist.broadcast(sums, groups.last_stage_rank, group=groups.pp_group)
    return Sums(sums, objective.reports)
