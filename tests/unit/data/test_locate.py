"""Any token of a run can be named and found again: (step, rank, sample) <-> (source, epoch, document, token)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_prism.core.config import BatchConfig
from megatron_prism.data import indexed, loader, locate, mixture, packed
from megatron_prism.data.locate import Sample
from megatron_prism.data.segments import Segment
from megatron_prism.prepare import packing

BATCH, SEQ_LENGTH, NUM_SEQUENCES, CHANGE = BatchConfig(global_size=6), 8, 90, 30
LENGTHS = {"a": [5, 40, 1, 17, 8], "b": [30, 3]}  # a's pairs hold 2 and 3 documents


@pytest.fixture
def run(tmp_path: Path) -> loader.Sequences:
    """Two sources whose every token is document * 100 + place, b's 1000 above; b's share grows at a sequence."""
    sources = []
    for name, lengths in LENGTHS.items():
        prefixes = []
        for first, part in ((0, lengths[:2]), (2, lengths[2:])):
            if part:
                prefixes.append(tmp_path / f"{name}{first}")
                with indexed.Writer(prefixes[-1], np.dtype(np.uint16)) as writer:
                    tokens = [1000 * (name == "b") + 100 * (first + number) + np.arange(length) for number, length in enumerate(part)]
                    writer.add(np.concatenate(tokens), np.array(part))
        sources.append(mixture.PreparedSource(name, 50.0, mixture.Tokens(tuple(prefixes), sum(lengths), len(lengths)), None, sha256=name))
    prepared = mixture.Prepared(tmp_path, "", 4000, None, tuple(sources), sha256="")
    walk = mixture.walk(prepared, {"a": 75.0, "b": 25.0}, SEQ_LENGTH, seed=3)
    num_tokens = {source.name: source.train.num_tokens for source in sources}
    return loader.Sequences([Segment(prepared, walk), Segment(prepared, walk.changed(CHANGE, {"b": 60.0, "a": 40.0}, num_tokens))])


def test_contents_name_every_token_that_is_read(run: loader.Sequences) -> None:
    for sequence in range(NUM_SEQUENCES):
        found = locate.contents(run, sequence)
        named = [
            1000 * (found.source == "b") + 100 * span.document + span.token + index
            for span in found.spans
            for index in range(span.num_tokens)
        ]
        assert run[sequence]["tokens"].tolist() == named


def test_every_token_of_every_pass_is_found_where_it_is_read(run: loader.Sequences) -> None:
    seen = {}
    for sequence in range(NUM_SEQUENCES):
        source, spans = locate.contents(run, sequence)
        named = [(source, span.epoch, span.document, span.token + index) for span in spans for index in range(span.num_tokens)]
        seen |= {key: (sequence, position) for position, key in enumerate(named)}
    assert len(seen) == NUM_SEQUENCES * SEQ_LENGTH  # each pass reads each token once
    assert {key: locate.find(run, *key) for key in seen} == seen
    last = {source: max(key[1] for key in seen if key[0] == source) for source in LENGTHS}
    later = [locate.find(run, name, last[name] + 2, document, 0) for name in LENGTHS for document in range(len(LENGTHS[name]))]
    assert all(place and place[0] >= NUM_SEQUENCES for place in later)
    assert locate.find(run, "c", 0, 0, 0) is None


@pytest.mark.parametrize("dp", [1, 2, 3, 6])
def test_sample_and_sequence_name_each_other(run: loader.Sequences, dp: int) -> None:
    for sequence in range(NUM_SEQUENCES):
        assert locate.sequence_of(locate.sample_of(sequence, BATCH, dp), BATCH, dp) == sequence
    for rank in range(dp):
        steps = loader.batches(run, 2, 4, BATCH, loader.Position(rank, dp), 0, False)
        for step, microbatches in zip(itertools.count(3), steps, strict=False):
            for sample, batch in enumerate(microbatches):
                assert batch["tokens"][0].tolist() == run[locate.sequence_of(Sample(step, rank, sample), BATCH, dp)]["tokens"].tolist()


def test_packed_sequences_are_named_and_found_too(run: loader.Sequences, tmp_path: Path) -> None:
    """Source a packed into sequences of 8, documents of 40 and 17 cut into chunks that overlap by 3: a token that two hold is the first's."""
    segment, before = run.segments[0], {}
    source = segment.prepared.sources[0]
    made = packing.pack(np.array(LENGTHS["a"]), SEQ_LENGTH, overlap=3)
    packed.save(made, packed.prefix(tmp_path))
    held = mixture.Packing(SEQ_LENGTH, made.num_bins, made.efficiency)
    prepared = replace(segment.prepared, sources=(replace(source, packing=held, packing_prefix=packed.prefix(tmp_path)),))
    of_a = loader.Sequences([Segment(prepared, mixture.walk(prepared, {"a": 100.0}, SEQ_LENGTH, seed=3))])
    for sequence in range(made.num_bins):  # one pass
        spans = locate.contents(of_a, sequence).spans
        named = [(span.document, span.token + index) for span in spans for index in range(span.num_tokens)]
        sample = of_a[sequence]
        assert sample["tokens"].tolist() == [100 * document + token for document, token in named] + [0] * (SEQ_LENGTH - len(named))
        assert sample["loss_mask"].sum() == len(named) - len(spans)
        inside = sample["loss_mask"].bool()
        assert (sample["labels"][inside] == sample["tokens"][inside] + 1).all()  # the next token of the same document
        for position, (document, token) in enumerate(named):
            before.setdefault((document, token), set()).add((sequence, position))
    assert sorted(before) == [(document, token) for document, length in enumerate(LENGTHS["a"]) for token in range(length)]
    assert max(map(len, before.values())) == 2
    for key, places in before.items():  # of two chunks that hold a token, the one that begins first
        pieces = {
            place: next(
                span
                for span in locate.contents(of_a, place[0]).spans
                if span.document == key[0] and 0 <= key[1] - span.token < span.num_tokens
            )
            for place in places
        }
        assert locate.find(of_a, "a", 0, *key) == min(places, key=lambda place: pieces[place].token)
    assert locate.contents(of_a, made.num_bins).spans[0].epoch == 1
