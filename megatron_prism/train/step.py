"""One training step and one validation pass, over any layout, through Megatron-Core's own schedules.

Shape legend: B sequences of a microbatch, S tokens of a sequence, T tokens of all its documents in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.parallel import host, megatron_versions
from megatron_prism.parallel.groups import Groups
from megatron_prism.train import optim
from megatron_prism.train.timers import Timers

Batch = dict[str, torch.Tensor]  # tokens_BS, labels_BS, loss_mask_BS, position_ids_BS; document_ids_BS where documents are masked
KEYS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class StepResult:
    """Mean loss a token over the whole step, the tokens it is over, the gradient norm before clipping, and whether the weights moved."""

    loss: float
    num_tokens: int
    grad_norm: float
    taken: bool


def train_step(
    chunks: Sequence[Any],
    optimizer: Any,
    microbatches: Sequence[Batch],
    lr: float,
    weight_decay: float,
    groups: Groups,
    accept: Callable[[float, float], bool],
    timers: Timers,
) -> StepResult:
    """Run forward and backward over this rank's microbatches and update the weights once, if `accept(loss, gradient norm)` says so."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    chunks[0].config.timers = timers
    sums = _run(chunks, microbatches, groups, forward_only=False)
    chunks[0].config.timers = None
    with timers.phase("optimizer", on_device=True):
        optim.set_rates(optimizer, lr, weight_decay)
        loss, num_tokens = _reduce(sums, groups)
        grad_norm, taken = optim.update(optimizer, lambda norm: accept(loss, norm))
    return StepResult(loss, num_tokens, grad_norm, taken)


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

    size_B, size_S = _folded(microbatches[0])["tokens"].shape

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        microbatch = next(iterator)
        batch, packed = _on_device(_folded(microbatch), groups), _packed(microbatch)
        loss_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
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


def _folded(batch: Batch) -> Batch:
    """Return a microbatch as the model takes it: (B, S), or where documents are masked one row (1, B * S) of them, as `thd` wants."""
    return {key: batch[key].reshape(1, -1) for key in KEYS} if "document_ids" in batch else batch


def _packed(batch: Batch) -> Any:
    """Return Megatron's PackedSeqParams of a microbatch's documents; None where they are not masked. A sequence's end is a document's."""
    if "document_ids" not in batch:
        return None
    ids_BS = batch["document_ids"]
    begins_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = ids_BS.diff() != 0
    size_S, size_T = ids_BS.shape[1], ids_BS.numel()
    cu_seqlens = torch.cat([begins_BS.view(-1).nonzero()[:, 0], torch.tensor([size_T])]).int()
    longest = int(cu_seqlens.diff().max())
    # A bound, of few values: Megatron keeps 32 rotary tables by length. And never size_T: thd then counts positions through the row.
    bound = min(1 << (longest - 1).bit_length(), size_S) + 1
    return megatron_versions.packed_sequences(cu_seqlens.to(host.device(), non_blocking=True), bound, size_T)


def _on_device(batch: Batch, groups: Groups) -> Batch:
    moved = {key: batch[key].to(host.device(), non_blocking=True) for key in KEYS}
    return megatron_versions.batch_of_context_rank(moved, groups.cp_group) if groups.cp > 1 else moved


def _reduce(sums: torch.Tensor, groups: Groups) -> tuple[float, int]:
    """Return (mean loss, tokens) over all ranks: summed over data parallelism, handed on by the last pipeline stage."""
    if groups.is_last_stage and groups.dp * groups.cp > 1:
        dist.all_reduce(sums, group=groups.dp_cp_group)
    if groups.pp > 1:
        dist.broadcast(sums, groups.last_stage_rank, group=groups.pp_group)
    total, num_tokens = sums.tolist()
    return total / max(num_tokens, 1.0), int(num_tokens)
