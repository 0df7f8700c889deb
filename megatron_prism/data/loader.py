"""From a prepared mixture to the batches of any step: Megatron's blended dataset, read by position.

Which sequences a step holds depends on the step alone: sequence k of the blend belongs to step k // global_size,
whatever the number of ranks, so a run resumes anywhere and on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prism.core.config import BatchConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data.mixture import Prepared, SourcePlan


@dataclass(frozen=True)
class Position:
    """This rank's place among the data-parallel ranks."""

    dp_rank: int
    dp: int


def train_dataset(prepared: Prepared, weights: Mapping[str, float], seq_length: int, num_sequences: int, seed: int, cache: Path) -> Any:
    """Return Megatron's blended dataset of exactly `num_sequences` sequences; all ranks call it together."""
    prefixes = [str(source.train_prefix) for source in prepared.sources]
    return _build(prepared, (prefixes, [weights[source.name] for source in prepared.sources]), 0, num_sequences, seq_length, seed, cache)


def valid_datasets(prepared: Prepared, seq_length: int, seed: int, cache: Path) -> dict[str, Any]:
    """Return one pass over each source's held-out documents, by source; all ranks call it together.

    Raises: InputError naming a source whose held-out part is shorter than one sequence.
    """
    found = {}
    for source in prepared.sources:
        if source.valid_prefix is None:
            continue
        if source.valid_tokens <= seq_length:
            where = f"{prepared.root}: source {source.name}"
            raise InputError(Problem(where, f"{source.valid_tokens} held-out tokens", f"more than data.seq_length {seq_length}", "hold out more"))
        found[source.name] = _build(prepared, ([str(source.valid_prefix)], None), 1, None, seq_length, seed, cache)
    return found


def _build(prepared: Prepared, blend: Any, split: int, size: int | None, seq_length: int, seed: int, cache: Path) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    blends: list[Any] = [None, None, None]
    sizes: list[int | None] = [0, 0, 0]
    blends[split], sizes[split] = blend, size
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=blends,
        path_to_cache=str(cache),
        tokenizer=_Vocabulary(prepared.vocab_size, prepared.eos_id),
        reset_position_ids=False,  # the paper does not describe document masking at 8k: plain concatenation is our default
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[split]


class _Vocabulary:
    """All that GPTDataset asks of a tokenizer once the text is tokenized.

    pad is an id no text holds: were it the end-of-text id, as in many tokenizers, Megatron would mask every document's end.
    """

    pad = -1

    def __init__(self, vocab_size: int, eos_id: int | None):
        self.vocab_size = vocab_size
        self.eod = -1 if eos_id is None else eos_id
        self.unique_identifiers = {"vocab_size": vocab_size, "eod": self.eod}


def batches(
    dataset: Any, first_step: int, steps: int, batch: BatchConfig, position: Position, num_workers: int, pin_memory: bool
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield this rank's microbatches of each step from `first_step` (0 is the first) up to `steps`."""
    from torch.utils.data import DataLoader

    per_rank = batch.global_size // position.dp
    firsts = (step * batch.global_size + position.dp_rank * per_rank for step in range(first_step, steps))
    order = [list(range(start, start + batch.micro_size)) for first in firsts for start in range(first, first + per_rank, batch.micro_size)]
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # its own: the loader must not move the run's generator
        )
    )
    for _ in range(first_step, steps):
        yield [next(loader) for _ in range(per_rank // batch.micro_size)]


def valid_batches(dataset: Any, sequences: int, micro_size: int, position: Position, multiple: int = 1) -> list[dict[str, torch.Tensor]]:
    """Return this rank's microbatches of a validation set's first `sequences`; the rest of the last ones is masked out.

    The same sequences are read whatever the number of ranks; `multiple` is what the number of microbatches must divide by.
    """
    from torch.utils.data import default_collate

    wanted: list[int | None] = list(range(min(sequences, len(dataset))))
    wanted += [None] * (-len(wanted) % (micro_size * position.dp * multiple))  # None is Megatron's fully masked sequence
    mine = wanted[position.dp_rank :: position.dp]
    return [default_collate([dataset[index] for index in mine[i : i + micro_size]]) for i in range(0, len(mine), micro_size)]


def realised(
    dataset: Any, prepared: Prepared, weights: Mapping[str, float], seq_length: int, num_sequences: int
) -> tuple[SourcePlan, ...]:
    """Return what a run's `num_sequences` really hold of each source: tokens, share and epochs, counted in the blend's index."""
    import numpy as np

    if len(prepared.sources) == 1:
        counts: Sequence[int] = [num_sequences]
    else:  # Megatron rounds each source up, so its index may be a few sequences longer than the run
        counts = np.bincount(np.asarray(dataset.dataset_index[:num_sequences]), minlength=len(prepared.sources)).tolist()
    total = sum(counts)
    return tuple(
        SourcePlan(source.name, weights[source.name], count * seq_length, count / total, count * seq_length / source.train_tokens)
        for source, count in zip(prepared.sources, counts, strict=True)
    )
