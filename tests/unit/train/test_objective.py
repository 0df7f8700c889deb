"""Cross-entropy as an objective: a pure function, equal to torch's, blind to what its mask hides."""

from __future__ import annotations

import pytest
import torch

from megatron_prism.train.objective import CROSS_ENTROPY


def test_cross_entropy_is_torchs_over_the_tokens_of_the_mask() -> None:
    torch.manual_seed(0)
    logits_BSV, labels_BS = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    nll_BS = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none").view(2, 5)
    mask_BS = torch.tensor([[1.0, 1, 0, 1, 0], [0, 0, 0, 1, 1]])
    terms = CROSS_ENTROPY.terms(nll_BS, {"loss_mask": mask_BS})
    wanted = torch.nn.functional.cross_entropy(logits_BSV[mask_BS == 1], labels_BS[mask_BS == 1], reduction="sum")
    assert float(terms.loss) == pytest.approx(float(wanted), rel=1e-6) and float(terms.weight) == 5 and not terms.sums
    (gradient,) = torch.autograd.grad(terms.loss, logits_BSV)
    assert bool((gradient[mask_BS == 0] == 0).all()) and bool((gradient[mask_BS == 1] != 0).all())


def test_an_objective_names_what_it_reads() -> None:
    with pytest.raises(KeyError, match="loss_mask"):
        CROSS_ENTROPY.terms(torch.zeros(1, 2), {})
    assert CROSS_ENTROPY.needs == ("loss_mask",)
