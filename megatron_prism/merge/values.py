"""A piece of a tensor as numbers that are summed, and back: numpy alone, since to import torch takes longer than to merge a small model.

N: the values of a piece.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from megatron_prism.hf.bits import Bits
from megatron_prism.hf.dtypes import BF16, Dtype

Values = np.ndarray[Any, np.dtype[np.floating[Any]]]
_OF_WIDTH = {2: np.float16, 4: np.float32, 8: np.float64}


def widened(bits_N: Bits, dtype: Dtype) -> Values:
    """Return bits as values in fp32, in fp64 where they are; of fp32 and fp64 in the bits' own memory."""
    if dtype == BF16:  # the upper half of an fp32
        wide_N = bits_N.astype(np.uint32)
        wide_N <<= 16
        return wide_N.view(np.float32)
    values_N = bits_N.view(_OF_WIDTH[dtype.itemsize])
    return cast(Values, values_N.astype(np.float32) if dtype.itemsize == 2 else values_N)


def rounded(values_N: Values, dtype: Dtype) -> Bits:
    """Return the bits of values rounded to the nearest of a dtype, to the even one of two."""
    if dtype != BF16:
        return cast(Bits, values_N.astype(_OF_WIDTH[dtype.itemsize], copy=False).view(f"u{dtype.itemsize}"))
    bits_N = values_N.astype(np.float32, copy=False).view(np.uint32)
    near_N = bits_N >> 16
    near_N &= 1  # just half a step up only to an even one
    near_N += 0x7FFF
    near_N += bits_N  # no NaN of the processor's is carried over: its lower half is 0
    near_N >>= 16
    return near_N.astype(np.uint16)
