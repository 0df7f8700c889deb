"""Batches by position: the tokens that the walk names, the same on any number of ranks, from any step on."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import tracemalloc
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prism.core.config import BatchConfig, DataConfig, MixtureChange
from megatron_prism.core.defect import is_defect
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data import indexed, loader, mixture, packed, segments
from megatron_prism.data.segments import Segment
from megatron_prism.prepare import packing

LENGTHS = {"a": [5, 40, 1, 17], "b": [30]}
SEQ_LENGTH, SEED, BATCH = 8, 3, BatchConfig(global_size=4, micro_size=1)


def write(prefix: Path, lengths: list[int], first: int) -> None:
    with indexed.Writer(prefix, np.dtype(np.uint16)) as writer:
        writer.add(first + np.arange(sum(lengths)), np.array(lengths))


@pytest.fixture
def prepared(tmp_path: Path) -> mixture.Prepared:
    """A mixture whose every token is its own place: a's from 0 on, b's from 1000, held-out ones 2000 above."""
    sources = []
    for first, (name, lengths) in zip((0, 1000), LENGTHS.items(), strict=True):
        pairs = []
        for index, part in enumerate(filter(None, (lengths[:2], lengths[2:]))):  # a has two pairs, b one
            pairs.append(tmp_path / f"{name}{index}.train")
            write(pairs[-1], part, first + index * sum(lengths[:2]))
        write(tmp_path / f"{name}.valid", [20, 7], first + 2000)
        train = mixture.Tokens(tuple(pairs), sum(lengths), len(lengths))
        sources.append(mixture.PreparedSource(name, 50.0, train, mixture.Tokens((tmp_path / f"{name}.valid",), 27, 2), sha256=name))
    return mixture.Prepared(tmp_path, "", 4000, None, tuple(sources), sha256="")


@pytest.fixture
def sequences(prepared: mixture.Prepared) -> loader.Sequences:
    return loader.Sequences([Segment(prepared, mixture.walk(prepared, {"a": 75.0, "b": 25.0}, SEQ_LENGTH, SEED))])


def test_a_sequence_is_the_tokens_that_its_place_names(sequences: loader.Sequences) -> None:
    for number in range(60):
        place, sample = sequences.segments[0].walk.place(number), sequences[number]
        count, first = sum(list(LENGTHS.values())[place.source]), 1000 * place.source
        wanted = [first + (place.offset + index) % count for index in range(SEQ_LENGTH + 1)]
        assert sample["tokens"].tolist() == wanted[:-1] and sample["labels"].tolist() == wanted[1:]
        assert sample["loss_mask"].tolist() == [1] * SEQ_LENGTH and sample["position_ids"].tolist() == list(range(SEQ_LENGTH))


def documents(source: str) -> list[tuple[int, int]]:
    """Return (document, token within it) of each token of a source."""
    return [(document, token) for document, length in enumerate(LENGTHS[source]) for token in range(length)]


def test_masked_samples_know_their_documents(prepared: mixture.Prepared, sequences: loader.Sequences) -> None:
    """Also where a sequence wraps around an epoch's end, even onto the document that it left."""
    masked = loader.Sequences(sequences.segments, document_mask=True)
    wrapped = 0
    for number in range(60):
        place, sample = sequences.segments[0].walk.place(number), masked[number]
        own = documents("ab"[place.source])
        own = [(*own[index % len(own)], index // len(own)) for index in range(place.offset, place.offset + SEQ_LENGTH + 1)]
        met = list(dict.fromkeys((epoch, document) for document, _, epoch in own))
        began = {key: next(index for index, (document, _, epoch) in enumerate(own) if (epoch, document) == key) for key in met}
        keys = [(epoch, document) for document, _, epoch in own]
        assert sample["document_ids"].tolist() == [met.index(key) for key in keys[:-1]] and sample["document_ids"].dtype == torch.int32
        assert sample["position_ids"].tolist() == [index - began[key] for index, key in enumerate(keys[:-1])]
        assert sample["loss_mask"].tolist() == [float(a == b) for a, b in pairwise(keys)]
        assert all(torch.equal(sample[key], sequences[number][key]) for key in ("tokens", "labels"))
        wrapped += own[0][2] != own[-2][2]
    assert wrapped >= 2


def test_masked_held_out_samples_know_their_documents(prepared: mixture.Prepared) -> None:
    found = loader.held_out(prepared, SEQ_LENGTH, SEED, document_mask=True)["b"]
    by_start = {sample["tokens"][0].item(): sample for sample in map(found.__getitem__, range(len(found)))}
    assert by_start[3016]["document_ids"].tolist() == [0] * 4 + [1] * 4 and by_start[3016]["position_ids"].tolist() == [0, 1, 2, 3] * 2
    assert by_start[3016]["loss_mask"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert found[None]["loss_mask"].sum() == 0 and "document_ids" in found[None]
    (batch,) = loader.valid_batches(found, 3, 4, loader.Position(0, 1))
    assert batch["document_ids"].shape == (4, SEQ_LENGTH)


def test_held_out_documents_of_a_packed_source_count_the_labels_that_training_counts(prepared: mixture.Prepared) -> None:
    """The held-out documents of b are 20 and 7 tokens: the 20th has no label of its own document. Nothing else is masked."""
    packed_b = replace(prepared, sources=(replace(prepared.sources[1], packing=mixture.Packing(SEQ_LENGTH, 4, 1.0)),))
    plain, found = (loader.held_out(one, SEQ_LENGTH, SEED)["b"] for one in (prepared, packed_b))
    for number in range(len(found)):
        first = found[number]["tokens"][0].item()
        assert found[number]["loss_mask"].tolist() == [float(token != 3019) for token in range(first, first + SEQ_LENGTH)]
        assert list(found[number]) == list(plain[number]) and plain[number]["loss_mask"].all()
        assert all(torch.equal(found[number][key], plain[number][key]) for key in ("tokens", "labels", "position_ids"))
    assert found[None]["loss_mask"].sum() == 0


def test_a_document_is_found_wherever_one_begins_to_read(prepared: mixture.Prepared) -> None:
    reader, own = indexed.Reader(prepared.sources[0].train.prefixes), documents("a")
    for offset in range(reader.num_tokens):
        for count in (0, 1, 2, 9, 63, 64, 200):
            places = [((offset + index) // 63, own[(offset + index) % 63][0]) for index in range(count)]
            met = list(dict.fromkeys(places))
            assert reader.document_ids(offset, count).tolist() == [met.index(place) for place in places]


def rows(sequences: loader.Sequences, first_step: int, steps: int, dp: int) -> list[list[list[int]]]:
    """Return each step's sequences, in the order of ranks."""
    by_rank = [list(loader.batches(sequences, first_step, steps, BATCH, loader.Position(rank, dp), 0, False)) for rank in range(dp)]
    return [[row for part in parts for batch in part for row in batch["tokens"].tolist()] for parts in zip(*by_rank, strict=True)]


def test_steps_are_the_same_on_any_number_of_ranks_and_after_a_resume(sequences: loader.Sequences) -> None:
    whole = rows(sequences, 0, 9, dp=1)
    assert rows(sequences, 0, 9, dp=2) == rows(sequences, 0, 9, dp=4) == whole
    assert rows(sequences, 0, 3, 2) + rows(sequences, 3, 5, 1) + rows(sequences, 5, 9, 2) == whole
    assert rows(sequences, 1, 9, dp=1) != whole[:8]


def test_a_run_reads_what_its_blend_says(sequences: loader.Sequences) -> None:
    tokens = [token for step in rows(sequences, 0, 10, dp=2) for row in step for token in row]
    blend = segments.realised(sequences.segments, 40)
    assert [part.tokens for part in blend] == [sum(token < 1000 for token in tokens), sum(token >= 1000 for token in tokens)] == [240, 80]
    assert [(part.share, part.epochs) for part in blend] == [(0.75, 240 / 63), (0.25, 80 / 30)]


def damage(prefix: Path, at: int, found: int) -> None:
    tokens = np.memmap(indexed.bin_path(prefix), np.uint16, mode="r+")
    tokens[at] = found
    tokens.flush()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_id_outside_the_vocabulary_is_named_with_its_document(prepared: mixture.Prepared, num_workers: int) -> None:
    """With tp above 1 the model would train on it in silence. 3999 is the last id of the vocabulary."""
    run = loader.Sequences([Segment(prepared, mixture.walk(prepared, {"a": 100.0}, SEQ_LENGTH, SEED))])
    damage(prepared.sources[0].train.prefixes[1], 9, 3999)  # token 8 of document 3 of a, the second of its second pair
    whole = list(loader.batches(run, 0, 2, BATCH, loader.Position(0, 1), num_workers, False))
    assert len(whole) == 2
    damage(prepared.sources[0].train.prefixes[1], 9, 4000)
    named = r"a1.train.bin: document 1: found the id 4000; required an id from 0 to 3999, .*; compare sha256sum .*manifest.json"
    with pytest.raises(InputError, match=named):
        list(loader.batches(run, 0, 2, BATCH, loader.Position(0, 1), num_workers, False))


@pytest.mark.parametrize("at", [0, 5, 10, 11])
def test_an_id_outside_the_vocabulary_of_a_packed_or_held_out_document_is_named(
    prepared: mixture.Prepared, tmp_path: Path, at: int
) -> None:
    source = prepared.sources[1]
    pieces = packing.pack(np.array([5, 6, 19]), 12, overlap=0)  # documents of 5 and 6 tokens, and one of 19 in two parts
    write(tmp_path / "c", [5, 6, 19], 0)
    packed.save(pieces, packed.prefix(tmp_path))
    held = replace(
        source,
        train=mixture.Tokens((tmp_path / "c",), 30, 3),
        packing=mixture.Packing(12, pieces.num_bins, 1.0),
        packing_prefix=packed.prefix(tmp_path),
    )
    one = replace(prepared, sources=(held,))
    run = loader.Sequences([Segment(one, mixture.walk(one, {"b": 100.0}, 12, SEED))])
    damage(tmp_path / "c", at, 65000)
    with pytest.raises(InputError, match=rf"c.bin: document {(at >= 5) + (at >= 11)}: found the id 65000"):
        for number in range(pieces.num_bins):
            run[number]
    damage(tmp_path / "b.valid", at, 4000)
    with pytest.raises(InputError, match=r"b.valid.bin: document 0: found the id 4000"):
        loader.valid_batches(loader.held_out(prepared, SEQ_LENGTH, SEED)["b"], 3, 1, loader.Position(0, 1))


class Raising(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A dataset that meets an error: of our code, of a library's, or of the input."""

    def __init__(self, sequences: loader.Sequences, name: str):
        self.sequences, self.name = sequences, name

    def __getitem__(self, sequence: int) -> dict[str, torch.Tensor]:
        if self.name == "input":
            raise InputError(Problem("a.idx", "x", "y"))
        if self.name == "library":
            np.stack([])
        return self.sequences[-1]  # no place of the walk


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("name", "is_ours"), [("ours", True), ("library", False), ("input", False)])
def test_an_error_of_a_worker_is_judged_as_one_of_the_trainer(
    sequences: loader.Sequences, num_workers: int, name: str, is_ours: bool
) -> None:
    """torch raises a worker's error again from its own code, made of a type and a message."""
    with pytest.raises(Exception, match="^a.idx: found x; required y$" if name == "input" else None) as caught:
        list(loader.batches(Raising(sequences, name), 0, 1, BATCH, loader.Position(0, 1), num_workers, False))
    assert is_defect(caught.value) == is_ours or isinstance(caught.value, InputError)
    assert isinstance(caught.value, InputError) == (name == "input")
    assert not multiprocessing.active_children(), "a worker that ignores SIGTERM keeps Python from ending"


def ring(*_: Any) -> None:
    raise AssertionError("waited for a batch that no worker can hand over")


@pytest.mark.parametrize("place", ["a" * 60 + "/" + "b" * 60, "gone"])
def test_a_worker_hands_over_where_a_socket_has_no_place(
    sequences: loader.Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """TMPDIR as a site's prolog sets it: its path too long for a socket, or no folder. The batches are those of no worker, to the bit."""
    if place != "gone":
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    try:
        alone, found = (list(loader.batches(sequences, 0, 3, BATCH, loader.Position(0, 2), count, False)) for count in (0, 2))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    for batch, other in zip(chain(*alone), chain(*found), strict=True):
        assert list(batch) == list(other) and all(torch.equal(batch[name], other[name]) for name in batch)
        assert [tensor.dtype for tensor in batch.values()] == [tensor.dtype for tensor in other.values()]
        other["tokens"] += 1  # a batch may be written to


def test_a_handed_over_batch_is_pinned_as_a_whole(sequences: loader.Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DataLoader's thread asks the batch itself; page-locked memory needs a GPU, so a stand-in says where it was asked for."""
    batch = loader._Arrays.collate([sequences[0], sequences[1]])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    assert not isinstance(pinned := torch.utils.data._utils.pin_memory.pin_memory(batch), loader._Arrays)
    assert all(torch.equal(pinned[name], tensor + 1) for name, tensor in batch.tensors().items()) and list(pinned) == list(batch)


def test_a_long_run_s_order_takes_no_memory(sequences: loader.Sequences) -> None:
    """As lists it would take 40 MB here, and 0.4 GB in a run of 25,000 steps of 128."""
    tracemalloc.start()
    try:
        batches = loader.batches(sequences, 0, 50_000, BATCH, loader.Position(1, 2), 0, False)
        next(batches)
        batches.close()
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_a_run_that_ends_early_leaves_no_worker(sequences: loader.Sequences) -> None:
    batches = loader.batches(sequences, 0, 2, BATCH, loader.Position(0, 1), 1, False)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


def test_a_mixture_that_changes_at_a_step_is_read_from_there(prepared: mixture.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """75/25 for 3 steps, then a alone; what is read of a goes on as if nothing had changed."""
    monkeypatch.setattr(mixture, "read_prepared", lambda path: prepared)
    weights = {"a": 75.0, "b": 25.0}
    data = DataConfig(
        prepared=prepared.root, seq_length=SEQ_LENGTH, weights=weights, changes=(MixtureChange(step=3, weights={"a": 100.0}),)
    )
    changed = loader.Sequences(segments.read(data, BATCH.global_size, SEED))
    plain = loader.Sequences(segments.read(replace(data, changes=()), BATCH.global_size, SEED))
    alone = loader.Sequences(segments.read(replace(data, weights={"a": 100.0}, changes=()), BATCH.global_size, SEED))
    found = rows(changed, 0, 6, dp=2)
    assert found[:3] == rows(plain, 0, 3, dp=1)
    of_a = [row for step in found for row in step if row[0] < 1000]
    assert of_a == [row for step in rows(alone, 0, 6, dp=1) for row in step][: len(of_a)] and len(of_a) == 9 + 12
    assert rows(changed, 2, 6, dp=4) == found[2:]
    assert [(part.name, part.tokens) for part in segments.realised(changed.segments, 24)] == [("a", 21 * SEQ_LENGTH), ("b", 3 * SEQ_LENGTH)]
    assert segments.realised(changed.segments, 8) == segments.realised(plain.segments, 8)
    first, then = segments.describe(changed.segments, BATCH.global_size)
    assert (first["step"], then["step"]) == (0, 3) and first["taken"] == {"a": 0, "b": 0}, "steps, not sequences"
    assert then["taken"]["a"] == 9 and list(first["weights"]) == ["a", "b"]
    turned = segments.read(replace(data, weights=dict(reversed(weights.items()))), BATCH.global_size, SEED)
    assert list(segments.describe(turned, 4)[0]["weights"]) == ["a", "b"], "in the mixture's order: a config's order changes no walk"


def test_a_change_to_a_mixture_of_another_packed_length_is_refused(prepared: mixture.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tuple(replace(source, packing=mixture.Packing(2 * SEQ_LENGTH, 4, 1.0)) for source in prepared.sources)
    monkeypatch.setattr(
        mixture, "read_prepared", lambda path: replace(prepared, root=path, sources=other) if path.name == "other" else prepared
    )
    change = MixtureChange(step=1, prepared=Path("other"), weights={"a": 100.0})
    with pytest.raises(
        InputError, match=rf"data.seq_length \(other: source a\): found {SEQ_LENGTH}; required {2 * SEQ_LENGTH}, which it is"
    ):
        segments.read(DataConfig(prepared=prepared.root, seq_length=SEQ_LENGTH, changes=(change,)), BATCH.global_size, SEED)


def test_a_source_that_an_earlier_mixture_alone_has_is_known(prepared: mixture.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """a, then b alone, then other documents under the name of a."""
    a, b = prepared.sources
    made = {
        "one": prepared,
        "two": replace(prepared, root=Path("two"), sources=(b,)),
        "three": replace(prepared, root=Path("three"), sources=(replace(a, sha256="of other documents"), b)),
    }
    monkeypatch.setattr(mixture, "read_prepared", lambda path: made[path.name])
    changes = tuple(MixtureChange(step=step, prepared=Path(name), weights={"b": 100.0}) for step, name in ((1, "two"), (2, "three")))
    with pytest.raises(InputError, match=r"\(three\): found source a of other documents"):
        segments.read(DataConfig(prepared=Path("one"), seq_length=SEQ_LENGTH, changes=changes), BATCH.global_size, SEED)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"a": 100.0, "c": 1.0}, "weights.c: found no such source"),
        ({"a": 90.0}, "weights: found weights that sum to 90"),
        ({"a": 110.0, "b": -10.0}, "weights.b: found -10"),
    ],
)
def test_weights_that_are_not_the_mixtures_are_refused(
    prepared: mixture.Prepared, monkeypatch: pytest.MonkeyPatch, weights: dict[str, float], problem: str
) -> None:
    monkeypatch.setattr(mixture, "read_prepared", lambda path: prepared)
    data = DataConfig(prepared=prepared.root, seq_length=SEQ_LENGTH)
    for key, wrong in (
        ("data", replace(data, weights=weights)),
        ("data.changes.0", replace(data, changes=(MixtureChange(step=1, weights=weights),))),
    ):
        with pytest.raises(InputError, match=f"{key}.{problem}"):
            segments.read(wrong, BATCH.global_size, SEED)


def test_other_data_under_a_known_name_is_refused(prepared: mixture.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(
        prepared, root=Path("other"), sources=(replace(prepared.sources[0], train=replace(prepared.sources[0].train, num_tokens=62)),)
    )
    monkeypatch.setattr(mixture, "read_prepared", lambda path: other if path.name == "other" else prepared)
    change = MixtureChange(step=1, prepared=Path("other"), weights={"a": 100.0})
    with pytest.raises(InputError, match=r"data.changes.0.prepared \(other\): found source a of 62 tokens; required 63 tokens"):
        segments.read(DataConfig(prepared=prepared.root, seq_length=SEQ_LENGTH, changes=(change,)), BATCH.global_size, SEED)
    other = replace(prepared, root=Path("other"), sources=(replace(prepared.sources[0], sha256="of other documents"),))
    with pytest.raises(InputError, match=r"\(other\): found source a of other documents; required the same ones .*another name"):
        segments.read(DataConfig(prepared=prepared.root, seq_length=SEQ_LENGTH, changes=(change,)), BATCH.global_size, SEED)
    other = replace(prepared, root=Path("other"))  # a copy
    assert len(segments.read(DataConfig(prepared=prepared.root, seq_length=SEQ_LENGTH, changes=(change,)), BATCH.global_size, SEED)) == 2


def test_a_source_that_is_read_too_often_is_named(sequences: loader.Sequences) -> None:
    parts = segments.realised(sequences.segments, 40)  # a 3.81 times, b 2.67 times
    assert segments.check_epochs(parts, None, "data.max_epochs") == segments.check_epochs(parts, 3.82, "data.max_epochs") == []
    assert [problem.found for problem in segments.check_epochs(parts, 3.0, "data.max_epochs")] == ["source a read 3.81 times"]
    exactly = max(part.epochs for part in parts if part.epochs is not None)
    assert segments.check_epochs(parts, exactly, "data.max_epochs") == [], "so often is allowed"


def test_held_out_sequences_are_read_once_and_the_rest_is_masked(prepared: mixture.Prepared) -> None:
    found = loader.held_out(prepared, SEQ_LENGTH, SEED)
    assert len(found["b"]) == 3
    assert sorted(row["tokens"][0].item() for row in map(found["b"].__getitem__, range(3))) == [3000, 3008, 3016]
    batches = [batch for rank in range(2) for batch in loader.valid_batches(found["a"], 10, 2, loader.Position(rank, 2))]
    assert sum(batch["loss_mask"].sum().item() for batch in batches) == 3 * SEQ_LENGTH
    assert torch.cat([batch["tokens"] for batch in batches]).shape == (4, SEQ_LENGTH)
    problems = [str(problem) for problem in loader.check_held_out(prepared, 27)]
    assert len(problems) == 2 and "source a: found 27 held-out tokens; required more than data.seq_length 27" in problems[0]
    assert loader.check_held_out(prepared, 26) == []


def test_a_token_is_found_in_its_document(prepared: mixture.Prepared) -> None:
    reader = indexed.Reader(prepared.sources[0].train.prefixes)
    wanted = [(document, token) for document, length in enumerate(LENGTHS["a"]) for token in range(length)]
    assert [reader.document(offset) for offset in range(reader.num_tokens)] == wanted
    assert [reader.start(document) + token for document, token in wanted] == list(range(reader.num_tokens))
    assert reader.start(reader.num_documents) == reader.num_tokens == sum(reader.lengths().tolist())
    assert reader.lengths().tolist() == LENGTHS["a"]


def test_an_index_that_was_cut_is_named_before_a_token_is_read(prepared: mixture.Prepared) -> None:
    index = indexed.idx_path(prepared.sources[0].train.prefixes[1])
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"a1.train.idx: found \d+ bytes; required \d+ for 2 sequences and 3 boundaries"):
        indexed.Reader(prepared.sources[0].train.prefixes)
