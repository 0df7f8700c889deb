"""Values of bits and back, against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_prism.hf import as_torch, dtypes
from megatron_prism.hf.dtypes import Dtype
from megatron_prism.merge import values


@pytest.mark.parametrize("dtype", [dtypes.BF16, dtypes.F16], ids=str)
def test_every_value_of_sixteen_bits_comes_as_torch_has_it_and_back(dtype: Dtype) -> None:
    bits_N = np.arange(1 << 16).astype(np.uint16)
    wanted_N = as_torch.to_tensor(bits_N, as_torch.dtype_of(dtype)).float()
    found_N = values.widened(bits_N, dtype)
    finite_N = wanted_N.isfinite().numpy()
    assert found_N.dtype == np.float32 and np.array_equal(found_N[finite_N], wanted_N.numpy()[finite_N])
    assert np.array_equal(np.isfinite(found_N), finite_N)
    assert np.array_equal(values.rounded(found_N, dtype)[finite_N], bits_N[finite_N])


@pytest.mark.parametrize("dtype", dtypes.BY_NAME.values(), ids=str)
def test_rounding_is_torchs(dtype: Dtype) -> None:
    """Random values, halves of a step to the even side, subnormals, what overflows. The control: rounding toward zero."""
    steps_N = np.arange(1 << 16, dtype=np.uint32) << 16
    halves_N = np.concatenate([steps_N + lower for lower in (0x7FFF, 0x8000, 0x8001)]).astype(np.uint32).view(np.float32)
    halves_N = halves_N[np.isfinite(halves_N)]
    random_N = torch.randn(10000, generator=torch.Generator().manual_seed(0)).numpy()
    values_N = np.concatenate([halves_N, random_N, random_N * np.float32(1e-40), np.float32([3.4e38, -3.4e38, 70000.0, 0.0, -0.0])])
    with np.errstate(over="ignore"):
        found = as_torch.to_tensor(values.rounded(values_N.copy(), dtype), as_torch.dtype_of(dtype))
    wanted = torch.from_numpy(values_N).to(as_torch.dtype_of(dtype))
    assert torch.equal(found, wanted) and torch.equal(found.signbit(), wanted.signbit())
    if dtype == dtypes.BF16:
        assert not np.array_equal(as_torch.of_tensor(found), (values_N.view(np.uint32) >> 16).astype(np.uint16))


@pytest.mark.parametrize("dtype", dtypes.BY_NAME.values(), ids=str)
def test_what_is_not_finite_stays_so(dtype: Dtype) -> None:
    with np.errstate(invalid="ignore"):
        none_N = np.float32([math.inf]) - np.float32([math.inf])  # the processor's own NaN
    values_N = np.concatenate([none_N, np.float32([math.nan, math.inf, -math.inf])])
    found = as_torch.to_tensor(values.rounded(values_N.copy(), dtype), as_torch.dtype_of(dtype))
    assert torch.equal(found.isnan(), torch.tensor([True, True, False, False])) and not found.isfinite().any()


def test_what_is_summed_does_not_move_what_is_rounded_twice() -> None:
    """A tied head that is stored twice is rounded twice."""
    values_N = np.float32([1.003, -2.507, 1e-3])
    assert np.array_equal(values.rounded(values_N, dtypes.BF16), values.rounded(values_N, dtypes.BF16))
