"""How much weights changed, and what a dense update of the same size would have changed. Streamed: tallies of pieces are added up.

delta (paper, Equation 1): ||new - old|| / ||old||, of Frobenius norms. The paper does not say how matrices are put together, so a component has
`delta` of all its entries as one vector, and `delta_mean` of its tensors' deltas.

changed (paper, Tables 12, 22, 23): the share of entries with |new - old| > t |old|. An entry that was 0 has changed if it is not 0 any more. The share
follows from the update's norm alone where the update is dense, so three nulls stand beside it, of updates with this one's norm in each tensor:
`changed_dense_null` is Gaussian, `changed_dense_null_stored` is that rounded to the stored dtype as this update was, `changed_shuffled_null` has
this update's own entries in another order. Less than the nulls is sparse. Spacing of bfloat16 is 0.4 to 0.8 % of a value: below a threshold
of that size a stored update is mostly rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch

THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)  # paper, Table 22
ROW = 256  # entries whose squares are added in their own dtype
SMALLEST_SQUARE = 1e-24  # of a piece: below it, entries whose squares fp32 rounds to 0 would count
SAMPLE = 1 << 16  # entries of a tensor that its nulls are computed on


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over entries of a tensor before (old) and after (new). sample_old_N, sample_delta_N: the entries that the nulls are computed on.

    num_changed: by threshold. squares are of fp64.
    """

    num: int
    num_zero: int
    num_different: int
    square_old: float
    square_delta: float
    num_changed: tuple[int, ...]
    sample_old_N: torch.Tensor
    sample_delta_N: torch.Tensor

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.num + other.num,
            self.num_zero + other.num_zero,
            self.num_different + other.num_different,
            self.square_old + other.square_old,
            self.square_delta + other.square_delta,
            tuple(map(add, self.num_changed, other.num_changed)),
            torch.cat([self.sample_old_N, other.sample_old_N]),
            torch.cat([self.sample_delta_N, other.sample_delta_N]),
        )


def tally(old_N: torch.Tensor, new_N: torch.Tensor, first: int = 0, stride: int = 1) -> Tally:
    """Return the tally of a piece. first: its first entry's index within its tensor; each entry whose index stride divides is in the sample.

    numpy counts several times as fast as torch on a CPU, and has no bfloat16.
    """
    wide = torch.float64 if old_N.dtype == torch.float64 else torch.float32
    before_N, delta_N = old_N.to(wide).numpy(), (new_N.to(wide) - old_N.to(wide)).numpy()
    sampled = slice(-first % stride, None, stride)
    samples = [torch.from_numpy(values[sampled].copy()) for values in (before_N, delta_N)]
    num_different = int(np.count_nonzero(delta_N != 0))
    counts = [0] * len(THRESHOLDS)
    if num_different:
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN, which is above nothing
            ratio_N = np.abs(delta_N) / np.abs(before_N)
        counts = [int(np.count_nonzero(ratio_N > threshold)) for threshold in THRESHOLDS]
    num_zero = int(np.count_nonzero(before_N == 0))
    return Tally(old_N.numel(), num_zero, num_different, _square(before_N), _square(delta_N), tuple(counts), *samples)


def _square(values_N: np.ndarray[Any, Any]) -> float:
    """Return the sum of squares: of short rows in their own dtype, and of the rows in fp64. All in fp64 where the dtype may not hold the squares."""
    even = values_N.size - values_N.size % ROW
    rows_BR, rest_N = values_N[:even].reshape(-1, ROW), values_N[even:].astype(np.float64)
    with np.errstate(over="ignore"):
        total = float(np.einsum("br,br->b", rows_BR, rows_BR).astype(np.float64).sum() + rest_N @ rest_N)
    if SMALLEST_SQUARE < total < math.inf:
        return total
    wide_N = values_N.astype(np.float64)
    return float(wide_N @ wide_N)


def stride_of(num: int, row: int) -> int:
    """Return the stride that takes about SAMPLE of a tensor's entries, and from row to row other columns."""
    stride = max(1, num // SAMPLE)
    while math.gcd(stride, max(row, 1)) > 1:
        stride += 1
    return stride


@dataclass(frozen=True, eq=False)
class Change:
    """What became of a tensor, or of the tensors of a component. Shares are by threshold."""

    num_tensors: int
    num: int
    square_old: float
    square_delta: float
    delta_mean: float
    zero: float
    different: float
    changed: tuple[float, ...]
    dense_null: tuple[float, ...]
    dense_null_stored: tuple[float, ...]
    shuffled_null: tuple[float, ...]

    @property
    def delta(self) -> float:
        """The relative change of all entries as one vector; 0 / 0 is 0, and what was 0 alone has changed by inf."""
        return _relative(self.square_delta, self.square_old)

    def figures(self) -> dict[str, Any]:
        """Return the change as plain values, shares keyed by their threshold. A change relative to zeros is None: JSON has no inf."""
        shares = {
            "changed": self.changed,
            "changed_dense_null": self.dense_null,
            "changed_dense_null_stored": self.dense_null_stored,
            "changed_shuffled_null": self.shuffled_null,
        }
        return {
            "parameters": self.num,
            "delta": self.delta if math.isfinite(self.delta) else None,
            "delta_mean_of_tensors": self.delta_mean if math.isfinite(self.delta_mean) else None,
            "norm_old": math.sqrt(self.square_old),
            "norm_delta": math.sqrt(self.square_delta),
            "share_zero_before": self.zero,
            "share_different": self.different,
            **{name: {str(key): share for key, share in zip(THRESHOLDS, values, strict=True)} for name, values in shares.items()},
        }


def change_of(tallied: Tally, dtype: torch.dtype, seed: int) -> Change:
    """Return the change of one tensor. dtype: as it is stored. seed: of the nulls that are drawn."""
    old_N, delta_N = tallied.sample_old_N.double(), tallied.sample_delta_N.double()
    scale = math.sqrt(tallied.square_delta / tallied.num) if tallied.num else 0.0
    generator = torch.Generator().manual_seed(seed)
    drawn_N = scale * torch.randn(old_N.shape, dtype=torch.float64, generator=generator)
    stored_N = (old_N + drawn_N).to(dtype).double() - old_N
    shuffled_N = delta_N[torch.randperm(delta_N.numel(), generator=generator)]
    return Change(
        num_tensors=1,
        num=tallied.num,
        square_old=tallied.square_old,
        square_delta=tallied.square_delta,
        delta_mean=_relative(tallied.square_delta, tallied.square_old),
        zero=tallied.num_zero / max(tallied.num, 1),
        different=tallied.num_different / max(tallied.num, 1),
        changed=tuple(count / max(tallied.num, 1) for count in tallied.num_changed),
        dense_null=_gaussian(old_N, scale),
        dense_null_stored=_shares(stored_N, old_N),
        shuffled_null=_shares(shuffled_N, old_N),
    )


def _gaussian(old_N: torch.Tensor, scale: float) -> tuple[float, ...]:
    """Return the expected shares of a Gaussian update: P(|scale z| > t |w|) = erfc(t |w| / (scale sqrt 2)), in the mean over entries."""
    if scale == 0:
        return (0.0,) * len(THRESHOLDS)
    return tuple(float(torch.erfc(threshold * old_N.abs() / (scale * math.sqrt(2))).mean()) for threshold in THRESHOLDS)


def _shares(delta_N: torch.Tensor, old_N: torch.Tensor) -> tuple[float, ...]:
    return tuple(float((delta_N.abs() > threshold * old_N.abs()).double().mean()) for threshold in THRESHOLDS)


def together(changes: Sequence[Change]) -> Change:
    """Return the change of several tensors. Each entry counts once, in norms and shares; delta_mean is the mean of the tensors' deltas."""
    num, num_tensors = sum(one.num for one in changes), sum(one.num_tensors for one in changes)

    def pooled(values: Iterable[float]) -> float:
        return sum(one.num * value for one, value in zip(changes, values, strict=True)) / max(num, 1)

    def by_threshold(shares: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(pooled(column) for column in zip(*shares, strict=True))

    return Change(
        num_tensors=num_tensors,
        num=num,
        square_old=sum(one.square_old for one in changes),
        square_delta=sum(one.square_delta for one in changes),
        delta_mean=sum(one.num_tensors * one.delta_mean for one in changes) / max(num_tensors, 1),
        zero=pooled(one.zero for one in changes),
        different=pooled(one.different for one in changes),
        changed=by_threshold(one.changed for one in changes),
        dense_null=by_threshold(one.dense_null for one in changes),
        dense_null_stored=by_threshold(one.dense_null_stored for one in changes),
        shuffled_null=by_threshold(one.shuffled_null for one in changes),
    )


def _relative(square_delta: float, square_old: float) -> float:
    return math.sqrt(square_delta / square_old) if square_old else (math.inf if square_delta else 0.0)


def added(tallies: Iterable[Tally]) -> Tally:
    """Return the tally of a whole tensor from those of its pieces, in order."""
    return reduce(add, tallies)


@dataclass(frozen=True)
class Cosine:
    """Two updates of the same weights. null_std: of the cosine of two independent dense updates of as many entries, 1 / sqrt(N)."""

    dot: float
    square_one: float
    square_other: float
    num: int

    def __add__(self, other: Cosine) -> Cosine:
        return Cosine(
            self.dot + other.dot, self.square_one + other.square_one, self.square_other + other.square_other, self.num + other.num
        )

    def figures(self) -> dict[str, float | None]:
        """Return the cosine (paper, Equation 2) and its null. None where an update is none."""
        norms = math.sqrt(self.square_one) * math.sqrt(self.square_other)
        return {"cosine": self.dot / norms if norms else None, "cosine_null_std": 1 / math.sqrt(max(self.num, 1))}


def cosine(old_N: torch.Tensor, one_N: torch.Tensor, other_N: torch.Tensor) -> Cosine:
    """Return the sums for the cosine of two updates of a piece, one - old and other - old."""
    old_N, one_N, other_N = old_N.double(), one_N.double(), other_N.double()
    one_N, other_N = one_N - old_N, other_N - old_N
    return Cosine(float(one_N @ other_N), float(one_N @ one_N), float(other_N @ other_N), old_N.numel())
