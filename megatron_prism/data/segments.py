"""The mixtures that a run reads in turn: the first, and those that `data.changes` switches to at given steps.

All segments follow from the config alone, so a resumed run finds its place by arithmetic. A source continues where it was, in
the next mixture or in a later one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_prism.core.check.data import check_weights
from megatron_prism.core.config import DataConfig, ValidationConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.data import mixture
from megatron_prism.data.mixture import Prepared, SourcePlan
from megatron_prism.data.walk import Stream, Walk


class Segment(NamedTuple):
    """A prepared mixture and the walk through it, from the walk's first_sequence on."""

    prepared: Prepared
    walk: Walk


def read(data: DataConfig, global_size: int, seed: int) -> tuple[Segment, ...]:
    """Return a run's segments.

    Raises: InputError naming weights of sources that the mixture lacks, and a source whose data changed under the same name.
    """
    prepared = mixture.read_prepared(data.prepared)
    weights = _weights(data.weights, prepared, "data.weights")
    raise_problems(_other_length(prepared, data.seq_length))
    segments = [Segment(prepared, mixture.walk(prepared, weights, data.seq_length, seed))]
    for index, change in enumerate(data.changes):
        key = f"data.changes.{index}"
        prepared = mixture.read_prepared(change.prepared) if change.prepared else segments[-1].prepared
        weights = _weights(change.weights, prepared, f"{key}.weights")
        tokens = {source.name: source.stream_tokens for source in prepared.sources}
        raise_problems([*_other_length(prepared, data.seq_length), *_other_data(prepared, segments, f"{key}.prepared ({prepared.root})")])
        walk = segments[-1].walk.changed(change.step * global_size, weights, tokens)
        segments.append(Segment(prepared, walk))
    return tuple(segments)


def _weights(chosen: Mapping[str, float] | None, prepared: Prepared, key: str) -> dict[str, float]:
    own = {source.name: source.weight for source in prepared.sources}
    if chosen is None:
        return own
    unknown = [
        Problem(f"{key}.{name}", "no such source", f"a source of {prepared.root}: {', '.join(own)}") for name in chosen if name not in own
    ]
    raise_problems([*unknown, *check_weights(chosen, key)])
    return {name: chosen[name] for name in own if name in chosen}


def _other_length(prepared: Prepared, seq_length: int) -> list[Problem]:
    return [
        Problem(
            f"data.seq_length ({prepared.root}: source {source.name})",
            str(seq_length),
            f"{source.packing.seq_length}, which it is packed into",
        )
        for source in prepared.sources
        if source.packing and source.packing.seq_length != seq_length
    ]


def _other_data(prepared: Prepared, segments: Sequence[Segment], where: str) -> list[Problem]:
    """Return a problem for each source whose documents differ from the earlier ones of that name: its position would mean nothing."""
    known = {source.name: source for segment in segments for source in segment.prepared.sources}
    problems = []
    for source in prepared.sources:
        before = known.get(source.name, source)
        found, required = f"{source.stream_tokens} tokens", f"{before.stream_tokens} tokens"
        if found == required:
            found, required = "other documents", "the same ones (by the sha256 of the shards)"
        if source.stream_tokens != before.stream_tokens or source.sha256 != before.sha256:
            fix = "give other data another name"
            problems.append(Problem(where, f"source {source.name} of {found}", f"{required}, as the run has read it so far", fix))
    return problems


def describe(segments: Sequence[Segment], global_size: int) -> list[dict[str, Any]]:
    """Return what a run's manifest says of its mixtures: from which step on, where each was, the sha256 of its content, its weights.

    taken: the sequences of each source that were read before.
    """
    return [
        {
            "step": walk.first_sequence // global_size,
            "prepared": str(prepared.root),
            "sha256": prepared.sha256,
            "weights": {stream.name: stream.weight for stream in walk.streams},
            "taken": {stream.name: stream.taken for stream in walk.streams},
        }
        for prepared, walk in segments
    ]


def realised(segments: Sequence[Segment], num_sequences: int) -> tuple[SourcePlan, ...]:
    """Return what a run of `num_sequences` reads of each source: tokens, share, epochs, and the source's last weight."""
    counts: Counter[str] = Counter()
    streams: dict[str, Stream] = {}
    ends = [*(segment.walk.first_sequence for segment in segments[1:]), num_sequences]
    for (_, walk), end in zip(segments, ends, strict=True):
        if walk.first_sequence < num_sequences:
            counts.update(dict(zip((stream.name for stream in walk.streams), walk.counts(min(end, num_sequences)), strict=True)))
            streams |= {stream.name: stream for stream in walk.streams}
    length = segments[0].walk.seq_length
    return tuple(
        SourcePlan(name, stream.weight, counts[name] * length, counts[name] / num_sequences, counts[name] * length / stream.num_tokens)
        for name, stream in streams.items()
    )


def check_epochs(parts: Sequence[SourcePlan], max_epochs: float | None, key: str) -> list[Problem]:
    """Return a problem for each source that a run reads for more epochs than allowed."""
    fix = "give it less weight, find more of it, or allow more"
    return [
        Problem(key, f"source {part.name} read {part.epochs:.2f} times", f"at most {max_epochs}", fix)
        for part in parts
        if max_epochs is not None and part.epochs is not None and part.epochs > max_epochs
    ]


def repeated(parts: Sequence[SourcePlan], segments: Sequence[Segment]) -> list[str]:
    """Return a sentence for each source that a run repeats although prepare left a part of it unread."""
    sources = {source.name: source for segment in segments for source in segment.prepared.sources}
    sentences = []
    for part in parts:
        source = sources[part.name]
        if part.epochs is not None and part.epochs > 1 and (source.unread_share or source.is_last_cut):
            unread = (
                f"{100 * source.unread_share:.0f} % of its bytes are unread"
                if source.unread_share
                else "the last of its files is read in part"
            )
            sentences.append(f"source {part.name} is read {part.epochs:.2f} times while {unread}: prepare more tokens")
    return sentences


def unvalidated(config: ValidationConfig, segments: Sequence[Segment]) -> list[str]:
    """Return a sentence where validations are asked for and the first mixture, which they are of, holds nothing out."""
    prepared = segments[0].prepared
    if not config.interval or any(source.valid is not None for source in prepared.sources):
        return []
    return [f"validation.interval is {config.interval}, and {prepared.root} holds nothing out: prepare it with valid_percent or valid_path"]


def at(segments: Sequence[Segment], sequence: int) -> int:
    """Return the index of the segment that a sequence of the run belongs to."""
    return sum(segment.walk.first_sequence <= sequence for segment in segments) - 1
