"""Centred kernel alignment of two layers' representations, and what chance, the largest directions and the choice of prompts make of it.

x_NC: a row a prompt, the mean of its tokens' hidden states. All is computed on the Gram matrices K = X X^T, so it costs the square of the number
of prompts, whatever the width. Both forms are the cosine of two centred Gram matrices:
biased, the paper's (its Equation 4, Kornblith et al. 2019, arXiv 1905.00414): K less the means of its rows and columns. Of independent Gaussians at
200 prompts and 4,096 channels it is .95.
debiased (Song et al. 2012, JMLR 13, Equation 5; Nguyen et al. 2020, arXiv 2010.15327): K without its diagonal, U-centred (Szekely and Rizzo 2014,
arXiv 1310.2926). It is near 0 there, and below 0 by chance.
Both are projections, so that <HKH, HLH> = <HKH, L>: a permuted L needs no centring of its own.
Shape legend: N prompts, C channels, P permutations, R subsamples of M prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

MIN_PROMPTS = 8  # of a subsample 4, which the debiased form needs
PIECE = 25  # permuted matrices held at a time


def gram(x_NC: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix in fp64, of columns that are centred: numbers stay small, and no form below depends on it."""
    x_NC = x_NC.double()
    x_NC = x_NC - x_NC.mean(0)
    return x_NC @ x_NC.T


def centred(K_NN: torch.Tensor) -> torch.Tensor:
    """Return HKH of Gram matrices (..., N, N)."""
    return K_NN - K_NN.mean(-1, keepdim=True) - K_NN.mean(-2, keepdim=True) + K_NN.mean((-2, -1), keepdim=True)


def u_centred(K_NN: torch.Tensor) -> torch.Tensor:
    """Return U-centred Gram matrices (..., N, N): no row and no column has a sum, and the diagonal is 0. It needs 4 prompts."""
    size = K_NN.shape[-1]
    diagonal = torch.eye(size, dtype=torch.bool)
    K_NN = K_NN.masked_fill(diagonal, 0.0)
    rows, columns = K_NN.sum(-1, keepdim=True), K_NN.sum(-2, keepdim=True)
    total = rows.sum(-2, keepdim=True)
    return (K_NN - (rows + columns) / (size - 2) + total / ((size - 1) * (size - 2))).masked_fill(diagonal, 0.0)


FORMS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"biased": centred, "debiased": u_centred}


def ablated(K_NN: torch.Tensor, nums: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return, by number, the Gram matrix of the centred representations without so many of their directions of largest variance (massive activations)."""
    values_N, vectors_NN = torch.linalg.eigh(centred(K_NN))
    without = {}
    for num in nums:
        kept_N = values_N.clone()
        kept_N[len(kept_N) - num :] = 0.0
        without[num] = (vectors_NN * kept_N) @ vectors_NN.T
    return without


@dataclass(frozen=True)
class Side:
    """One layer's representations of all prompts, ready to be aligned. forms: the centred Gram matrix by form; of ablated, by number and form."""

    gram_NN: torch.Tensor
    forms: Mapping[str, torch.Tensor]
    ablated: Mapping[int, Mapping[str, torch.Tensor]]


def side(x_NC: torch.Tensor, nums_removed: Sequence[int] = ()) -> Side:
    """Return a layer's representations as a side. nums_removed: how many directions are taken out, each by itself."""
    K_NN = gram(x_NC)
    without = ablated(K_NN, nums_removed) if nums_removed else {}
    return Side(K_NN, _in_forms(K_NN), {num: _in_forms(part_NN) for num, part_NN in without.items()})


def _in_forms(K_NN: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: centre(K_NN) for name, centre in FORMS.items()}


@dataclass(frozen=True)
class Draws:
    """What is drawn once for all layers: the orders of the permutation null (P, N), and the subsamples without replacement (R, M)."""

    orders_PN: torch.Tensor
    subsets_RM: torch.Tensor


def draws(seed: int, num_prompts: int, num_permutations: int = 200, num_subsamples: int = 20, subsample: int | None = None) -> Draws:
    """Return the draws of a seed. subsample: the prompts of one; None: half of them (paper: 100 of 200).

    The paper draws with replacement, and the debiased form of independent Gaussians is then .95 again: a prompt meets itself.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(num_prompts, generator=generator) for _ in range(num_permutations)]
    subsets = [torch.randperm(num_prompts, generator=generator)[: subsample or num_prompts // 2] for _ in range(num_subsamples)]
    return Draws(torch.stack(orders), torch.stack(subsets))


@dataclass(frozen=True)
class Alignment:
    """The alignment of two layers, each figure by form: of all prompts, of each permutation, of each subsample, and without the largest directions."""

    value: Mapping[str, float]
    permuted: Mapping[str, list[float]]
    subsampled: Mapping[str, list[float]]
    ablated: Mapping[int, Mapping[str, float]]

    def figures(self) -> dict[str, Any]:
        """Return the figures of one layer, to be written as JSON."""
        return {
            **self.value,
            **{f"permutation_null_{form}": summary(values) for form, values in self.permuted.items()},
            **{f"subsampled_{form}": summary(values) for form, values in self.subsampled.items()},
            "ablated": {str(num): dict(values) for num, values in self.ablated.items()},
        }


def align(one: Side, other: Side, drawn: Draws) -> Alignment:
    """Return the alignment of two layers on the same prompts, beside its nulls."""
    assert len(one.gram_NN) == len(other.gram_NN) >= MIN_PROMPTS
    without = {num: {form: _cosine(one.ablated[num][form], other.ablated[num][form]) for form in FORMS} for num in one.ablated}
    return Alignment(value(one, other), permuted(one, other, drawn.orders_PN), subsampled(one, other, drawn.subsets_RM), without)


def value(one: Side, other: Side) -> dict[str, float]:
    """Return the alignment of two layers by form."""
    return {form: _cosine(one.forms[form], other.forms[form]) for form in FORMS}


def _cosine(K_NN: torch.Tensor, L_NN: torch.Tensor) -> float:
    """Return <K, L> / (|K| |L|). 0 where a side does not vary."""
    norms = float(K_NN.norm()) * float(L_NN.norm())
    return float((K_NN * L_NN).sum()) / norms if norms > 0 else 0.0


def permuted(one: Side, other: Side, orders_PN: torch.Tensor) -> dict[str, list[float]]:
    """Return each form with the other side's prompts in other orders. Neither norm changes."""
    forms_FE = torch.stack([one.forms[form].flatten() for form in FORMS])
    products = [forms_FE @ _taken(other.gram_NN, part_PN).flatten(1).T for part_PN in orders_PN.split(PIECE)]
    products_FP = torch.cat(products, dim=1)
    norms = [float(one.forms[form].norm()) * float(other.forms[form].norm()) for form in FORMS]
    return {
        form: (products_P / norm).tolist() if norm > 0 else [0.0] * len(products_P)
        for form, products_P, norm in zip(FORMS, products_FP, norms, strict=True)
    }


def subsampled(one: Side, other: Side, subsets_RM: torch.Tensor) -> dict[str, list[float]]:
    K_RMM, L_RMM = _taken(one.gram_NN, subsets_RM), _taken(other.gram_NN, subsets_RM)
    return {form: [_cosine(K_MM, L_MM) for K_MM, L_MM in zip(centre(K_RMM), centre(L_RMM), strict=True)] for form, centre in FORMS.items()}


def _taken(K_NN: torch.Tensor, orders_PM: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrices (P, M, M) of prompts in other orders, or of some of them."""
    return K_NN[orders_PM[:, :, None], orders_PM[:, None, :]]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the mean, the standard deviation and both ends of figures that were drawn."""
    return {"mean": fmean(values), "std": stdev(values), "min": min(values), "max": max(values)}


def together(layers: Sequence[Alignment]) -> dict[str, Any]:
    """Return a model's figures over its layers: the least alignment, its layer, and its spread (the least of each subsample, as the paper's +-)."""
    said: dict[str, Any] = {}
    for form in FORMS:
        values = [layer.value[form] for layer in layers]
        least = values.index(min(values))
        said |= {
            f"min_{form}": values[least],
            f"min_{form}_layer": least,
            f"min_{form}_subsampled": summary([min(parts) for parts in zip(*(layer.subsampled[form] for layer in layers), strict=True)]),
            f"min_{form}_permutation_null": summary(layers[least].permuted[form]),
            f"min_{form}_ablated": {str(num): min(layer.ablated[num][form] for layer in layers) for num in layers[0].ablated},
        }
    return said


def gaussian_null(seed: int, num_prompts: int, size_C: int, size_D: int) -> dict[str, float]:
    """Return both forms of two independent Gaussian matrices of these shapes: what the biased form is of anything wide."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (side(torch.randn(num_prompts, size, generator=generator)) for size in (size_C, size_D))
    return {form: _cosine(one.forms[form], other.forms[form]) for form in FORMS}
