"""Attention over a cache asks for what a fused kernel of CUDA accepts, whatever this machine's own kernels take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_prism.generate import blocks

ROWS, GROUPS, HEADS, TOKENS, ROOM, CHANNELS, START = 2, 3, 4, 5, 32, 8, 7


@pytest.mark.parametrize("window", [None, 4])
def test_grouped_queries_share_the_keys_of_the_cache(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many heads of keys as of queries, no enable_gqa, and no copy of the cache: of a prompt of 128k it would have a GiB a layer."""
    asked: list[dict[str, Any]] = []
    plain = functional.scaled_dot_product_attention

    def recorded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> torch.Tensor:
        asked.append({"query": query, "key": key, "value": value, **named})
        return plain(query, key, value, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS * TOKENS, GROUPS, HEADS, CHANNELS, generator=draw)
    key, value = (torch.randn(ROWS * TOKENS, GROUPS, CHANNELS, generator=draw) for _ in range(2))
    cache = [torch.randn(ROWS + 1, GROUPS, ROOM, CHANNELS, generator=draw) for _ in range(2)]
    call = blocks.prefill(START, [TOKENS] * ROWS, TOKENS, blocks.Positions(None, window, torch.float32), torch.device("cpu"))
    attention = blocks.Attention(torch.empty(0), torch.empty(0), None, torch.empty(0), GROUPS, CHANNELS, 0.3)
    out = attention._prefill(query, key, value, call, *cache).reshape(ROWS * TOKENS, GROUPS, HEADS, CHANNELS)

    (one,) = asked
    assert one["query"].shape[:2] == one["key"].shape[:2] == one["value"].shape[:2] and not one.get("enable_gqa")
    assert one["key"].stride(-1) == 1 and one["key"].untyped_storage().data_ptr() == cache[0].untyped_storage().data_ptr()
    for token in range(ROWS * TOKENS):
        row, place = divmod(token, TOKENS)
        least = 0 if window is None else START + place - window + 1
        seen = [part[row, :, least : START + place + 1] for part in cache]
        scores = torch.einsum("gjp,gkp->gjk", query[token], seen[0]) * 0.3
        wanted = torch.einsum("gjk,gkp->gjp", scores.softmax(-1), seen[1])
        torch.testing.assert_close(out[token], wanted)
