"""The four ways to merge, as pure functions on pieces of a tensor in fp32.

N: the values of a piece. What a method needs of a whole tensor is added up over its pieces first: Angle (slerp), threshold (ties).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_prism.core.config import MergeConfig

NO_LENGTH = 1e-8  # a tensor that is no longer is taken for zero (mergekit)
LINE = 0.9995  # the cosine from which two tensors are taken for parallel (mergekit's and the usual constant)
HALF = 16  # the bits of an fp32 that one count distinguishes
NO_SUM = 1e-8  # weights whose sum is nearer to 0 are not divided by it (mergekit)
Combine = Callable[[list[torch.Tensor]], torch.Tensor]
Pieces = Callable[[], Iterable[torch.Tensor]]  # the values of a tensor, from the start, each time it is called


def linear(parts_N: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted sum. Source: Model soups, arXiv 2203.05482."""
    total_N = parts_N[0] * weights[0]
    for part_N, weight in zip(parts_N[1:], weights[1:], strict=True):
        total_N.add_(part_N, alpha=weight)
    return total_N


def task_arithmetic(base_N: torch.Tensor, parts_N: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the base plus the weighted sum of what each part moved. Source: arXiv 2212.04089."""
    return base_N + linear([part_N - base_N for part_N in parts_N], weights)


@dataclass(frozen=True)
class Angle:
    """What slerp needs of two whole tensors: the sums of their squares and of their products."""

    first: float = 0.0
    second: float = 0.0
    product: float = 0.0

    def add(self, first_N: torch.Tensor, second_N: torch.Tensor) -> Angle:
        """Return the sums with one more piece."""
        return Angle(
            self.first + float(first_N.dot(first_N)),
            self.second + float(second_N.dot(second_N)),
            self.product + float(first_N.dot(second_N)),
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


def threshold(moves: Pieces, num_kept: int) -> float:
    """Return the magnitude of the num_kept-th largest value of a tensor, exactly, in two counts of its values and no sorting.

    The bits of a positive fp32 are ordered as its value: the first count finds their upper half, the second the lower one.
    """
    counts = torch.zeros(1 << HALF, dtype=torch.int64)
    for move_N in moves():
        counts += torch.bincount(magnitude_bits(move_N) >> HALF, minlength=1 << HALF)
    upper, num_above = _kth(counts, num_kept)
    counts.zero_()
    for move_N in moves():
        bits_N = magnitude_bits(move_N)
        counts += torch.bincount(bits_N[bits_N >> HALF == upper] & ((1 << HALF) - 1), minlength=1 << HALF)
    lower, _ = _kth(counts, num_kept - num_above)
    return float(torch.tensor((upper << HALF) | lower, dtype=torch.int32).view(torch.float32))


def magnitude_bits(values_N: torch.Tensor) -> torch.Tensor:
    """Return the bits of the values' magnitudes in fp32."""
    return values_N.float().abs().view(torch.int32)


def _kth(counts: torch.Tensor, number: int) -> tuple[int, int]:
    """Return the largest index that has at least `number` counts at or above it, and how many lie above it."""
    at_or_above = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(at_or_above, number))
    return len(counts) - 1 - position, int(at_or_above[position - 1]) if position else 0


def ties(
    base_N: torch.Tensor,
    parts_N: Sequence[torch.Tensor],
    weights: Sequence[float],
    thresholds: Sequence[float],
    is_mean: bool,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return the base plus the moves that are at least their threshold and have the sign of all moves' weighted sum.

    is_mean: the weighted mean of those moves at each place, not their sum. Equal magnitudes at the threshold are all kept.
    Source: TIES-merging, arXiv 2306.01708; mergekit 0.1.5, merge_methods/generalized_task_arithmetic.py.
    """
    moves_N = []
    for part_N, weight, least in zip(parts_N, weights, thresholds, strict=True):
        move_N = part_N - base_N
        moves_N.append(move_N.masked_fill_(move_N.abs() < least, 0.0).mul_(weight))
    is_up_N = sum(moves_N[1:], start=moves_N[0]) >= 0
    merged_N, total_N = torch.zeros_like(base_N), torch.zeros_like(base_N)
    for move_N, weight in zip(moves_N, weights, strict=True):
        agrees_N = torch.where(is_up_N, move_N > 0, move_N < 0)
        merged_N.add_(move_N * agrees_N)
        total_N.add_(agrees_N, alpha=weight)
    if is_mean:
        merged_N.div_(total_N.masked_fill_(total_N == 0, 1.0))
    return base_N + merged_N.mul_(scale)


def combiner(config: MergeConfig, values: Callable[[], Iterator[list[torch.Tensor]]], size: int) -> Combine:
    """Return what makes a piece of a merged tensor of the same piece of each parent, the base first where there is one.

    values: the tensor's pieces, from its start each time it is called. size: the tensor's values.
    """
    weights = [model.weight for model in config.models if model.weight is not None]
    total = sum(weights)
    match config.method:
        case "linear":
            shares = [weight / total for weight in weights] if config.normalize else weights
            return lambda parts_N: linear(parts_N, shares)
        case "slerp":
            angle = Angle()
            for first_N, second_N in values():
                angle = angle.add(first_N, second_N)
            return lambda parts_N: linear(parts_N, angle.weights(config.t or 0.0))
        case "task_arithmetic":
            by = config.scale / (total if config.normalize and abs(total) >= NO_SUM else 1.0)
            return lambda parts_N: task_arithmetic(parts_N[0], parts_N[1:], [weight * by for weight in weights])
        case "ties":
            least = [_least(config, values, 1 + index, size) for index in range(len(weights))]
            is_mean = config.normalize is not False
            return lambda parts_N: ties(parts_N[0], parts_N[1:], weights, least, is_mean, config.scale)


def _least(config: MergeConfig, values: Callable[[], Iterator[list[torch.Tensor]]], index: int, size: int) -> float:
    """Return the least magnitude of a move of one parent that ties keeps."""
    if config.density is None or config.density == 1.0 or not size:
        return 0.0
    return threshold(lambda: (parts_N[index] - parts_N[0] for parts_N in values()), max(1, int(config.density * size)))
