"""The arithmetic of a block that whole models do not show: large products, a window's mask, what attention asks of CUDA's fused kernels."""

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
    call = blocks.prefill(START, [TOKENS] * ROWS, TOKENS, blocks.Positions(None, window, torch.float32, torch.float32), torch.device("cpu"))
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


@pytest.mark.parametrize("with_bias", [False, True])
def test_large_products_are_torchs(monkeypatch: pytest.MonkeyPatch, with_bias: bool) -> None:
    """By oneDNN: also of rows that do not lie next to each other."""
    generator = torch.Generator().manual_seed(0)
    wide, weight, bias = (torch.randn(shape, generator=generator) for shape in ((40, 600), (512, 300), (512,)))
    x_TY = wide[:, 100:400]
    assert len(x_TY) * weight.numel() >= blocks.LARGE
    used = blocks.linear(x_TY, weight, bias if with_bias else None)
    wanted = x_TY.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    assert (used - wanted).abs().max() < 1e-4
    monkeypatch.setattr(blocks, "LARGE", 2**60)
    assert (used - blocks.linear(x_TY, weight, bias if with_bias else None)).abs().max() < 2e-4


def test_a_token_sees_its_window_and_nothing_later() -> None:
    for window, sees in ((None, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), (2, [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])):
        rules = blocks.Positions(None, window, torch.float32, torch.float32)
        assert (rules.mask(torch.tensor([2, 4]), 5) == 0).int().tolist() == sees


def test_a_rotation_in_fp32_rounds_once() -> None:
    """As Transformer Engine's kernel; in bf16 angles, products and sums are rounded."""
    x_TGJP = torch.randn(TOKENS, GROUPS, HEADS, CHANNELS, generator=torch.Generator().manual_seed(0)).bfloat16()
    inverse_F = 500.0 ** (-torch.arange(CHANNELS // 2) / (CHANNELS // 2))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        rules = blocks.Positions(inverse_F, None, torch.bfloat16, dtype)
        found[dtype] = blocks.rotate(x_TGJP, blocks.prefill(START, [TOKENS], TOKENS, rules, torch.device("cpu")))
    angle_TF = torch.outer(torch.arange(START, START + TOKENS).float(), inverse_F)[:, None, None]
    one, other = x_TGJP.float().chunk(2, -1)
    whole = torch.cat([one * angle_TF.cos() - other * angle_TF.sin(), other * angle_TF.cos() + one * angle_TF.sin()], -1)
    assert torch.equal(found[torch.float32], whole.bfloat16()) and not torch.equal(found[torch.bfloat16], whole.bfloat16())
    assert found[torch.bfloat16].dtype == torch.bfloat16
