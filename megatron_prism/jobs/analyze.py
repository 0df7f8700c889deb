"""`prism analyze weights|spectra`: what changed between two models at rest, tensor by tensor, streamed."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_prism.analysis import spectra, weights
from megatron_prism.analysis.components import KIND_OF, Component
from megatron_prism.analysis.stream import Matched, match, walk
from megatron_prism.analysis.weights import Change, Cosine
from megatron_prism.checkpoint import at_rest
from megatron_prism.checkpoint.at_rest import AtRest
from megatron_prism.core import log
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.hf import as_torch

Key = tuple[str, Component]
Measured = tuple[weights.Tally, Cosine | None]
ROUNDING = ("delta", "changed", "share_different")
WEIGHTS_NULL = "updates of the same norm in each tensor: Gaussian (dense), rounded as stored, and this one's own entries shuffled"
# fields that decide which tensors there are, and what to do where they differ
SAME = {
    "num_layers": "",
    "vocab_size": "",
    "tie_word_embeddings": "a tied head is the embedding: store it as lm_head.weight too, in a copy of the folder that says tie_word_embeddings: false",
}


def run_weights(base: Path, other: Path, against: Path | None, num_threads: int, seed: int) -> dict[str, Any]:
    """Return the change from `base` to `other` by tensor, component, kind and in all; with `against`, the cosine to the update that it is too.

    Raises: InputError, CheckpointError where a path is no model, or the models differ in more than their weights.
    """
    models = [at_rest.read(path) for path in (base, other, *([against] if against else []))]
    figures = compare(models, num_threads, seed)
    return {
        "kind": "analysis",
        "analysis": "weights",
        "base": str(base),
        "other": str(other),
        "against": str(against) if against else None,
        "dtypes": [", ".join(sorted({dtype.name for dtype in model.dtypes.values()})) for model in models],
        "thresholds": list(weights.THRESHOLDS),
        "null": WEIGHTS_NULL,
        **figures,
        "masters": compare_masters(models[0], models[1], num_threads, seed),
    }


def compare_masters(base: AtRest, other: AtRest, num_threads: int, seed: int) -> dict[str, Any] | None:
    """Return the change in the optimizers' fp32 main weights, and how far the stored weights are from them. None: `other` holds none.

    A base without main weights, which is what a run began from, is taken as it is stored. Single tensors are left out.
    """
    main = at_rest.masters(other)
    if main is None:
        return None
    rounding = compare([main, other], num_threads, seed)["total"]
    return {
        **without_tensors(compare([at_rest.masters(base) or base, main], num_threads, seed)),
        "rounding": {key: rounding[key] for key in ROUNDING},
    }


def without_tensors(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return a change's total, kinds and components."""
    return {key: value for key, value in figures.items() if key != "tensors"}


def compare(models: Sequence[AtRest], num_threads: int, seed: int) -> dict[str, Any]:
    """Return the change from the first model to the second: total, kinds, components and tensors; of a third, the cosine of both updates.

    Raises: InputError where they differ in more than their weights.
    """
    _require_same(models)
    changes: dict[Key, Change] = {}
    cosines: dict[Key, Cosine] = {}
    with as_torch.one_thread(), at_rest.opened(models) as opened:
        tensors = match(opened)
        with log.ticking(sum(len(list(tensor.parts())) for tensor in tensors)) as tick:
            for tensor, component, (tallied, cosine) in walk(tensors, _measure, _together, num_threads, tick):
                key = (tensor.name, component)
                changes[key] = weights.change_of(tallied, as_torch.dtype_of(tensor.dtypes[1]), _seed(seed, tensor.name))
                if cosine is not None:
                    cosines[key] = cosine
    return _figures(changes, cosines)


def run_spectra(base: Path, other: Path, num_directions: int, seed: int) -> dict[str, Any]:
    """Return the spectra of the update from `base` to `other`, of each matrix, and their means by component. Memory: a pair of tensors, and their factors.

    Embedding and head are left out: a row a token, they are no map between channels.
    Raises: as run_weights.
    """
    models = [at_rest.read(path) for path in (base, other)]
    _require_same(models)
    by_key: dict[Key, dict[str, Any]] = {}
    with at_rest.opened(models) as opened:
        matrices = [tensor for tensor in match(opened) if len(tensor.shape) == 2]
        parts = [(tensor, *part) for tensor in matrices for part in tensor.parts() if part[0] != "embed/lm_head"]
        with log.ticking(len(parts)) as tick:
            for tensor, component, start, end in parts:
                with tensor.open() as read:
                    old_RC, new_RC = (values_N.view(-1, tensor.row) for values_N in read(start, end - start))
                by_key[tensor.name, component] = spectra.spectra(old_RC, new_RC, num_directions, _seed(seed, tensor.name))
                tick()
    num_parts = Counter(name for name, _ in by_key)
    components = dict.fromkeys(component for _, component in by_key)
    means = {name: _means([figures for (_, component), figures in by_key.items() if component == name]) for name in components}
    return {
        "kind": "analysis",
        "analysis": "spectra",
        "base": str(base),
        "other": str(other),
        "null": "a Gaussian update of the same shape and norm",
        "effective_rank_up_to": spectra.EXACT,
        "components": means,
        "tensors": {name if num_parts[name] == 1 else f"{name} ({component})": of for (name, component), of in by_key.items()},
    }


def _means(of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each figure over tensors; None where a tensor lacks it."""
    return {key: None if any(one[key] is None for one in of) else fmean(one[key] for one in of) for key in of[0]}


def _measure(tensor: Matched, first: int, pieces: Sequence[torch.Tensor]) -> Measured:
    old_N, new_N, *rest = pieces
    stride = weights.stride_of(tensor.row * tensor.shape[0], tensor.row)
    return weights.tally(old_N, new_N, first, stride), weights.cosine(old_N, new_N, rest[0]) if rest else None


def _together(measured: Sequence[Measured]) -> Measured:
    cosines = [cosine for _, cosine in measured if cosine is not None]
    return weights.added(tallied for tallied, _ in measured), reduce(add, cosines) if cosines else None


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed} {name}".encode())  # of 32 bits: torch's generator on the host heeds no others


def _figures(changes: Mapping[Key, Change], cosines: Mapping[Key, Cosine]) -> dict[str, Any]:
    def grouped(group: Callable[[Key], str | None]) -> dict[str, Any]:
        names = dict.fromkeys(name for key in changes if (name := group(key)) is not None)
        return {name: _of([key for key in changes if group(key) == name], changes, cosines) for name in names}

    return {
        "total": _of(list(changes), changes, cosines),
        "kinds": grouped(lambda key: KIND_OF[key[1]]),
        "components": grouped(lambda key: key[1]),
        "tensors": grouped(lambda key: key[0]),
    }


def _of(keys: Sequence[Key], changes: Mapping[Key, Change], cosines: Mapping[Key, Cosine]) -> dict[str, Any]:
    figures = weights.together([changes[key] for key in keys]).figures()
    return figures | (reduce(add, [cosines[key] for key in keys]).figures() if cosines else {})


def _require_same(models: Sequence[AtRest]) -> None:
    """Refuse models of other shapes. Positions and rotary settings may differ: a long-context step changes them."""
    first, problems = models[0], []
    for model in models[1:]:
        if model.model.family != first.model.family:
            problems.append(Problem(str(model.path), model.model.family, f"{first.model.family}, as {first.path}"))
        elif other := [name for name in SAME if getattr(model.model, name) != getattr(first.model, name)]:
            values = [(name, *(f"{getattr(each.model, name)}" for each in (model, first))) for name in other]
            problems += [Problem(f"{model.path}: {name}", one, f"{two}, as {first.path}", SAME[name]) for name, one, two in values]
        elif model.shapes.keys() != first.shapes.keys():
            problems.append(Problem(str(model.path), f"{len(model.shapes)} tensors", f"the {len(first.shapes)} of {first.path}"))
        elif differing := next((name for name, shape in model.shapes.items() if shape != first.shapes[name]), None):
            found = str(list(model.shapes[differing]))
            problems.append(Problem(f"{model.path}: {model.own[differing]}", found, f"the shape in {first.path}"))
    raise_problems(problems)
