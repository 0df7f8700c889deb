"""What the local attention masks: which tokens a context-parallel rank holds, and which of them see which."""

from __future__ import annotations

import pytest
import torch

from megatron_prism.models.local_attention import outside_document, unseen, zigzag


def test_a_rank_holds_a_chunk_of_the_front_and_one_of_the_back() -> None:
    assert [zigzag(4, rank, 2).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert zigzag(3 * 2, 2, 4).tolist() == [6, 7, 8, 15, 16, 17]
    assert zigzag(6, 0, 1).tolist() == list(range(6))


@pytest.mark.parametrize("cp", [1, 2, 3, 8])
def test_ranks_hold_each_token_once(cp: int) -> None:
    assert sorted(torch.cat([zigzag(6, rank, cp) for rank in range(cp)]).tolist()) == list(range(6 * cp))


@pytest.mark.parametrize("window", [None, 1, 3, 5, 16])
def test_each_rank_masks_its_rows_of_the_whole(window: int | None) -> None:
    """Rows of the mask that one process would use, columns in the order in which keys are gathered."""
    sees = [[key <= query and (window is None or query - key < window) for key in range(16)] for query in range(16)]
    order = torch.cat([zigzag(4, rank, 4) for rank in range(4)])
    for rank in range(4):
        mask = unseen(zigzag(4, rank, 4), order, None if window is None else (window - 1, 0))
        assert torch.equal(~mask, torch.tensor(sees)[zigzag(4, rank, 4)][:, order])


def test_documents_do_not_see_each_other() -> None:
    seen = ~outside_document(torch.tensor([0, 2, 5], dtype=torch.int32), None)
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert (~outside_document(torch.tensor([0, 2, 5]), (1, 0)))[4].int().tolist() == [0, 0, 0, 1, 1]
