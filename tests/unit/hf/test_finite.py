"""NaN and inf are found by their bits, and named by their place in the whole tensor."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_prism.hf import as_torch, dtypes, finite
from megatron_prism.hf.dtypes import Dtype


@pytest.mark.parametrize("dtype", list(dtypes.BY_NAME.values()), ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_of_them_is_found_in_every_dtype(dtype: Dtype, value: float) -> None:
    of_torch = as_torch.dtype_of(dtype)
    largest = torch.finfo(of_torch).max
    values = torch.tensor([0.0, -0.0, largest, -largest, 1.0, value, value], dtype=of_torch)
    assert finite.first_nonfinite(as_torch.of_tensor(values), dtype) == 5
    assert finite.first_nonfinite(as_torch.of_tensor(values[:5]), dtype) is None
    assert finite.first_nonfinite(as_torch.of_tensor(values[:0]), dtype) is None


def test_a_piece_names_the_place_in_its_tensor() -> None:
    for value in (math.inf, -math.inf, math.nan):
        piece = as_torch.of_tensor(torch.tensor([1.0, value, 2.0]))
        problem = finite.problem_in(piece, dtypes.F32, 10, (5, 4), "model.safetensors: x")
        assert problem is not None and problem.found == f"{value} at [2, 3]" and problem.where == "model.safetensors: x"
        assert finite.problem_in(piece[:1], dtypes.F32, 10, (5, 4), "x") is None
