"""What a model takes of a microbatch: per-token tensors of one shape, folded into one row where documents are masked, and where each begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_prism.models.batch import INPUTS, Batch, model_batch, packed_documents, padded_batch
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups

NAMES = (*INPUTS, "loss_mask")


def groups(cp: int = 1) -> Groups:
    return SimpleNamespace(cp=cp, cp_group=None)  # type: ignore[return-value]


def batch(rows: list[list[int]]) -> Batch:
    ids_BS = torch.tensor(rows, dtype=torch.int32)
    tokens_BS = torch.arange(ids_BS.numel()).view(ids_BS.shape)
    return {
        "tokens": tokens_BS,
        "labels": tokens_BS + 1,
        "loss_mask": torch.ones(ids_BS.shape),
        "position_ids": tokens_BS,
        "document_ids": ids_BS,
    }


@pytest.mark.parametrize(
    ("rows", "starts", "bound"),
    [
        ([[0, 0, 0, 0]], [0, 4], 5),
        ([[0, 1, 2, 3]], [0, 1, 2, 3, 4], 2),
        ([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]], [0, 3, 8, 10], 9),  # the longest has 5: 8, and one
        ([[0, 0, 0, 1, 1]], [0, 3, 5], 6),  # a row of a power of two and one: 5 would be its length
        ([[0, 0, 0, 1], [0, 0, 1, 1]], [0, 3, 4, 6, 8], 5),
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [0, 4, 8], 5),  # two sequences of the same number are two documents
        ([[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]], [0, 5, 6, 7, 12], 7),
    ],
)
def test_documents_begin_where_their_number_changes_and_with_each_sequence(rows: list[list[int]], starts: list[int], bound: int) -> None:
    microbatch = batch(rows)
    packed = packed_documents(microbatch)
    for cu_seqlens in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert cu_seqlens.tolist() == starts and cu_seqlens.dtype == torch.int32
    assert packed.qkv_format == "thd" and packed.max_seqlen_q == packed.max_seqlen_kv == bound
    assert isinstance(packed.max_seqlen_q, int) and packed.max_seqlen_q != starts[-1]  # else Megatron counts positions through the row
    row = model_batch(microbatch, NAMES, groups())
    assert {key: value.shape for key, value in row.items()} == dict.fromkeys(NAMES, (1, starts[-1]))
    assert row["tokens"][0].tolist() == list(range(starts[-1]))


def test_documents_are_numbered_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a numbering is, a device says after a wait alone; one without values cannot say it at all."""
    microbatch = batch([[0, 0, 0, 1], [0, 0, 1, 1]])
    here = packed_documents(microbatch)
    monkeypatch.setattr(host, "device", lambda: torch.device("meta"))
    there = packed_documents(microbatch)
    assert there.cu_seqlens_q is there.cu_seqlens_kv and there.cu_seqlens_q.device.type == "meta"
    if hasattr(there, "seq_idx"):  # Megatron-Core 0.19
        assert here.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2, 3, 3]] and here.seq_idx.dtype == torch.int32
        assert there.seq_idx.device.type == "meta" and there.seq_idx.shape == (1, 8)


def test_without_document_ids_a_microbatch_stays_as_it_is() -> None:
    microbatch = {name: tensor for name, tensor in batch([[0, 0], [0, 0]]).items() if name != "document_ids"}
    assert packed_documents(microbatch) is None
    found = model_batch(microbatch, NAMES, groups())
    assert all(found[name] is microbatch[name] for name in NAMES) and set(found) == set(NAMES)


@pytest.mark.parametrize("wrong", [None, torch.ones(2), torch.ones(2, 1), torch.ones(2, 2, 1), torch.ones(1, 4)])
def test_what_is_not_one_value_a_token_is_refused_before_it_broadcasts(wrong: torch.Tensor | None) -> None:
    microbatch = {**batch([[0, 0], [0, 0]]), **({} if wrong is None else {"advantages": wrong})}
    with pytest.raises(ValueError, match="one value a token of each of .*advantages; found {'advantages': "):
        model_batch(microbatch, (*INPUTS, "advantages"), groups())


def test_documents_are_not_split_over_context_parallel_ranks() -> None:
    with pytest.raises(ValueError, match="cp 2"):
        model_batch(batch([[0, 0, 1, 1]]), INPUTS, groups(cp=2))


def test_padding_is_a_document_of_its_own_and_takes_what_a_model_reads_alone() -> None:
    microbatch = {**batch([[0, 0, 1], [0, 3, 3]]), "place": torch.zeros(2, 5)}
    found = padded_batch(microbatch, 4)
    assert found["document_ids"].tolist() == [[0, 0, 1, 2], [0, 3, 3, 4]] and set(found) == {*INPUTS, "document_ids"}
    assert all(found[name].shape == (2, 4) and torch.equal(found[name][:, :3], microbatch[name]) for name in INPUTS)
    unchanged = padded_batch(microbatch, 3)
    assert all(torch.equal(unchanged[name], microbatch[name]) for name in unchanged)


def test_rotary_tables_are_of_few_lengths() -> None:
    """Megatron keeps one by length of the longest document: up to 32 of them, at 128k each 64 MiB."""
    ids = [[0] * longest + list(range(1, 4097 - longest)) for longest in range(1, 4097, 37)]
    assert len({packed_documents(batch([row])).max_seqlen_q for row in ids}) <= 13
