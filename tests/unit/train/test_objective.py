"""Cross-entropy as an objective: a pure function, equal to torch's, blind to what its mask hides."""

from __future__ import annotations

import pytest
import torch

from megatron_prism.train.objective import CROSS_ENTROPY
from megatron_prism.train.step import _reciprocal


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [100_000.0, 127.0, 0.25])
def test_gradients_are_divided_in_fp32_whatever_their_dtype(dtype: torch.dtype, weight: float) -> None:
    """As by a number of Python's. A factor that is rounded to bf16 first, as a CUDA tensor without dimensions would be, is another one."""
    torch.manual_seed(0)
    sums, factor_1 = torch.randn(10_000).to(dtype), _reciprocal(torch.tensor(weight, dtype=torch.float64))
    assert factor_1.dtype == torch.float32 and factor_1.shape == (1,)  # with a dimension, both are promoted to fp32
    divided, rounded = sums.clone(), sums * factor_1.to(torch.bfloat16).to(dtype)
    divided *= factor_1  # as Megatron-Core's buffers do
    assert divided.dtype == dtype and torch.equal(divided, (sums.float() * (1.0 / weight)).to(dtype))
    assert torch.equal(divided, rounded) == (weight == 0.25)


def test_without_weight_gradients_stay_sums() -> None:
    assert float(_reciprocal(torch.tensor(0.0, dtype=torch.float64))) == 1.0
