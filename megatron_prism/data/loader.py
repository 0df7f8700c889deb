"""From a prepared mixture to the batches of any step, by position.

The sequences of a step depend on the step alone: sequence k of the walk belongs to step k // global_size, whatever the number of ranks.
So a run resumes at any step and on any number of ranks.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_prism.core.config import BatchConfig
from megatron_prism.core.defect import judged_here
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data import mixture, segments
from megatron_prism.data.indexed import Reader, bin_path
from megatron_prism.data.mixture import Prepared, PreparedSource, Tokens
from megatron_prism.data.packed import PackedReader
from megatron_prism.data.segments import Segment
from megatron_prism.data.walk import Place, permute
from megatron_prism.parallel import signals


@dataclass(frozen=True)
class Position:
    """This rank's place among the data-parallel ranks."""

    dp_rank: int
    dp: int


class Located(NamedTuple):
    """Where a sequence of a run lies: its mixture, its source, the source's reader, and the place in it."""

    prepared: Prepared
    source: PreparedSource
    reader: Reader | PackedReader
    place: Place


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A run's sequences: concatenated documents, cut where the walk says; for a packed source, its packed sequences.

    The paper describes no document masking at 8k, so the default is none.
    Raises: InputError at reading a sequence with an id that is none of the mixture's tokenizer.
    """

    def __init__(self, run: Sequence[Segment], document_mask: bool = False):
        self.segments, self.document_mask = run, document_mask
        self.seq_length = run[0].walk.seq_length
        self._readers: dict[tuple[Path, ...], Reader | PackedReader] = {}
        for prepared, walk in run:
            for source in (prepared.source(stream.name) for stream in walk.streams):
                if source.train.prefixes not in self._readers:
                    self._readers[source.train.prefixes] = source.reader(prepared.eos_id)

    def reader(self, source: PreparedSource) -> Reader | PackedReader:
        """Return the reader of a source of the run."""
        return self._readers[source.train.prefixes]

    def locate(self, sequence: int) -> Located:
        """Return where a sequence of the run lies."""
        prepared, walk = self.segments[segments.at(self.segments, sequence)]
        place = walk.place(sequence)
        source = prepared.source(walk.streams[place.source].name)
        return Located(prepared, source, self.reader(source), place)

    def __getitem__(self, sequence: int) -> dict[str, torch.Tensor]:
        prepared, source, reader, place = self.locate(sequence)
        if isinstance(reader, PackedReader):
            number = place.offset // self.seq_length
            sample = _packed_sample(reader, number, self.document_mask)
            _require_known(sample, prepared, source.train, reader.reader, lambda position: reader.document(number, position))
        else:
            sample = _sample(reader, place.offset, self.seq_length, self.document_mask)
            first, end = place.offset, reader.num_tokens
            _require_known(sample, prepared, source.train, reader, lambda position: reader.document((first + position) % end)[0])
        return sample | {"place": torch.tensor([sequence, *place])}

    def describe(self, place: Sequence[int]) -> dict[str, int | str]:
        """Describe which sequence was read and from where, given the `place` of a sample."""
        sequence, source, epoch, offset = place
        walk = self.segments[segments.at(self.segments, sequence)][1]
        return {"sequence": sequence, "source": walk.streams[source].name, "epoch": epoch, "token": offset}


class HeldOut(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One pass over a source's held-out documents in a permuted order. An incomplete last sequence is left out.

    Sequence None is a sequence with every token masked. Held-out documents are concatenated, a packed source's too; there the loss counts
    what training counts, no label that begins another document.
    """

    def __init__(self, prepared: Prepared, source: PreparedSource, seq_length: int, seed: int, document_mask: bool = False):
        assert source.valid is not None
        self.prepared, self.tokens, self.document_mask, self.is_packed = prepared, source.valid, document_mask, source.packing is not None
        self.reader, self.seq_length, self.key = Reader(source.valid.prefixes), seq_length, f"{seed}/valid".encode()

    def __len__(self) -> int:
        return (self.reader.num_tokens - 1) // self.seq_length

    def __getitem__(self, sequence: int | None) -> dict[str, torch.Tensor]:
        offset = permute(sequence or 0, len(self), self.key) * self.seq_length
        tensors = _sample(self.reader, offset, self.seq_length, self.document_mask, self.is_packed)
        _require_known(tensors, self.prepared, self.tokens, self.reader, lambda position: self.reader.document(offset + position)[0])
        return tensors if sequence is not None else tensors | {"loss_mask": torch.zeros(self.seq_length)}


class _InWorker(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A dataset in the DataLoader's workers. torch raises an error again from its type and message alone: whose it is, is judged there."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, sequence: int) -> dict[str, torch.Tensor]:
        with judged_here():
            return self.dataset[sequence]


@dataclass(frozen=True)
class _Order:
    """The sequences of each of a rank's microbatches, made as they are asked for: a long run's would take seconds, and a large part of a gigabyte."""

    first_step: int
    steps: int
    batch: BatchConfig
    position: Position

    @property
    def per_rank(self) -> int:
        """Return the sequences of a step on this rank."""
        return self.batch.global_size // self.position.dp

    @property
    def num_microbatches(self) -> int:
        """Return the microbatches of a step on this rank."""
        return self.per_rank // self.batch.micro_size

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.num_microbatches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            first = step * self.batch.global_size + self.position.dp_rank * self.per_rank
            for start in range(first, first + self.per_rank, self.batch.micro_size):
                yield list(range(start, start + self.batch.micro_size))


class _Arrays(dict[str, np.ndarray]):
    """A microbatch on its way from a worker, as bytes in a pipe.

    torch would hand its tensors over as files in /dev/shm, through a socket in TMPDIR. A worker that cannot (a path too long for a socket, a
    folder that is full) writes a traceback and goes on, and the run would wait for its batch until the watchdog ends it.
    """

    @classmethod
    def collate(cls, samples: list[dict[str, torch.Tensor]]) -> _Arrays:
        """Return the samples as a microbatch."""
        return cls((name, tensor.numpy()) for name, tensor in torch.utils.data.default_collate(samples).items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the microbatch as it was collated."""
        return {name: torch.from_numpy(array) for name, array in self.items()}

    def pin_memory(self) -> dict[str, torch.Tensor]:
        """Return the microbatch in page-locked memory. The DataLoader calls this in a thread of its own."""
        return {name: tensor.pin_memory() for name, tensor in self.tensors().items()}


def _sample(reader: Reader, offset: int, seq_length: int, document_mask: bool, within_documents: bool = False) -> dict[str, torch.Tensor]:
    """Return a sequence for Megatron's forward step: S tokens, and the following token of each as its label.

    within_documents: a document's last token has no loss. With document_mask it has none either, positions restart in each document, and the
    sequence names the document of each token.
    """
    tokens = torch.from_numpy(reader.tokens(offset, seq_length + 1).astype("int64"))
    sample = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(seq_length), "position_ids": torch.arange(seq_length)}
    if document_mask or within_documents:
        ids = torch.from_numpy(reader.document_ids(offset, seq_length + 1))
        sample |= {"loss_mask": (ids[:-1] == ids[1:]).float()} | (_by_document(ids[:-1]) if document_mask else {})
    return sample


def _packed_sample(reader: PackedReader, number: int, document_mask: bool) -> dict[str, torch.Tensor]:
    """Return a packed sequence. Padding and the last token of a piece have no loss."""
    tokens, ids, loss_mask = map(torch.from_numpy, reader.sequence(number))
    sample = {"tokens": tokens, "labels": tokens.roll(-1), "loss_mask": loss_mask}
    return sample | (_by_document(ids) if document_mask else {"position_ids": torch.arange(len(tokens))})


def _require_known(
    sample: dict[str, torch.Tensor], prepared: Prepared, files: Tokens, reader: Reader, document: Callable[[int], int]
) -> None:
    """Require every id of a sequence to be one of its mixture's tokenizer. document: the source's document at a position of the sequence.

    The model would not say it: with tp above 1 such a token has an embedding of zeros and a logit of 0, and training goes on.
    Raises: InputError naming the file, the document and the id.
    """
    tokens = torch.cat([sample["tokens"], sample["labels"][-1:]])
    low, high = (int(end) for end in torch.aminmax(tokens))
    if low >= 0 and high < prepared.vocab_size:
        return
    position = int(((tokens < 0) | (tokens >= prepared.vocab_size)).nonzero()[0])
    pair, number = reader.pair(document(position))
    path = bin_path(files.prefixes[pair])
    fix = (
        f"compare sha256sum {path} with its sum in {prepared.root / mixture.FILE}: where they differ the file was damaged; {mixture.AGAIN}"
    )
    required = f"an id from 0 to {prepared.vocab_size - 1}, of the mixture's tokenizer"
    raise InputError(Problem(f"{path}: document {number}", f"the id {int(tokens[position])}", required, fix))


def _by_document(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the document of each token, and the token's position within it."""
    first = torch.searchsorted(ids, ids)  # the position of the document's first token
    return {"position_ids": torch.arange(len(ids)) - first, "document_ids": ids}


def held_out(prepared: Prepared, seq_length: int, seed: int, document_mask: bool = False) -> dict[str, HeldOut]:
    """Return the held-out sequences by source. `check_held_out` has found no problem."""
    return {
        source.name: HeldOut(prepared, source, seq_length, seed, document_mask) for source in prepared.sources if source.valid is not None
    }


def check_held_out(prepared: Prepared, seq_length: int) -> list[Problem]:
    """Return a problem for each source whose held-out part is shorter than one sequence."""
    return [
        Problem(
            f"{prepared.root}: source {source.name}",
            f"{source.valid.num_tokens} held-out tokens",
            f"more than data.seq_length {seq_length}",
            "prepare the mixture with a larger valid_percent or valid_path, or with neither",
        )
        for source in prepared.sources
        if source.valid is not None and source.valid.num_tokens <= seq_length
    ]


def batches(
    dataset: Any, first_step: int, steps: int, batch: BatchConfig, position: Position, num_workers: int, pin_memory: bool
) -> Generator[list[dict[str, torch.Tensor]]]:
    """Yield this rank's microbatches of each step from `first_step` (counted from 0) up to `steps`.

    Close the generator when a run ends early: its workers ignore SIGTERM, so Python would wait for them for ever at exit.
    """
    from torch.utils.data import DataLoader

    order = _Order(first_step, steps, batch, position)
    loader = iter(
        DataLoader(
            _InWorker(dataset) if num_workers else dataset,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=_Arrays.collate if num_workers else None,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # the loader must not advance the run's generator
        )
    )
    try:
        for _ in range(first_step, steps):
            microbatches = [next(loader) for _ in range(order.num_microbatches)]
            yield [microbatch.tensors() if isinstance(microbatch, _Arrays) else microbatch for microbatch in microbatches]
    except InputError as error:  # of a worker: torch has put the worker's traceback before what the user is to read
        raise InputError(str(error).rpartition(f"{InputError.__module__}.{InputError.__qualname__}: ")[2].rstrip()) from error
    finally:
        if num_workers:
            loader._shutdown_workers()  # type: ignore[attr-defined]  # an error's traceback keeps the iterator, so it is not deleted


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore requests to stop in a worker. Slurm signals every process of a job; the trainer still needs batches to finish its step."""
    for name in signals.STOPPING:
        signal.signal(name, signal.SIG_IGN)


def valid_batches(dataset: Any, sequences: int, micro_size: int, position: Position, multiple: int = 1) -> list[dict[str, torch.Tensor]]:
    """Return this rank's microbatches of a validation set's first `sequences`. Surplus rows of the last ones are masked.

    The sequences read do not depend on the number of ranks. The number of microbatches is a multiple of `multiple`.
    """
    from torch.utils.data import default_collate

    wanted: list[int | None] = list(range(min(sequences, len(dataset))))
    wanted += [None] * (-len(wanted) % (micro_size * position.dp * multiple))  # None: a fully masked sequence
    mine = wanted[position.dp_rank :: position.dp]
    return [default_collate([dataset[index] for index in mine[i : i + micro_size]]) for i in range(0, len(mine), micro_size)]
