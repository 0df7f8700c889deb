"""The arithmetic of a block that whole models do not show: large products, a window's mask."""

from __future__ import annotations

import pytest
import torch

from megatron_prism.generate import blocks


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
        rules = blocks.Positions(None, window, torch.float32)
        assert (rules.mask(torch.tensor([2, 4]), 5) == 0).int().tolist() == sees
