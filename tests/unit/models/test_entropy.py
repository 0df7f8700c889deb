"""The entropy of logits whose vocabulary may lie split over ranks, a piece at a time: torch's own, in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prism.models import entropy

ALONE: Any = SimpleNamespace(tp=1)


@pytest.mark.parametrize("piece_bytes", [1, 200, entropy.PIECE_BYTES])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_entropy_is_that_of_the_softmax(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, piece_bytes: int) -> None:
    monkeypatch.setattr(entropy, "PIECE_BYTES", piece_bytes)
    torch.manual_seed(0)
    logits_SBV = (4 * torch.randn(6, 3, 17)).to(dtype)
    kept = logits_SBV.clone()
    wanted_SB = torch.distributions.Categorical(logits=logits_SBV.double()).entropy()
    found_SB = entropy.entropy(logits_SBV, ALONE)
    assert found_SB.dtype == torch.float32 and float((found_SB - wanted_SB).abs().max()) < tolerance
    assert torch.equal(logits_SBV, kept), "the loss is computed from them next"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_pad_the_vocabulary_do_not_count(dtype: torch.dtype) -> None:
    logits_SBV = torch.randn(4, 1, 8).to(dtype)
    hidden = logits_SBV.clone()
    hidden[..., 5:] = torch.finfo(dtype).min  # as build.mask_padded_vocabulary has them
    found, wanted = entropy.entropy(hidden, ALONE), entropy.entropy(logits_SBV[..., :5].contiguous(), ALONE)
    assert bool(found.isfinite().all()) and float((found - wanted).abs().max()) < 1e-6
    assert float((entropy.entropy(logits_SBV, ALONE) - wanted).abs().max()) > 1e-2
