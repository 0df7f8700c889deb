"""`prism locate CONFIG`: the documents that a step of a run reads, or the step that reads a document."""

from __future__ import annotations

from typing import Any

from megatron_prism.checkpoint import start
from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.train import check_train
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.data import indexed, loader, locate, segments, tokenizer
from megatron_prism.data.locate import Sample

SHOWN_TOKENS = 64  # of each document, as text


def contents(config: TrainConfig, world_size: int, sample: Sample) -> dict[str, Any]:
    """Return the documents of a sequence, each with its location on disk and its first tokens there as text.

    Raises: InputError where the run has no such step, rank or sample.
    """
    run, dp = _open(config, world_size)
    per_rank = config.batch.global_size // dp
    ranges = (("--step", sample.step, 1, config.steps), ("--rank", sample.dp_rank, 0, dp - 1), ("--sample", sample.sample, 0, per_rank - 1))
    raise_problems([Problem(key, str(value), f"{low} to {high}") for key, value, low, high in ranges if not low <= value <= high])
    sequence = locate.sequence_of(sample, config.batch, dp)
    source, spans = locate.contents(run, sequence)
    segment = segments.at(run.segments, sequence)
    prepared = run.segments[segment].prepared.source(source)
    reader, spec = indexed.Reader(prepared.train.prefixes), tokenizer.load(start.resolve(config).assets, need_eos=False)
    documents = []
    for span in spans:
        pair, within = reader.pair(span.document)
        offset = reader.start(span.document) + span.token
        text = tokenizer.decode(reader.tokens(offset, min(span.num_tokens, SHOWN_TOKENS)), spec)
        documents.append({**span._asdict(), "pair": str(prepared.train.prefixes[pair]), "document_in_pair": within, "text": text})
    return {**sample._asdict(), "dp": dp, "sequence": sequence, "source": source, "documents": documents}


def reader_of(config: TrainConfig, world_size: int, source: str, epoch: int, document: int, token: int) -> dict[str, Any]:
    """Return the step, rank and sample that read a token of a document.

    Raises: InputError where the run has no such source, document or token.
    """
    run, dp = _open(config, world_size)
    known = {stream.name: prepared.source(stream.name) for prepared, walk in run.segments for stream in walk.streams}
    if source not in known:
        raise InputError(Problem("--source", source, f"a source of the run: {', '.join(known)}"))
    reader = indexed.Reader(known[source].train.prefixes)
    if not 0 <= document < reader.num_documents:
        raise InputError(Problem("--document", str(document), f"0 to {reader.num_documents - 1}"))
    length = reader.start(document + 1) - reader.start(document)
    if not 0 <= token < length:
        raise InputError(Problem("--token", str(token), f"0 to {length - 1}"))
    place = locate.find(run, source, epoch, document, token)
    asked = {"source": source, "epoch": epoch, "document": document, "token": token}
    if place is None or place[0] >= config.steps * config.batch.global_size:
        return {**asked, "is_read": False}
    sequence, position = place
    return {
        **asked,
        "is_read": True,
        **locate.sample_of(sequence, config.batch, dp)._asdict(),
        "dp": dp,
        "sequence": sequence,
        "position": position,
    }


def _open(config: TrainConfig, world_size: int) -> tuple[loader.Sequences, int]:
    raise_problems(check_train(config, world_size))
    return loader.Sequences(segments.read(config.data, config.batch.global_size, config.seed)), data_parallel_size(config, world_size)
