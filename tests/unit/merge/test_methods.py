"""The four methods against closed forms and worked examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prism.core.config import MergeConfig, MergeModelConfig
from megatron_prism.merge import methods
from megatron_prism.merge.methods import Angle, Least
from megatron_prism.merge.values import Values


def config(method: str, weights: tuple[float | None, ...] = (), **keys: object) -> MergeConfig:
    models = tuple(MergeModelConfig(path=Path(str(index)), weight=weight) for index, weight in enumerate(weights))
    return MergeConfig(out=Path("out"), models=models, method=method, **keys)  # type: ignore[arg-type]


def merged(settings: MergeConfig, *tensors: torch.Tensor, pieces: int = 3) -> torch.Tensor:
    """Merge whole tensors in so many pieces, as a folder is merged."""

    def values() -> Iterator[list[Values]]:
        yield from (
            [part.numpy().copy() for part in parts] for parts in zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True)
        )

    combine = methods.combiner(settings, values, tensors[0].numel())
    return torch.from_numpy(np.concatenate([combine(parts) for parts in values()]))


def drawn(count: int, size: int = 1000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def test_what_is_left_where_a_sum_cancels_is_no_rounding_of_a_product() -> None:
    """As of a fused product and sum, which mergekit uses. The control: a product that is rounded before it is added."""
    second = np.arange(3, 128, 3).astype(np.float32)
    first = -second / 3 * 17  # 0.15 first + 0.85 second is almost 0
    small, large = np.float32(0.15), np.float32(0.85)
    wanted = ((first * small).astype(np.float64) + second.astype(np.float64) * np.float64(large)).astype(np.float32)
    found = methods.linear([first.copy(), second.copy()], (0.15, 0.85))
    assert np.array_equal(found, wanted) and not np.array_equal(first * small + second * large, wanted)
    assert not np.signbit(methods.linear([-np.zeros(1, np.float32), np.zeros(1, np.float32)], (0.25, 0.75)))[0]
    assert np.signbit(methods.linear([-np.zeros(1, np.float32), -np.zeros(1, np.float32)], (0.25, 0.75)))[0]
    assert np.signbit(methods.linear([-np.zeros(1, np.float32), np.ones(1, np.float32)], (1.0, 0.0)))[0]  # a part of weight 0 adds no 0


def test_linear_and_what_normalize_changes() -> None:
    one, two = drawn(2)
    torch.testing.assert_close(merged(config("linear", (0.15, 0.85)), one, two), 0.15 * one + 0.85 * two)
    torch.testing.assert_close(merged(config("linear", (1.0, 3.0), normalize=True), one, two), 0.25 * one + 0.75 * two)
    torch.testing.assert_close(merged(config("linear", (1.0, 3.0), any_sum=True), one, two), one + 3 * two)


def test_slerp_goes_along_the_sphere() -> None:
    """Of perpendicular tensors of length 1, a third of the way: cos 30, sin 30. A straight line would be shorter than 1."""
    one, two = torch.zeros(1000), torch.zeros(1000)
    one[1], two[999] = 1.0, 1.0
    found = merged(config("slerp", (None, None), t=1 / 3), one, two)
    assert float(found[1]) == pytest.approx(math.cos(math.pi / 6)) and float(found[999]) == pytest.approx(0.5)
    assert float(found.norm()) == pytest.approx(1.0) and float((2 / 3 * one + 1 / 3 * two).norm()) < 0.75
    one, two = drawn(2)
    torch.testing.assert_close(merged(config("slerp", (None, None), t=0.0), one, two), one)
    torch.testing.assert_close(merged(config("slerp", (None, None), t=1.0), one, two), two)


def test_slerp_of_what_is_parallel_opposite_or_zero() -> None:
    (one,) = drawn(1)
    half = config("slerp", (None, None), t=0.5)
    torch.testing.assert_close(merged(half, one, 3 * one), 2 * one)
    torch.testing.assert_close(merged(half, one, -one), 0 * one)
    torch.testing.assert_close(merged(half, 0 * one, 0 * one), 0 * one)
    assert Angle(0.0, 4.0, 0.0).weights(0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))


def test_slerp_is_a_line_where_the_cosine_is_above_9995_and_an_arc_below() -> None:
    angle = math.acos(0.999)
    arc = tuple(math.sin(part * angle) / math.sin(angle) for part in (0.75, 0.25))
    assert Angle(1.0, 1.0, 0.9996).weights(0.25) == (0.75, 0.25)
    assert Angle(1.0, 1.0, 0.999).weights(0.25) == pytest.approx(arc, rel=1e-12) and arc != pytest.approx((0.75, 0.25), rel=1e-6)
    tiny = Angle(1e-18, 1.0, 1e-9).weights(0.5)  # parallel, but one is no longer than rounding
    assert tiny == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))


def test_weights_whose_sum_is_0_are_not_divided_by_it() -> None:
    base, one, two = drawn(3)
    found = merged(config("task_arithmetic", (0.3, -0.3), base_model=Path("b"), normalize=True), base, one, two)
    torch.testing.assert_close(found, base + 0.3 * (one - two))


def test_ties_elects_up_where_the_sum_is_0_and_keeps_whole_numbers_of_values() -> None:
    """Of 5 values a density of 0.75 keeps 3, and one of 0.1 keeps 1."""
    base = torch.zeros(5)
    up, down = torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor([-1.0, 0, 0, 0, 0])
    torch.testing.assert_close(merged(config("ties", (1.0, 1.0), base_model=Path("b")), base, up, down, pieces=1), up)
    moved = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    for density, kept in ((0.75, [0, 0, 3.0, 4.0, 5.0]), (0.1, [0, 0, 0, 0, 5.0])):
        found = merged(config("ties", (1.0,), base_model=Path("b"), density=density), base, moved, pieces=1)
        torch.testing.assert_close(found, torch.tensor(kept))


def test_the_angle_is_of_the_whole_tensor_not_of_a_piece() -> None:
    one, two = drawn(2)
    half = config("slerp", (None, None), t=0.5)
    torch.testing.assert_close(merged(half, one, two, pieces=7), merged(half, one, two, pieces=1))
    alone = torch.cat([merged(half, a, b, pieces=1) for a, b in zip(one.tensor_split(7), two.tensor_split(7), strict=True)])
    assert not torch.allclose(alone, merged(half, one, two))


def test_task_arithmetic_adds_what_each_model_moved() -> None:
    base, one, two = drawn(3)
    found = merged(config("task_arithmetic", (0.5, -0.25), base_model=Path("b")), base, one, two)
    torch.testing.assert_close(found, base + 0.5 * (one - base) - 0.25 * (two - base))
    scaled = merged(config("task_arithmetic", (1.0, 3.0), base_model=Path("b"), normalize=True, scale=2.0), base, one, two)
    torch.testing.assert_close(scaled, base + 2 * (0.25 * (one - base) + 0.75 * (two - base)))


def test_ties_worked_by_hand() -> None:
    """The base is 1 everywhere. Of six moves each model keeps its three largest; the sign is that of the weighted sum."""
    base = torch.ones(6)
    first = torch.tensor([4.0, -3.0, 0.1, 2.0, 0.0, 0.2])
    second = torch.tensor([-1.0, -2.0, 0.5, 0.1, 3.0, 0.4])
    kept_first, kept_second = torch.tensor([4.0, -3.0, 0, 2.0, 0, 0]), torch.tensor([-1.0, -2.0, 0, 0, 3.0, 0])
    assert methods.least_kept(lambda: [[first.numpy(), second.numpy()]], 3) == [Least(2.0, 1), Least(1.0, 1)]
    settings = config("ties", (0.5, 1.0), base_model=Path("b"), density=0.5)
    # 0: 2 and -1 -> up, the first alone; 1: -1.5 and -2 -> down, both: -3.5 / 1.5; 3: the first alone; 4: the second alone
    wanted = base + torch.tensor([4.0, -3.5 / 1.5, 0.0, 2.0, 3.0, 0.0])
    torch.testing.assert_close(merged(settings, base, base + first, base + second, pieces=2), wanted)
    summed = config("ties", (0.5, 1.0), base_model=Path("b"), density=0.5, normalize=False, scale=2.0)
    wanted = base + 2 * torch.tensor([2.0, -3.5, 0.0, 1.0, 3.0, 0.0])
    torch.testing.assert_close(merged(summed, base, base + first, base + second, pieces=2), wanted)
    plain = base + (0.5 * kept_first + kept_second) / 1.5  # without the election of a sign
    assert not torch.allclose(merged(settings, base, base + first, base + second, pieces=2), plain)


@pytest.mark.parametrize("num_kept", [2, 199, 500, 990])
def test_the_largest_magnitudes_are_those_of_a_sort(num_kept: int) -> None:
    """Of equal magnitudes the first are kept. The control: those that a sort from the other end keeps."""
    (values,) = drawn(1)
    values = (values * 4).round() / 4  # many are equal, some are -0.0
    (least, doubled) = methods.least_kept(lambda: ([piece.numpy(), 2 * piece.numpy()] for piece in values.tensor_split(7)), num_kept)
    assert (2 * least.value, least.num_equal) == (doubled.value, doubled.num_equal)
    marks = []
    for piece in values.tensor_split(7):
        mark, least = methods.largest(piece.numpy(), least)
        marks.append(mark)
    wanted, last = torch.zeros(1000, dtype=torch.bool), torch.zeros(1000, dtype=torch.bool)
    wanted[values.abs().argsort(descending=True, stable=True)[:num_kept]] = True
    last[values.abs().argsort(stable=True)[1000 - num_kept :]] = True
    assert np.array_equal(np.concatenate(marks), wanted.numpy())
    assert not torch.equal(wanted, last)
