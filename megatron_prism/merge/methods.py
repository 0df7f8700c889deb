"""The four ways to merge, as functions on pieces of a tensor in fp32. A sum is made in its parts' memory: new memory would cost more than it.

N: the values of a piece. Products, sums and divisions come in mergekit's order, so that where values cancel the same rounding is left.
What a method needs of a whole tensor is added up over its pieces first: Angle (slerp), Least (ties).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from megatron_prism.core.config import MergeConfig
from megatron_prism.merge.values import Values

NO_LENGTH = 1e-8  # a tensor that is no longer is taken for zero (mergekit)
LINE = 0.9995  # the cosine from which two tensors are taken for parallel (mergekit's and the usual constant)
HALF = 16  # the bits of an fp32 that one count distinguishes
NO_SUM = 1e-8  # weights whose sum is nearer to 0 are not divided by it (mergekit)
Halves = np.ndarray[Any, np.dtype[np.int32]]
Counts = np.ndarray[Any, np.dtype[np.int64]]
Combine = Callable[[list[Values]], Values]
Pieces = Callable[[], Iterable[list[Values]]]  # the pieces of several tensors, from the start, each time it is called


def linear(parts_N: Sequence[Values], weights: Sequence[float], divisor: float = 1.0) -> Values:
    """Return the weighted sum, divided, in the memory of a part. A part of weight 0 is left out: its 0 would make 0 of another's -0.

    Source: Model soups, arXiv 2203.05482.
    """
    weighted = [(part_N, weight) for part_N, weight in zip(parts_N, weights, strict=True) if weight != 0]
    (first_N, first), *others = weighted or [(parts_N[0], 0.0)]
    total_N = np.multiply(first_N, first, out=first_N)
    for part_N, weight in others:
        whole = float(part_N.dtype.type(weight))
        upper = _upper_half(whole)
        total_N += part_N * upper
        if whole != upper:
            total_N += np.multiply(part_N, whole - upper, out=part_N)
    if divisor != 1.0:
        total_N /= divisor
    return total_N


def _upper_half(weight: float) -> float:
    """Return the first 16 bits of a weight's significand: its product with a value of bf16 is exact in fp32.

    Where a sum cancels, what is left of it is then no rounding of a product: as in mergekit, whose product and sum are fused.
    """
    bits = np.array(weight, np.float32).view(np.uint32) & np.uint32(0xFFFFFF00)
    return float(bits.view(np.float32))


def task_arithmetic(
    base_N: Values, parts_N: Sequence[Values], weights: Sequence[float], divisor: float = 1.0, scale: float = 1.0
) -> Values:
    """Return the base plus the weighted sum of what each part moved, divided and scaled, in the parts' memory. Source: arXiv 2212.04089."""
    for part_N, weight in zip(parts_N, weights, strict=True):
        part_N -= base_N
        part_N *= weight
    merged_N, *others_N = parts_N
    for move_N in others_N:
        merged_N += move_N
    if divisor != 1.0:
        merged_N /= divisor
    if scale != 1.0:
        merged_N *= scale
    merged_N += base_N
    return merged_N


@dataclass(frozen=True)
class Angle:
    """What slerp needs of two whole tensors: the sums of their squares and of their products."""

    first: float = 0.0
    second: float = 0.0
    product: float = 0.0

    def add(self, first_N: Values, second_N: Values) -> Angle:
        """Return the sums with one more piece."""
        return Angle(
            self.first + float(np.square(first_N).sum()),
            self.second + float(np.square(second_N).sum()),
            self.product + float((first_N * second_N).sum()),
        )

    def weights(self, t: float) -> tuple[float, float]:
        """Return the weights of both tensors at `t`, those of a straight line where the tensors are parallel; zeros are at a right angle to all.

        Source: Shoemake 1985; mergekit 0.1.5, merge_methods/slerp.py.
        """
        lengths = [length if length > NO_LENGTH else 1.0 for length in map(math.sqrt, (self.first, self.second))]
        cosine = max(-1.0, min(1.0, self.product / lengths[0] / lengths[1]))
        if abs(cosine) > LINE:
            return 1 - t, t
        angle = math.acos(cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@dataclass(frozen=True)
class Least:
    """The least magnitude that is kept of a tensor, and how many of the values that have just it: the first of them."""

    value: float
    num_equal: int


def least_kept(values: Pieces, num_kept: int) -> list[Least]:
    """Return of each of several tensors what its num_kept largest magnitudes end with, exactly, in two counts and no sorting.

    The bits of a positive fp32 are ordered as its value: the first count finds their upper half, the second the lower one.
    """
    uppers = [_kth(counts, num_kept) for counts in _counted([magnitude_bits(value_N) >> HALF for value_N in each] for each in values())]
    lowers = _counted(
        [_lower(magnitude_bits(value_N), upper) for value_N, (upper, _) in zip(each, uppers, strict=True)] for each in values()
    )
    least = []
    for counts, (upper, num_above) in zip(lowers, uppers, strict=True):
        lower, num_between = _kth(counts, num_kept - num_above)
        value = np.array((upper << HALF) | lower, np.int32).view(np.float32)
        least.append(Least(float(value), num_kept - num_above - num_between))
    return least


def largest(values_N: Values, least: Least) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Least]:
    """Return which values of a piece are among the largest of their tensor, and what is least in the pieces after it."""
    size_N = np.abs(values_N.astype(np.float32, copy=False))
    is_kept_N, is_equal_N = size_N > least.value, size_N == least.value
    num_equal = int(np.count_nonzero(is_equal_N))
    if num_equal <= least.num_equal:
        is_kept_N |= is_equal_N
    else:
        is_kept_N[np.flatnonzero(is_equal_N)[: least.num_equal]] = True
    return is_kept_N, Least(least.value, max(0, least.num_equal - num_equal))


def _counted(pieces: Iterable[list[Halves]]) -> list[Counts]:
    """Return how often each half of the bits occurs in each of several tensors."""
    counts: list[Counts] = []
    for each in pieces:
        of_piece = [np.bincount(half_N, minlength=1 << HALF) for half_N in each]
        counts = [np.add(one, two, out=one) for one, two in zip(counts, of_piece, strict=True)] if counts else of_piece
    return counts


def _lower(bits_N: Halves, upper: int) -> Halves:
    """Return the lower halves of the bits that have this upper half."""
    return bits_N[bits_N >> HALF == upper] & ((1 << HALF) - 1)


def magnitude_bits(values_N: Values) -> Halves:
    """Return the bits of the values' magnitudes in fp32."""
    return cast(Halves, np.abs(values_N.astype(np.float32, copy=False)).view(np.int32))


def _kth(counts: Counts, number: int) -> tuple[int, int]:
    """Return the largest index that has at least `number` counts at or above it, and how many lie above it."""
    at_or_above = np.cumsum(counts[::-1])
    position = int(np.searchsorted(at_or_above, number))
    return len(counts) - 1 - position, int(at_or_above[position - 1]) if position else 0


def ties(base_N: Values, moves_N: Sequence[Values], weights: Sequence[float], is_mean: bool, scale: float = 1.0) -> Values:
    """Return the base plus those moves that have the sign of all moves' weighted sum. moves_N: what is kept of them, else 0; overwritten.

    is_mean: the weighted mean of those moves at each place, not their sum.
    Source: TIES-merging, arXiv 2306.01708; mergekit 0.1.5, merge_methods/generalized_task_arithmetic.py.
    """
    for move_N, weight in zip(moves_N, weights, strict=True):
        move_N *= weight
    is_up_N = sum(moves_N[1:], start=moves_N[0]) >= 0
    merged_N, total_N = np.zeros_like(base_N), np.zeros_like(base_N)
    for move_N, weight in zip(moves_N, weights, strict=True):
        agrees_N = np.where(is_up_N, move_N > 0, move_N < 0)
        merged_N += move_N * agrees_N
        total_N += np.multiply(agrees_N, weight, dtype=base_N.dtype)
    if is_mean:
        total_N[total_N == 0] = 1.0
        merged_N /= total_N
    if scale != 1.0:
        merged_N *= scale
    return base_N + merged_N


def combiner(config: MergeConfig, values: Pieces, size: int) -> Combine:
    """Return what makes a piece of a merged tensor of the same piece of each parent, the base first where there is one.

    values: the tensor's pieces, from its start each time it is called. size: the tensor's values.
    """
    weights = [model.weight for model in config.models if model.weight is not None]
    total = sum(weights)
    divisor = total if config.normalize and abs(total) >= NO_SUM else 1.0
    match config.method:
        case "linear":
            return lambda parts_N: linear(parts_N, weights, divisor)
        case "slerp":
            angle = Angle()
            for first_N, second_N in values():
                angle = angle.add(first_N, second_N)
            between = angle.weights(config.t or 0.0)
            return lambda parts_N: linear(parts_N, between)
        case "task_arithmetic":
            return lambda parts_N: task_arithmetic(parts_N[0], parts_N[1:], weights, divisor, config.scale)
        case "ties":
            return _ties(config, weights, values, size)


def _ties(config: MergeConfig, weights: Sequence[float], values: Pieces, size: int) -> Combine:
    """Return what merges a tensor's pieces, one after the other from its start: of equal magnitudes the first are kept."""
    least: list[Least] = []
    if config.density is not None and config.density < 1.0 and size:
        least = least_kept(
            lambda: ([part_N - base_N for part_N in parts_N] for base_N, *parts_N in values()), max(1, int(config.density * size))
        )

    def combine(parts_N: list[Values]) -> Values:
        base_N, moves_N = parts_N[0], [part_N - parts_N[0] for part_N in parts_N[1:]]
        for index, move_N in enumerate(moves_N if least else ()):
            is_kept_N, least[index] = largest(move_N, least[index])
            move_N *= is_kept_N
        return ties(base_N, moves_N, weights, config.normalize is not False, config.scale)

    return combine
