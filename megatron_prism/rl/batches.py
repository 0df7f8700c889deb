"""Samples as microbatches of one fixed shape, an equal number on each data-parallel rank; and values of their tokens back to the samples.

A sample of P prompt tokens and R sampled ones takes P + R - 1 tokens of a row: the last one is only a label. Its labels are trained on from
token P - 1 on. A plan says where each sample stands. It depends on the samples' lengths and their order alone, so every rank makes the same.
Shape legend: N rows of a rank, B rows of a microbatch, S tokens of a row, R sampled tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_prism.prepare.packing import pack
from megatron_prism.rl.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What microbatches must look like.

    seq_length: the most tokens of a row. micro_size: the rows of a microbatch. is_packed: several samples share a row as masked documents, which
    context parallelism refuses. token_multiple: rows are padded to a multiple (tp under sequence parallelism, times 2 * cp).
    microbatch_multiple: a rank's microbatches are (pp, under interleaved stages).
    """

    seq_length: int
    micro_size: int = 1
    is_packed: bool = True
    token_multiple: int = 1
    microbatch_multiple: int = 1

    @property
    def row_tokens(self) -> int:
        """Return S."""
        return -(-self.seq_length // self.token_multiple) * self.token_multiple


@dataclass(frozen=True)
class Place:
    """Where a sample stands: its number, its row (of its rank), its first token and its first trained label in it, and its sampled tokens."""

    sample: int
    row: int
    first: int
    first_label: int
    num_labels: int

    @property
    def labels(self) -> slice:
        """Return the row's part whose labels are the sampled tokens."""
        return slice(self.first_label, self.first_label + self.num_labels)

    @property
    def tokens(self) -> slice:
        """Return the sample's part of the row."""
        return slice(self.first, self.first_label + self.num_labels)


@dataclass(frozen=True)
class Plan:
    """Where all samples stand, by data-parallel rank, and the number of rows of each rank."""

    shape: Shape
    num_rows: int
    places: tuple[tuple[Place, ...], ...]


def plan(samples: Sequence[Sample], shape: Shape, dp: int) -> Plan:
    """Place samples in rows, best-fit decreasing where packed, and deal the rows to dp ranks in turn.

    Each rank has the same number of microbatches, at least microbatch_multiple. Rows without a sample are padding, which has no weight.
    Raises: ValueError for a sample that is longer than a row.
    """
    lengths = [len(sample.prompt_tokens) + len(sample.token_ids) - 1 for sample in samples]
    if lengths and max(lengths) > shape.seq_length:
        raise ValueError(f"a sample takes {max(lengths)} tokens, and a row has {shape.seq_length}")
    rows = _rows(lengths, shape)
    each = shape.micro_size * shape.microbatch_multiple
    num_rows = max(-(-len(rows) // (dp * each)), 1) * each
    places = tuple(
        tuple(place for row, members in enumerate(rows[rank::dp]) for place in _places(row, members, samples, lengths))
        for rank in range(dp)
    )
    return Plan(shape, num_rows, places)


def _rows(lengths: Sequence[int], shape: Shape) -> list[list[int]]:
    """Return the samples of each row."""
    if not shape.is_packed or not lengths:
        return [[sample] for sample in range(len(lengths))]
    packed = pack(np.array(lengths), shape.seq_length)
    return [part.tolist() for part in np.split(packed.document, packed.bin_starts[1:-1])]


def _places(row: int, members: Sequence[int], samples: Sequence[Sample], lengths: Sequence[int]) -> list[Place]:
    places, first = [], 0
    for member in members:
        sample = samples[member]
        places.append(Place(member, row, first, first + len(sample.prompt_tokens) - 1, len(sample.token_ids)))
        first += lengths[member]
    return places


def microbatches(
    plan: Plan, dp_rank: int, samples: Sequence[Sample], advantages: Sequence[float], log_probs: Mapping[str, Sequence[torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """Return a rank's microbatches: the model's inputs, and what losses.objective reads of each token. Shapes: (B, S).

    advantages: one a sample. log_probs: further values of sampled tokens by name (old_log_probs, ref_log_probs), each (R,) by sample. Padding
    is token 0, masked, and where samples are packed a document of its own.
    """
    shape = (plan.num_rows, plan.shape.row_tokens)
    integers = {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels", "position_ids", "sequence_ids")}
    floats = {name: torch.zeros(shape) for name in ("loss_mask", "advantages", "sequence_shares")}
    document_ids = torch.zeros(shape, dtype=torch.int32)
    integers["position_ids"][:] = torch.arange(shape[1])
    for place in plan.places[dp_rank]:
        sample, row, tokens, labels = samples[place.sample], place.row, place.tokens, place.labels
        ids = torch.from_numpy(np.concatenate([sample.prompt_tokens, sample.token_ids]))
        integers["tokens"][row, tokens], integers["labels"][row, tokens] = ids[:-1], ids[1:]
        integers["position_ids"][row, tokens] = torch.arange(len(ids) - 1)
        integers["sequence_ids"][row, tokens] = row % plan.shape.micro_size * shape[1] + place.first
        floats["loss_mask"][row, labels] = 1.0
        floats["advantages"][row, labels] = advantages[place.sample]
        floats["sequence_shares"][row, labels] = 1 / place.num_labels
        if plan.shape.is_packed:  # the padding's, unless another sample follows
            document_ids[row, tokens.stop :] += 1
            integers["position_ids"][row, tokens.stop :] = torch.arange(shape[1] - tokens.stop)
    mine = {place.sample: samples[place.sample].log_probs() for place in plan.places[dp_rank]}
    floats["sampler_log_probs"] = spread(plan, dp_rank, mine)
    floats |= {name: spread(plan, dp_rank, values) for name, values in log_probs.items()}
    whole = integers | floats | ({"document_ids": document_ids} if plan.shape.is_packed else {})
    size = plan.shape.micro_size
    return [{name: tensor[at : at + size] for name, tensor in whole.items()} for at in range(0, plan.num_rows, size)]


def spread(plan: Plan, dp_rank: int, values: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return values of tokens, (R,) by sample, at the tokens of a rank's rows that predict them (N, S), fp32; 0 elsewhere."""
    values_NS = torch.zeros((plan.num_rows, plan.shape.row_tokens))
    for place in plan.places[dp_rank]:
        values_NS[place.row, place.labels] = values[place.sample].float()
    return values_NS


def by_sample(plan: Plan, dp_rank: int, values: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the values (R,) of each of a rank's samples by its number, on the host, of a rank's microbatches (B, S): the inverse of spread."""
    values_NS = torch.cat([*values]).cpu()
    return {place.sample: values_NS[place.row, place.labels].clone() for place in plan.places[dp_rank]}
