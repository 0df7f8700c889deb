"""The training forward pass alone, on any layout: a text's logits, and the log-probability of every label.

Reinforcement learning, evaluation and verification use it. The schedule is Megatron-Core's and the loss is the model's own, so a
log-probability is the negative of the number that a training step minimises, from the same kernels.
Shape legend: M microbatches, B sequences of one, S tokens of a sequence, V the vocabulary (padded; under TP this rank's part of it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.models import entropy
from megatron_prism.models.batch import INPUTS, Batch, model_batch, packed_documents, padded_batch
from megatron_prism.models.build import unwrap
from megatron_prism.models.local_attention import zigzag
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups


def schedule(
    chunks: Sequence[Any],
    forward_step: Callable[[Iterator[Batch], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]],
    microbatches: Sequence[Batch],
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Run Megatron's schedule for this layout. Return the reports by microbatch on the last pipeline stage, nothing elsewhere.

    forward_step and its loss function follow Megatron's protocol (megatron/core/pipeline_parallel/schedules.py). With `collect` the loss
    function returns any data, and no loss.
    Raises: ValueError where the microbatches differ in shape, since pipeline stages exchange tensors of a fixed shape.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    size_B, size_S = _shape(microbatches)
    if "document_ids" in microbatches[0]:
        size_B, size_S = 1, size_B * size_S
    iterators = [iter(microbatches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=size_S,
        micro_batch_size=size_B,
        decoder_seq_length=size_S,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def _shape(microbatches: Sequence[Batch]) -> tuple[int, int]:
    """Return the (B, S) of all microbatches.

    Raises: ValueError where they differ.
    """
    shapes = {(tokens_BS.shape[0], tokens_BS.shape[1]) for tokens_BS in (microbatch["tokens"] for microbatch in microbatches)}
    if len(shapes) != 1:
        raise ValueError(f"microbatches of one shape are needed, found {sorted(shapes)}")
    return shapes.pop()


@contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put the chunks in evaluation mode without gradients, for the length of a block."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def logits(chunks: Sequence[torch.nn.Module], tokens: Sequence[int], groups: Groups, last_only: bool = False) -> torch.Tensor | None:
    """Return the logits (S, padded vocabulary) of a text, or of its last token (1, V), on the last pipeline stage; None elsewhere.

    Works on any TP x PP, also sequence-parallel: a text of indivisible length is padded at its end. Not under context parallelism (ValueError).
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    if groups.cp > 1:
        raise ValueError(f"logits of a text under context parallelism {groups.cp}: each rank would have a part of them")
    tokens_BS = torch.tensor([tokens])
    text = {"tokens": tokens_BS, "position_ids": torch.arange(len(tokens))[None], "labels": tokens_BS}
    first = len(tokens) - 1 if last_only else 0

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = model_batch(next(iterator), INPUTS, groups)
        output_BSV = model(batch["tokens"], batch["position_ids"], None)
        return output_BSV, lambda output_BSV, non_loss_data: output_BSV[0, first : len(tokens)]

    with evaluating(chunks):
        outputs = schedule(chunks, forward_step, for_layout([text], chunks, groups), forward_only=True, collect=True)
        return gather_from_tensor_model_parallel_region(outputs[0]) if outputs else None


def log_probs(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Batch], groups: Groups) -> list[torch.Tensor]:
    """Return the log-probability of every label, for each of this rank's microbatches (B, S), fp32, on its device.

    Every rank of a model replica (TP, PP, CP) calls this with the same whole microbatches, and gets the same values. Data-parallel ranks
    pass their own microbatches, equal in number and shape. Any layout works, dense and hybrid, with or without document_ids. Labels must be
    ids of the vocabulary; the caller masks the values of meaningless labels. A length that the layout does not divide (by tp under sequence
    parallelism, by 2 * cp) is padded internally.
    The weights must be complete: under overlap_param_gather, call this within optim.settled.
    """
    return [scores_BS for (scores_BS,) in _scores(chunks, microbatches, groups, with_entropy=False)]


def log_probs_and_entropies(
    chunks: Sequence[torch.nn.Module], microbatches: Sequence[Batch], groups: Groups
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the results of log_probs, and each position's entropy over the vocabulary in nats (B, S), fp32."""
    return [(log_probs_BS, entropies_BS) for log_probs_BS, entropies_BS in _scores(chunks, microbatches, groups, with_entropy=True)]


def _scores(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Batch], groups: Groups, with_entropy: bool) -> torch.Tensor:
    """Return log-probabilities, and entropies, of each microbatch (M, 1 or 2, B, S)."""
    num_scores, (size_B, size_S) = 1 + with_entropy, _shape(microbatches)

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        microbatch = next(iterator)
        batch, documents = model_batch(microbatch, INPUTS, groups), packed_documents(microbatch)
        with entropy.beside_loss(model, groups) if with_entropy else nullcontext():
            values = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=documents)
        return values, partial(_scores_of, with_entropy=with_entropy)

    ready = for_layout(microbatches, chunks, groups)
    padded_S = ready[0]["tokens"].shape[1]
    with evaluating(chunks):
        outputs = schedule(chunks, forward_step, ready, forward_only=True, collect=True)
    if outputs:  # the last pipeline stage
        part = torch.stack(outputs[: len(microbatches)]).view(len(microbatches), num_scores, size_B, padded_S // groups.cp)
        scores = _of_whole_sequences(part, groups) if groups.cp > 1 else part
    else:
        scores = torch.empty((len(microbatches), num_scores, size_B, padded_S), device=host.device())
    if groups.pp > 1:
        dist.broadcast(scores, groups.last_stage_rank, group=groups.pp_group)
    return scores[..., :size_S]


def _scores_of(values: torch.Tensor, non_loss_data: bool, with_entropy: bool) -> torch.Tensor:
    """Return a microbatch's log-probabilities, and entropies (1 or 2, B, S), of the model's loss, and entropies."""
    nll_BS, *entropies_BS = values.float() if with_entropy else [values.float()]
    return torch.stack([-nll_BS, *entropies_BS])


def for_layout(microbatches: Sequence[Batch], chunks: Sequence[torch.nn.Module], groups: Groups) -> list[Batch]:
    """Return the microbatches padded to lengths that this layout divides. Interleaving also needs a multiple of pp of them: repeat the last."""
    sequence_parallel = unwrap(chunks[0]).config.sequence_parallel
    multiple = math.prod([groups.tp if sequence_parallel else 1, 2 * groups.cp if groups.cp > 1 else 1])
    ready = [padded_batch(microbatch, multiple) for microbatch in microbatches]
    return ready + [ready[-1]] * (-len(ready) % groups.pp if len(chunks) > 1 else 0)


def _of_whole_sequences(part: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the values of whole sequences (..., S) from each context-parallel rank's part (..., S / cp)."""
    parts = [torch.empty_like(part) for _ in range(groups.cp)]
    dist.all_gather(parts, part.contiguous(), group=groups.cp_group)
    positions = [zigzag(part.shape[-1], rank, groups.cp, part.device) for rank in range(groups.cp)]
    return torch.cat(parts, dim=-1)[..., torch.cat(positions).argsort()]
