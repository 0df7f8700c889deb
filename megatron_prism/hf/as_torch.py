"""Bits as torch's tensors, and torch's tensors as bits: for those who compute with weights, not only move them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from megatron_prism.hf.bits import Bits
from megatron_prism.hf.dtypes import BY_NAME, Dtype

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute pieces with one torch thread: a piece fits in the cache, and more threads take half as much CPU time again and are no faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dtype_of(dtype: Dtype) -> torch.dtype:
    """Return torch's dtype."""
    return cast(torch.dtype, getattr(torch, dtype.name))


def at_rest(dtype: torch.dtype) -> Dtype:
    """Return the dtype at rest of torch's. Raises: KeyError for one that is no float of 16 to 64 bits."""
    return BY_NAME[str(dtype).removeprefix("torch.")]


def to_tensor(bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """Return bits as a tensor that shares their memory."""
    return torch.from_numpy(bits).view(dtype)


def of_tensor(tensor: torch.Tensor) -> Bits:
    """Return a tensor's bits. They share the memory of a contiguous tensor."""
    return cast(Bits, tensor.detach().contiguous().view(_UNSIGNED[tensor.dtype.itemsize]).numpy())


def convert(bits: Bits, source: torch.dtype, target: torch.dtype) -> Bits:
    """Return the bits of values cast to another dtype. For the same dtype return the bits unchanged."""
    return bits if source == target else of_tensor(to_tensor(bits, source).to(target))
