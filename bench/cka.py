"""What the resampled CKA costs beside ckatorch on the same representations, in CPU-seconds, the sides in turn; and whether all figures agree.

Run: python bench/cka.py --ckatorch FOLDER [--rounds N] [--layers N] [--prompts N] [--channels N]
FOLDER: of `pip install --no-deps --target FOLDER ckatorch==1.0.3`. Both sides draw the same 20 subsamples of half the prompts of each layer, with one
thread. ckatorch computes one form of one subsample a call; ours computes a layer's Gram matrices once and both forms of all subsamples from them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # read by torch at import

import numpy as np
import torch

from megatron_prism.analysis import cka

Values = dict[str, list[list[float]]]  # by form and layer, of each subsample
Layers = list[tuple[torch.Tensor, torch.Tensor]]


def load(folder: Path) -> Callable[..., torch.Tensor]:
    """Return ckatorch's function of two matrices, without what its package imports to draw."""
    package = types.ModuleType("ckatorch")
    package.__path__ = [str(folder / "ckatorch")]
    sys.modules["ckatorch"] = package
    from ckatorch.core import cka_base  # type: ignore[import-not-found]

    function: Callable[..., torch.Tensor] = cka_base
    return function


def representations(num_layers: int, num_prompts: int, channels: int) -> Layers:
    """Return each layer's representations by two models, which share half of their variance."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_prompts, channels)
    layers = []
    for _ in range(num_layers):
        one = torch.randn(shape, generator=generator)
        layers.append((one, one + torch.randn(shape, generator=generator)))
    return layers


def ours(layers: Layers, drawn: cka.Draws) -> Values:
    """Compute both forms of all subsamples of each layer."""
    of_layers = [cka.subsampled(cka.side(one), cka.side(other), drawn.subsets_RM) for one, other in layers]
    return {form: [of_layer[form] for of_layer in of_layers] for form in cka.FORMS}


def theirs(layers: Layers, drawn: cka.Draws, function: Callable[..., torch.Tensor], forms: tuple[str, ...]) -> Values:
    """Compute forms of all subsamples of each layer with ckatorch."""
    return {
        form: [
            [float(function(one[subset], other[subset], unbiased=form == "debiased")) for subset in drawn.subsets_RM]
            for one, other in layers
        ]
        for form in forms
    }


def numpys(layers: Layers, drawn: cka.Draws) -> Values:
    """Compute both forms from the features, in numpy's float64."""
    values: Values = {form: [] for form in cka.FORMS}
    for one, other in layers:
        pairs = [tuple(side[subset].double().numpy() for side in (one, other)) for subset in drawn.subsets_RM]
        for form, function in (("biased", _biased), ("debiased", _debiased)):
            values[form].append([function(x, y) for x, y in pairs])
    return values


def _biased(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.sum((x @ x.T) * (y @ y.T)) / (np.linalg.norm(x @ x.T) * np.linalg.norm(y @ y.T)))


def _debiased(x: np.ndarray, y: np.ndarray) -> float:
    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        return float(np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * k.sum(0) @ m.sum(0))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / float(np.sqrt(hsic(k, k) * hsic(m, m)))


def difference(one: Values, other: Values) -> float:
    """Return the largest difference of two sides' values."""
    return max(float(np.abs(np.array(one[form]) - np.array(other[form])).max()) for form in other)


def measure(run: Callable[[], Values]) -> tuple[float, Values]:
    """Return the CPU-seconds of a side and its values."""
    before = time.process_time()
    values = run()
    return time.process_time() - before, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckatorch", type=Path, required=True)
    for name, default in (("rounds", 5), ("layers", 10), ("prompts", 200), ("channels", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    function, layers = load(args.ckatorch), representations(args.layers, args.prompts, args.channels)
    drawn = cka.draws(0, args.prompts, num_permutations=1)
    sides: dict[str, Callable[[], Values]] = {
        "ours, both forms": lambda: ours(layers, drawn),
        "ckatorch, both forms": lambda: theirs(layers, drawn, function, ("biased", "debiased")),
        "ckatorch, biased": lambda: theirs(layers, drawn, function, ("biased",)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, Values] = {}
    for number in range(args.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            spent, values[name] = measure(sides[name])
            seconds[name].append(spent)
    print(
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {args.layers} layers of {args.prompts} x {args.channels}, 20 subsamples"
    )
    first = seconds["ours, both forms"]
    for name, each in seconds.items():
        ratios = sorted(mine / other for mine, other in zip(first, each, strict=True))
        print(
            f"{name}: {statistics.median(each):.3f} CPU-s; ours / this {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    mine = values["ours, both forms"]
    apart = {"ckatorch": difference(mine, values["ckatorch, both forms"]), "numpy": difference(mine, numpys(layers, drawn))}
    print("largest difference: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    sizes = {name: getattr(args, name) for name in ("rounds", "layers", "prompts", "channels")}
    print(json.dumps({"bench": "cka", **sizes, "cpu_s": seconds, "largest_difference": apart, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
