"""A digest is of the whole tensor's bits: however it is cut, and never blind to one element."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_prism.checkpoint.fingerprint import SIGNED, _measure


def digest(tensor: torch.Tensor, rows: int = 0, columns: int = 0) -> int:
    """Return the digest of a tensor cut at a row and a column, each piece at its place."""
    digests = [
        _measure(tensor[first:last, left:right], tensor.shape, (first, left))[0]
        for first, last in ((0, rows), (rows, tensor.shape[0]))
        for left, right in ((0, columns), (columns, tensor.shape[1]))
    ]
    return sum(digests) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cut_does_not_change_it_and_any_change_of_one_element_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(37, 29).to(dtype)
    kept, whole = tensor.clone(), digest(tensor)
    assert {digest(tensor, rows, columns) for rows, columns in ((1, 0), (36, 3), (5, 28), (37, 29))} == {whole}
    monkeypatch.setattr("megatron_prism.checkpoint.fingerprint.HOST_PIECE", 100)
    assert digest(tensor) == whole
    assert torch.equal(tensor, kept)
    bits = tensor.view(SIGNED[dtype.itemsize]).view(-1)
    generator = random.Random(0)
    for _ in range(500):
        place, bit = generator.randrange(len(bits)), generator.randrange(8 * dtype.itemsize - 1)
        bits[place] ^= 1 << bit
        assert digest(tensor) != whole
        bits[place] ^= 1 << bit
    assert digest(tensor) == whole
    assert digest(tensor.flip(0)) != whole  # the same elements at other places


def test_nan_and_zero_have_bits_too() -> None:
    values = torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])
    other = values.clone()
    other[0, 0] = -0.0
    assert digest(values) == digest(values.clone()) != digest(other)
