"""One training step and one validation pass, over any layout, through Megatron-Core's own schedules.

Shape legend: B sequences of a microbatch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.parallel import compat, host
from megatron_prism.parallel.groups import Groups
from megatron_prism.train import optim

Batch = dict[str, torch.Tensor]  # tokens_BS, labels_BS, loss_mask_BS, position_ids_BS


@dataclass(frozen=True)
class StepResult:
    """Mean loss a token over the whole step, the tokens it is over, and the gradient norm before clipping."""

    loss: float
    num_tokens: int
    grad_norm: float


def train_step(
    chunks: Sequence[Any], optimizer: Any, microbatches: Sequence[Batch], lr: float, weight_decay: float, groups: Groups
) -> StepResult:
    """Run forward and backward over this rank's microbatches and update the weights once."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = _run(chunks, microbatches, groups, forward_only=False)
    optim.set_rates(optimizer, lr, weight_decay)
    _, grad_norm, _ = optimizer.step()
    loss, num_tokens = _reduce(sums, groups)
    return StepResult(loss, num_tokens, float(grad_norm))


@torch.no_grad()
def validate(chunks: Sequence[Any], microbatches: Sequence[Batch], groups: Groups) -> float:
    """Return the mean loss a token over the microbatches of all data-parallel ranks."""
    for chunk in chunks:
        chunk.eval()
    loss, _ = _reduce(_run(chunks, microbatches, groups, forward_only=True), groups)
    for chunk in chunks:
        chunk.train()
    return loss


def _run(chunks: Sequence[Any], microbatches: Sequence[Batch], groups: Groups, forward_only: bool) -> torch.Tensor:
    """Run Megatron's schedule for this layout; return [loss summed over tokens, tokens] of this rank's microbatches."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    size_B, size_S = microbatches[0]["tokens"].shape

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = _on_device(next(iterator), groups)
        loss_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return loss_BS, lambda output: _masked_sum(output, batch["loss_mask"])

    iterators = [iter(microbatches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=size_S,
        micro_batch_size=size_B,
        decoder_seq_length=size_S,
        forward_only=forward_only,
    )
    if not outputs:  # only the last stage has a loss
        return torch.zeros(2, dtype=torch.float64, device=host.device())
    return torch.stack([output["sums"] for output in outputs]).double().sum(0)


def _masked_sum(loss_BS: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss = (loss_BS.float() * mask_BS).sum()
    num_tokens = mask_BS.sum()
    return loss, num_tokens.int(), {"sums": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def _on_device(batch: Batch, groups: Groups) -> Batch:
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    moved = {key: batch[key].to(host.device(), non_blocking=True) for key in keys}
    return compat.batch_of_context_rank(moved, groups.cp_group) if groups.cp > 1 else moved


def _reduce(sums: torch.Tensor, groups: Groups) -> tuple[float, int]:
    """Return (mean loss, tokens) over all ranks: summed over data parallelism, handed on by the last pipeline stage."""
    if groups.is_last_stage and groups.dp * groups.cp > 1:
        dist.all_reduce(sums, group=groups.dp_cp_group)
    if groups.pp > 1:
        dist.broadcast(sums, groups.last_stage_rank, group=groups.pp_group)
    total, num_tokens = sums.tolist()
    return total / max(num_tokens, 1.0), int(num_tokens)
