"""Held-out loss by source of a prepared mixture: the figure of train's validation, for any checkpoint's model, with its standard error.

The sequences are those that a training run of the same seed and seq_length validates on, whatever the layout.
Shape legend: B sequences of a microbatch, S tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prism.data import loader
from megatron_prism.data.mixture import Prepared
from megatron_prism.generate.engine import not_finite
from megatron_prism.models import forward
from megatron_prism.parallel.groups import Groups, gather


@dataclass(frozen=True)
class Loss:
    """The mean negative log-likelihood of a source's held-out tokens, in nats a token.

    standard_error: clustered by sequence, whose tokens are not independent; None for fewer than two sequences.
    """

    loss: float
    num_tokens: int
    num_sequences: int
    standard_error: float | None


def losses(
    chunks: Sequence[Any],
    prepared: Prepared,
    groups: Groups,
    *,
    num_sequences: int,
    seq_length: int,
    micro_size: int = 1,
    seed: int,
    document_mask: bool = False,
) -> dict[str, Loss]:
    """Return the loss of each source that has held-out documents, over its first num_sequences sequences. Every rank gets all of it.

    Every rank of the gang calls this, on any TP x PP x CP x DP (documents are not masked under CP). `loader.check_held_out` has found no problem.
    Raises: CheckpointError on every rank where a loss is not finite.
    seed, document_mask: those of the training run whose validation is meant.
    """
    position = loader.Position(groups.dp_rank, groups.dp)
    by_source = {}
    for name, sequences in loader.held_out(prepared, seq_length, seed, document_mask).items():
        microbatches = loader.valid_batches(sequences, num_sequences, micro_size, position)
        by_source[name] = of_sequences(list(_by_sequence(chunks, microbatches, groups).values()))
        if by_source[name].num_tokens and not math.isfinite(by_source[name].loss):
            raise not_finite(f"held-out tokens of {name}").agreed()
    return by_source


def of_sequences(sums: Sequence[tuple[float, int]]) -> Loss:
    """Return the loss over sequences, each as its (negative log-likelihood, tokens). A sequence without tokens is left out.

    The loss is a ratio of two sums, so its error is that of the sequences' deviations from it (linearised ratio estimator).
    Source: Cochran, Sampling Techniques, section 2.11.
    """
    of_tokens = [(nll, count) for nll, count in sums if count]
    num_tokens, num_sequences = sum(count for _, count in of_tokens), len(of_tokens)
    loss = math.fsum(nll for nll, _ in of_tokens) / num_tokens if num_tokens else math.nan
    squares = math.fsum((nll - loss * count) ** 2 for nll, count in of_tokens)
    error = math.sqrt(squares * num_sequences / (num_sequences - 1)) / num_tokens if num_sequences > 1 else None
    return Loss(loss, num_tokens, num_sequences, error)


def _by_sequence(chunks: Sequence[Any], microbatches: Sequence[Mapping[str, Any]], groups: Groups) -> dict[int, tuple[float, int]]:
    """Return (negative log-likelihood, tokens) of each sequence of all data-parallel ranks, by its number and in its order."""
    rows = []
    for microbatch, log_probs_BS in zip(microbatches, forward.log_probs(chunks, microbatches, groups), strict=True):
        mask_BS = microbatch["loss_mask"].to(log_probs_BS.device).double()
        nll_B, count_B = -(log_probs_BS.double() * mask_BS).sum(1), mask_BS.sum(1)
        rows += [(nll, int(count)) for nll, count in zip(nll_B.tolist(), count_B.tolist(), strict=True)]
    mine = {groups.dp_rank + number * groups.dp: row for number, row in enumerate(rows)}  # as loader.valid_batches deals them
    everyone: dict[int, tuple[float, int]] = {}
    for part in gather(mine):
        everyone |= part
    return dict(sorted(everyone.items()))
