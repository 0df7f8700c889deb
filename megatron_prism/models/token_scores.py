"""The log-probability of given tokens at given positions of texts, and whether each is the likeliest, on any layout.

log_probs (forward.py) scores the one label of every position. Here a text is computed once for all tokens that are asked of it, and only the
positions that are asked for reach the softmax.
Shape legend: B sequences, S tokens of a sequence, V the vocabulary (padded; under TP this rank's part of it), N the tokens asked of a
microbatch, P the part of them processed at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.models.batch import Batch, model_batch
from megatron_prism.models.forward import evaluating, for_layout, schedule
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups

PIECE_BYTES = 2**28  # of a rank's fp32 logits processed at a time


def token_scores(
    chunks: Sequence[torch.nn.Module], microbatches: Sequence[Batch], asked: Sequence[torch.Tensor], vocab_size: int, groups: Groups
) -> list[torch.Tensor]:
    """Return, for each microbatch, log-probability and 1 or 0 for likeliest or not (2, N), fp32, of each token asked of it.

    microbatches: tokens and position_ids (B, S), equal in shape. asked: (3, N) of row, position and token, one N for all; position i gives the
    distribution of the token after i. Of equally likely tokens the first of the vocabulary is the likeliest. Every rank of a model replica
    calls this with the same arguments and gets the same values; data-parallel ranks pass their own. Dense and hybrid, any TP (with sequence
    parallelism or without) x PP.
    Raises: ValueError under context parallelism.
    """
    if groups.cp > 1:
        raise ValueError(f"token scores under context parallelism {groups.cp}: each rank would have a part of each text")
    ready = for_layout(microbatches, chunks, groups)
    wanted = [*asked, *[asked[-1]] * (len(ready) - len(asked))]
    held = [{**batch, "asked": asked_3N} for batch, asked_3N in zip(ready, wanted, strict=True)]

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        microbatch = next(iterator)
        batch = model_batch(microbatch, ("tokens", "position_ids"), groups)
        output_BSV = model(batch["tokens"], batch["position_ids"], None)
        return output_BSV, partial(_scores, asked_3N=microbatch["asked"].to(host.device()), vocab_size=vocab_size, groups=groups)

    with evaluating(chunks):
        outputs = schedule(chunks, forward_step, held, forward_only=True, collect=True)
    on_others = (len(asked), 2, asked[0].shape[1])
    scores = torch.stack(outputs[: len(asked)]) if outputs else torch.empty(on_others, device=host.device())
    if groups.pp > 1:
        dist.broadcast(scores, groups.last_stage_rank, group=groups.pp_group)
    return list(scores)


def _scores(output_BSV: torch.Tensor, non_loss_data: bool, asked_3N: torch.Tensor, vocab_size: int, groups: Groups) -> torch.Tensor:
    """Return the scores (2, N) of a microbatch's tokens, from logits whose vocabulary is split over the tensor-parallel ranks."""
    size_V = output_BSV.shape[-1]
    first = groups.tp_rank * size_V
    num_true = min(max(vocab_size - first, 0), size_V)  # of this rank's columns; the others are padding
    parts = []
    for row_P, position_P, token_P in asked_3N.split(max(1, PIECE_BYTES // (4 * size_V)), dim=1):
        logits_PV = output_BSV[row_P, position_P].float()
        logits_PV[:, num_true:] = -torch.inf
        own_P, choice_P = logits_PV.amax(-1), logits_PV.argmax(-1) + first
        largest_P = _reduced(own_P.clone(), dist.ReduceOp.MAX, groups)
        choice_P = _reduced(torch.where(own_P == largest_P, choice_P, vocab_size), dist.ReduceOp.MIN, groups)
        sum_P = _reduced((logits_PV - largest_P[:, None]).exp().sum(-1), dist.ReduceOp.SUM, groups)
        column_P = token_P - first
        is_here_P = (column_P >= 0) & (column_P < num_true)
        logit_P = logits_PV.gather(1, column_P.clamp(0, size_V - 1)[:, None])[:, 0]
        logit_P = _reduced(torch.where(is_here_P, logit_P, 0.0), dist.ReduceOp.SUM, groups)
        parts.append(torch.stack([logit_P - largest_P - sum_P.log(), (choice_P == token_P).float()]))
    return torch.cat(parts, dim=1)


def _reduced(values: torch.Tensor, op: Any, groups: Groups) -> torch.Tensor:
    if groups.tp > 1:
        dist.all_reduce(values, op=op, group=groups.tp_group)
    return values
