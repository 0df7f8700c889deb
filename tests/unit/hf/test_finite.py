"""NaN and inf are found by their bits, and named by their place in the whole tensor."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_prism.hf import bits, finite


@pytest.mark.parametrize("dtype", list(finite.INFINITY))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_of_them_is_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, largest, -largest, 1.0, value, value], dtype=dtype)
    assert finite.first_nonfinite(bits.of_tensor(values), dtype) == 5
    assert finite.first_nonfinite(bits.of_tensor(values[:5]), dtype) is None
    assert finite.first_nonfinite(bits.of_tensor(values[:0]), dtype) is None


def test_a_piece_names_the_place_in_its_tensor() -> None:
    piece = bits.of_tensor(torch.tensor([1.0, math.inf, 2.0]))
    problem = finite.problem_in(piece, torch.float32, 10, (5, 4), "model.safetensors: x")
    assert problem is not None and problem.found == "inf at [2, 3]" and problem.where == "model.safetensors: x"
    assert finite.problem_in(piece[:1], torch.float32, 10, (5, 4), "x") is None
