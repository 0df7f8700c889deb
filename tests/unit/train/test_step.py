"""What a step hands to Megatron where documents are masked: one row of all its sequences, and where each document begins."""

from __future__ import annotations

import pytest
import torch

from megatron_prism.train import step


def batch(rows: list[list[int]]) -> step.Batch:
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
        ([[0, 0, 0, 1], [0, 0, 1, 1]], [0, 3, 4, 6, 8], 5),
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [0, 4, 8], 5),  # two sequences of the same number are two documents
        ([[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]], [0, 5, 6, 7, 12], 7),
    ],
)
def test_documents_begin_where_their_number_changes_and_with_each_sequence(rows: list[list[int]], starts: list[int], bound: int) -> None:
    microbatch = batch(rows)
    packed = step._packed(microbatch)
    for cu_seqlens in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert cu_seqlens.tolist() == starts and cu_seqlens.dtype == torch.int32
    assert packed.qkv_format == "thd" and packed.max_seqlen_q == packed.max_seqlen_kv == bound
    assert isinstance(packed.max_seqlen_q, int) and packed.max_seqlen_q != starts[-1]  # else Megatron counts positions through the row
    row = step._folded(microbatch)
    assert {key: value.shape for key, value in row.items()} == dict.fromkeys(step.KEYS, (1, starts[-1]))
    assert row["tokens"][0].tolist() == list(range(starts[-1]))


def test_without_document_ids_a_microbatch_stays_as_it_is() -> None:
    microbatch = batch([[0, 0], [0, 0]])
    del microbatch["document_ids"]
    assert step._packed(microbatch) is None and step._folded(microbatch) is microbatch


def test_rotary_tables_are_of_few_lengths() -> None:
    """Megatron keeps one by length of the longest document: up to 32 of them, at 128k each 64 MiB."""
    ids = [[0] * longest + list(range(1, 4097 - longest)) for longest in range(1, 4097, 37)]
    assert len({step._packed(batch([row])).max_seqlen_q for row in ids}) <= 13
