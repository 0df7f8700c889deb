"""Models between three models: the points of a landscape, and each tensor of a point.

W(a, b) = base + a (mid - base) + b (rl - mid) (paper, Equation 3). The path goes from base (0, 0) over mid (1, 0) to rl (1, 1). The paper does
not say where its plane lies; its picture is centred at mid, with one axis toward rl and one toward base, so a is 1 less the way to base.
Sums are in fp32, each tensor whole, so that a point is the same on any layout; where a point is one of the three, it has that model's own bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from megatron_prism.analysis.stream import Matched, match
from megatron_prism.checkpoint.at_rest import Opened
from megatron_prism.hf import bits

MODELS = ("base", "mid", "rl")
PLANE = (-0.3, 1.3)  # from mid (0) toward rl and toward base (1): read from the paper's picture
UPPER, HALF = 16, 1 << 16  # the bits of an fp32 that one histogram counts by, and their values


@dataclass(frozen=True)
class Point:
    """A model of the landscape. keep: mid with this share of rl - mid, its largest entries. draw: mid with that Gaussian update."""

    name: str
    kind: Literal["path", "plane", "keep_largest", "null"]
    a: float = 1.0
    b: float = 0.0
    keep: float | None = None
    draw: int | None = None

    @property
    def weights(self) -> dict[str, float]:
        """The models that it is a sum of, with their weights."""
        given = dict(zip(MODELS, (1 - self.a, self.a - self.b, self.b), strict=True))
        return {name: weight for name, weight in given.items() if weight != 0}

    @property
    def model(self) -> str | None:
        """Which of the three models it is; None where it is none."""
        (name, *others) = self.weights
        return name if self.kind == "path" and not others else None


def points(num_steps_to_mid: int, num_steps_to_rl: int, plane_size: int, keep_largest: Sequence[float], num_nulls: int) -> list[Point]:
    """Return the points of a landscape, the path first and in its order."""
    to_mid = [Point(f"to_mid_{step}_of_{num_steps_to_mid}", "path", a=step / num_steps_to_mid) for step in range(1, num_steps_to_mid)]
    to_rl = [Point(f"to_rl_{step}_of_{num_steps_to_rl}", "path", b=step / num_steps_to_rl) for step in range(1, num_steps_to_rl)]
    path = [Point("base", "path", a=0.0), *to_mid, Point("mid", "path"), *to_rl, Point("rl", "path", b=1.0)]
    ways = [float(way) for way in np.linspace(*PLANE, plane_size)]
    plane = [
        Point(f"plane_{to_base:.4f}_{toward_rl:.4f}", "plane", a=1 - to_base, b=toward_rl)  # the same point of a finer plane has its name
        for to_base in ways
        for toward_rl in ways
    ]
    kept = [Point(f"keep_{share:g}", "keep_largest", b=1.0, keep=share) for share in keep_largest]
    return [*path, *plane, *kept, *(Point(f"null_{draw}", "null", draw=draw) for draw in range(num_nulls))]


def tensor(point: Point, models: Mapping[str, Opened], key: str, thresholds: Mapping[float, float], seed: int) -> torch.Tensor:
    """Return a point's tensor, whole, by Megatron-Core's name. thresholds: by share, as largest() gives them. seed: of the draws.

    Memory: the tensor of each model that the point is a sum of, in fp32. Raises: CheckpointError for a NaN or an inf in one of them.
    """
    if point.keep is not None:
        mid, rl = models["mid"].mcore(key), models["rl"].mcore(key)
        return torch.where((rl.float() - mid.float()).abs() >= thresholds[point.keep], rl, mid)
    if point.draw is not None:
        mid, rl = models["mid"].mcore(key).float(), models["rl"].mcore(key).float()
        return mid + gaussian(rl - mid, f"{seed + point.draw} {key}")
    if point.model is not None:
        return models[point.model].mcore(key)
    (first, weight), *others = point.weights.items()
    total = models[first].mcore(key).float() * weight
    for name, weight in others:
        total.add_(models[name].mcore(key).float(), alpha=weight)
    return total


def gaussian(update: torch.Tensor, name: str) -> torch.Tensor:
    """Return Gaussian noise that has an update's norm. name: what it is drawn for; the same name gives the same noise."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")  # torch heeds no higher bits of a seed
    noise = torch.randn(update.shape, generator=torch.Generator().manual_seed(seed))
    return noise * (float(update.norm(dtype=torch.float64)) / float(noise.norm(dtype=torch.float64)))


def largest(mid: Opened, rl: Opened, shares: Sequence[float]) -> dict[float, float]:
    """Return, by share, the value that this share of all entries of |rl - mid| reaches or exceeds, exactly: of fp32, all tensors together.

    Both models are read twice: a histogram of the upper half of the bits, then one of the lower half where the value lies. Without shares: not at all.
    """
    if not shares:
        return {}
    tensors = match([mid, rl])
    upper = np.zeros(HALF, np.int64)
    for bits_N in _changes(tensors):
        upper += np.bincount(bits_N >> UPPER, minlength=HALF)
    above = np.concatenate([np.cumsum(upper[::-1])[::-1], [0]])  # the entries at or above each bin
    ranks = {share: max(1, round(share * int(above[0]))) for share in shares}
    bins = {share: int(np.nonzero(above >= rank)[0][-1]) for share, rank in ranks.items()}
    lower = {bin: np.zeros(HALF, np.int64) for bin in set(bins.values())}
    for bits_N in _changes(tensors):
        for bin, counts in lower.items():
            counts += np.bincount(bits_N[bits_N >> UPPER == bin] & (HALF - 1), minlength=HALF)
    values = {}
    for share, bin in bins.items():
        within = np.cumsum(lower[bin][::-1])[::-1] + above[bin + 1]
        whole = bin << UPPER | int(np.nonzero(within >= ranks[share])[0][-1])
        values[share] = float(np.array(whole, np.uint32).view(np.float32))
    return values


def _changes(tensors: Sequence[Matched]) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    """Yield |rl - mid| of every piece of every tensor, as the bits of fp32, which have the order of the values."""
    for tensor in tensors:
        with tensor.open() as read:
            for first, count in bits.spans(0, tensor.shape[0], tensor.row_bytes):
                mid_N, rl_N = read(first, count)
                yield (rl_N.float() - mid_N.float()).abs().numpy().view(np.int32)
