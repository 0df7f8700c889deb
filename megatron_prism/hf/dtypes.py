"""The dtypes of weights at rest, as data. Nothing here needs torch, whose import takes longer than the merge of a small model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """A float dtype. name: torch's, and that of config.json. code: of safetensors' headers. infinity: the bits of a positive inf."""

    name: str
    code: str
    itemsize: int
    infinity: int

    def __str__(self) -> str:
        return self.name


F16 = Dtype("float16", "F16", 2, 0x7C00)
BF16 = Dtype("bfloat16", "BF16", 2, 0x7F80)
F32 = Dtype("float32", "F32", 4, 0x7F800000)
F64 = Dtype("float64", "F64", 8, 0x7FF0000000000000)

BY_NAME = {dtype.name: dtype for dtype in (F32, F16, BF16, F64)}
BY_CODE = {dtype.code: dtype for dtype in BY_NAME.values()}
