"""Find NaN and inf by their bits. Exact for every float dtype, and faster than memory."""

from __future__ import annotations

import numpy as np
import torch

from megatron_prism.hf.bits import Bits

INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}


def first_nonfinite(bits: Bits, dtype: torch.dtype) -> int | None:
    """Return the index of the first NaN or inf in row-major order, None where all values are finite.

    As integers, the bits of a positive NaN or inf are at least those of inf. A negative one also has the sign bit.
    """
    if not bits.size:
        return None
    infinity, sign = INFINITY[dtype], 1 << (8 * dtype.itemsize - 1)
    if bits.view(f"i{dtype.itemsize}").max() < infinity and bits.max() < (infinity | sign):
        return None
    return int(np.argmax((bits & bits.dtype.type(sign - 1)) >= infinity))
