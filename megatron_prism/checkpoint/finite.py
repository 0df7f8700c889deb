"""Non-finite values found by their bits: exact for every float dtype, and as fast as memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# positive infinity's bits, and the integers of the dtype's width: any larger bits are NaN, and a sign bit more is negative
_INFINITY: dict[torch.dtype, tuple[int, Any, Any]] = {
    torch.bfloat16: (0x7F80, np.int16, np.uint16),
    torch.float16: (0x7C00, np.int16, np.uint16),
    torch.float32: (0x7F800000, np.int32, np.uint32),
    torch.float64: (0x7FF0000000000000, np.int64, np.uint64),
}


def first_nonfinite(values: torch.Tensor) -> int | None:
    """Return the index of the first NaN or infinity of a contiguous tensor, counted in row-major order; None where all are finite."""
    if not values.numel():
        return None
    infinity, signed, unsigned = _INFINITY[values.dtype]
    sign = 1 << (8 * values.dtype.itemsize - 1)
    bits = values.reshape(-1).view(torch.uint8).numpy().view(unsigned)
    # as signed integers the positive values come last, as unsigned ones the negative
    if bits.view(signed).max() < infinity and bits.max() < (infinity | sign):
        return None
    return int(np.argmax(bits & unsigned(sign - 1) >= unsigned(infinity)))
