"""CKA against plain numpy in fp64, and its nulls: what independent representations and one large direction give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prism.analysis import cka


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def aligned(x: torch.Tensor, y: torch.Tensor, num_permutations: int = 20, subsample: int | None = None) -> cka.Alignment:
    return cka.align(cka.side(x, (1,)), cka.side(y, (1,)), cka.draws(0, len(x), num_permutations, subsample=subsample))


def numpys(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The same two figures from the features, as the definitions have them."""
    x, y = x - x.mean(0), y - y.mean(0)
    biased = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n, ones = len(k), np.ones(len(k))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        return float(np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / (n - 1) / (n - 2) - 2 / (n - 2) * ones @ k @ m @ ones)

    k, m = x @ x.T, y @ y.T
    return {"biased": float(biased), "debiased": hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))}


def test_both_forms_are_numpys() -> None:
    x = gaussian(60, 33, seed=1) + 5
    y = x @ gaussian(33, 21, seed=2) + 2 * gaussian(60, 21, seed=3)
    result = aligned(x, y)
    assert result.value == pytest.approx(numpys(x.double().numpy(), y.double().numpy()), rel=1e-6)
    turned = aligned(x, 3 * x @ torch.linalg.qr(gaussian(33, 33, seed=4))[0] + 1).value
    assert turned == pytest.approx({"biased": 1, "debiased": 1})  # neither turns, scale nor shift count
    assert aligned(x, y.flip(0)).value["debiased"] < 0.5 * result.value["debiased"]  # rows are matched


def test_the_draws_are_what_the_features_in_another_order_or_fewer_give() -> None:
    x = gaussian(30, 17, seed=1) + 3
    y = x @ gaussian(17, 19, seed=2) + gaussian(30, 19, seed=3)
    drawn = cka.draws(0, 30, 5, 4, 12)
    result = aligned_with(x, y, drawn)
    for number, order in enumerate(drawn.orders_PN):
        expected = numpys(x.double().numpy(), y[order].double().numpy())
        assert {form: result.permuted[form][number] for form in expected} == pytest.approx(expected, abs=1e-9)
    for number, subset in enumerate(drawn.subsets_RM):
        assert len(set(subset.tolist())) == 12  # without replacement
        expected = numpys(x[subset].double().numpy(), y[subset].double().numpy())
        assert {form: result.subsampled[form][number] for form in expected} == pytest.approx(expected, abs=1e-9)


def aligned_with(x: torch.Tensor, y: torch.Tensor, drawn: cka.Draws) -> cka.Alignment:
    return cka.align(cka.side(x, (1,)), cka.side(y, (1,)), drawn)


def test_independent_gaussians_look_alike_to_the_biased_form_alone() -> None:
    result = aligned(gaussian(200, 4096, seed=5), gaussian(200, 4096, seed=6))
    figures: dict[str, Any] = result.figures()
    assert figures["biased"] == pytest.approx(0.95, abs=0.01) and abs(figures["debiased"]) < 0.03
    assert figures["permutation_null_biased"]["mean"] == pytest.approx(figures["biased"], abs=0.01)
    assert abs(figures["permutation_null_debiased"]["mean"]) < 0.03
    assert figures["subsampled_biased"]["mean"] == pytest.approx(0.976, abs=0.01)  # fewer prompts look more alike
    assert abs(figures["subsampled_debiased"]["mean"]) < 0.05
    null = cka.gaussian_null(7, 200, 4096, 4096)
    assert null["biased"] == pytest.approx(0.95, abs=0.01) and abs(null["debiased"]) < 0.03


def test_drawing_with_replacement_would_lift_the_debiased_form_again() -> None:
    again = torch.randint(200, (100,), generator=torch.Generator().manual_seed(1))
    x, y = gaussian(200, 4096, seed=5)[again], gaussian(200, 4096, seed=6)[again]
    assert aligned(x, y).value["debiased"] > 0.5  # a prompt meets itself: why subsamples are without replacement


def test_one_large_direction_lifts_both_forms_and_goes_with_it() -> None:
    one = gaussian(200, 1, seed=7)
    x, y = (gaussian(200, 512, seed=seed) + 200 * one @ gaussian(1, 512, seed=seed + 10) for seed in (8, 9))
    result = aligned(x, y)
    assert result.value["biased"] > 0.99 and result.value["debiased"] > 0.99
    assert result.ablated[1]["biased"] < 0.8 and abs(result.ablated[1]["debiased"]) < 0.05
    assert max(result.permuted["debiased"]) < 0.2


def test_the_least_layer_is_found_and_its_spread_is_of_each_subsamples_least() -> None:
    x = gaussian(40, 64, seed=1)
    layers = [aligned(x, x + noise * gaussian(40, 64, seed=2)) for noise in (0.1, 2.0, 0.5)]
    figures = cka.together(layers)
    for form in cka.FORMS:
        assert figures[f"min_{form}_layer"] == 1 and figures[f"min_{form}"] == layers[1].value[form]
        assert figures[f"min_{form}_ablated"]["1"] == layers[1].ablated[1][form]
        assert figures[f"min_{form}_permutation_null"] == cka.summary(layers[1].permuted[form])
        least = np.min([layer.subsampled[form] for layer in layers], axis=0)
        assert figures[f"min_{form}_subsampled"] == pytest.approx(cka.summary(least.tolist()))
    tops = [replace(layer, ablated={1: dict.fromkeys(cka.FORMS, top)}) for layer, top in zip(layers, (0.3, 0.9, 0.6), strict=True)]
    assert cka.together(tops)["min_biased_ablated"] == {"1": 0.3}, "the least of the ablated figures, which may be another layer's"
    swapped = cka.together(layers[::-1][1:])
    assert swapped["min_biased_layer"] == 0  # a permutation of layers is seen


def test_what_does_not_vary_is_aligned_with_nothing() -> None:
    assert aligned(torch.ones(10, 4), gaussian(10, 4, seed=1)).value["biased"] == 0
