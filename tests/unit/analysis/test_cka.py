"""CKA against plain numpy in fp64, and its nulls: what independent representations and one large direction give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prism.analysis import cka


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numpys(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The same two figures from the features, as the definitions have them."""
    x, y = x - x.mean(0), y - y.mean(0)
    biased = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n, ones = len(k), np.ones(len(k))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        return float(np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / (n - 1) / (n - 2) - 2 / (n - 2) * ones @ k @ m @ ones)

    k, m = x @ x.T, y @ y.T
    return float(biased), hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_both_forms_are_numpys() -> None:
    x = gaussian(60, 33, seed=1) + 5
    y = x @ gaussian(33, 21, seed=2) + 2 * gaussian(60, 21, seed=3)
    found = cka.align(x, y, seed=0)
    assert (found.biased, found.debiased) == pytest.approx(numpys(x.double().numpy(), y.double().numpy()), rel=1e-6)
    turned = cka.align(x, 3 * x @ torch.linalg.qr(gaussian(33, 33, seed=4))[0] + 1, seed=0)
    assert turned.biased == pytest.approx(1) and turned.debiased == pytest.approx(1)  # neither turns, scale nor shift count
    assert cka.align(x, y.flip(0), seed=0).debiased < 0.5 * found.debiased  # rows are matched


def test_independent_gaussians_look_alike_to_the_biased_form_alone() -> None:
    found = cka.align(gaussian(200, 4096, seed=5), gaussian(200, 4096, seed=6), seed=0, num_permutations=20)
    assert found.biased == pytest.approx(0.95, abs=0.01) and abs(found.debiased) < 0.03
    assert found.null_biased_mean == pytest.approx(found.biased, abs=0.01) and abs(found.null_debiased_mean) < 0.03
    assert found.interval_biased_mean == pytest.approx(0.976, abs=0.01)  # fewer prompts look more alike
    assert abs(found.interval_debiased_mean) < 0.05


def test_one_large_direction_lifts_both_forms_and_goes_with_it() -> None:
    one = gaussian(200, 1, seed=7)
    x, y = (gaussian(200, 512, seed=seed) + 200 * one @ gaussian(1, 512, seed=seed + 10) for seed in (8, 9))
    found = cka.align(x, y, seed=0, num_permutations=20)
    assert found.biased > 0.99 and found.debiased > 0.99
    assert found.ablated_biased < 0.8 and abs(found.ablated_debiased) < 0.05
    assert found.null_debiased_max < 0.2


def test_what_does_not_vary_is_aligned_with_nothing() -> None:
    assert cka.align(torch.ones(10, 4), gaussian(10, 4, seed=1), seed=0).biased == 0
