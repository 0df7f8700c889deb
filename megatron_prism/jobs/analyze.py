"""`prism analyze weights|spectra`: what changed between two models, tensor by tensor, streamed from their Hugging Face folders."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_prism.analysis import spectra, weights
from megatron_prism.analysis.components import KIND_OF, Component
from megatron_prism.analysis.stream import Matched, walk
from megatron_prism.analysis.weights import Change, Cosine
from megatron_prism.checkpoint.plan import Plan, plan_import
from megatron_prism.core import log
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.hf import bits, safetensors

Key = tuple[str, Component]
# fields that decide which tensors there are, and what to do where they differ
SAME = {
    "num_layers": "",
    "vocab_size": "",
    "tie_word_embeddings": "a tied head is the embedding: store it as lm_head.weight too, in a copy of the folder that says tie_word_embeddings: false",
}


def run_weights(base: Path, other: Path, against: Path | None, num_threads: int, seed: int) -> dict[str, Any]:
    """Return the change from `base` to `other` by tensor, component, kind and in all; with `against`, the cosine to the update that it is too.

    Raises: InputError, CheckpointError where a folder is no model, or the models differ in more than their weights.
    """
    plans = [plan_import(root) for root in (base, other, *([against] if against else []))]
    _require_same(plans)
    changes: dict[Key, Change] = {}
    cosines: dict[Key, Cosine] = {}
    with bits.one_thread(), _matched(plans) as tensors, log.ticking(sum(len(list(tensor.parts())) for tensor in tensors)) as tick:
        for tensor, component, pieces in walk(tensors, _measure, num_threads, tick):
            key = (tensor.name, component)
            stored = tensor.places[1].dtype
            changes[key] = weights.change_of(weights.added(tallied for tallied, _ in pieces), stored, _seed(seed, tensor.name))
            if against:
                cosines[key] = reduce(add, [one for _, one in pieces if one is not None])
    return {
        "base": str(base),
        "other": str(other),
        "against": str(against) if against else None,
        "dtypes": [", ".join(sorted({str(place.dtype).removeprefix("torch.") for place in plan.places.values()})) for plan in plans],
        "thresholds": list(weights.THRESHOLDS),
        "null": "updates of the same norm in each tensor: Gaussian (dense), rounded as stored, and this one's own entries shuffled",
        **_figures(changes, cosines),
    }


def run_spectra(base: Path, other: Path, num_directions: int, seed: int) -> dict[str, Any]:
    """Return the spectra of the update from `base` to `other`, of each matrix, and their means by component. Memory: a pair of tensors, and their factors.

    Embedding and head are left out: a row a token, they are no map between channels.
    Raises: as run_weights.
    """
    plans = [plan_import(root) for root in (base, other)]
    _require_same(plans)
    by_key: dict[Key, dict[str, Any]] = {}
    with _matched(plans) as tensors:
        matrices = [tensor for tensor in tensors if len(tensor.places[0].shape) == 2]
        parts = [(tensor, *part) for tensor in matrices for part in tensor.parts() if part[0] != "embed/lm_head"]
        with log.ticking(len(parts)) as tick:
            for tensor, component, start, end in parts:
                old_RC, new_RC = (values_N.view(-1, tensor.row) for values_N in tensor.read(start, end - start))
                by_key[tensor.name, component] = spectra.spectra(old_RC, new_RC, num_directions, _seed(seed, tensor.name))
                tick()
    components = dict.fromkeys(component for _, component in by_key)
    means = {name: _means([figures for (_, component), figures in by_key.items() if component == name]) for name in components}
    return {
        "base": str(base),
        "other": str(other),
        "null": "a Gaussian update of the same shape and norm",
        "effective_rank_up_to": spectra.EXACT,
        "components": means,
        "tensors": {f"{name} ({component})" if component in ("gate", "up") else name: of for (name, component), of in by_key.items()},
    }


def _means(of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each figure over tensors; None where a tensor lacks it."""
    return {key: None if any(one[key] is None for one in of) else fmean(one[key] for one in of) for key in of[0]}


def _measure(tensor: Matched, first: int, pieces: Sequence[torch.Tensor]) -> tuple[weights.Tally, Cosine | None]:
    old_N, new_N, *rest = pieces
    stride = weights.stride_of(old_N.numel() if not tensor.places[0].shape else _numel(tensor), tensor.row)
    return weights.tally(old_N, new_N, first, stride), weights.cosine(old_N, new_N, rest[0]) if rest else None


def _numel(tensor: Matched) -> int:
    return tensor.row * tensor.places[0].shape[0]


def _seed(seed: int, name: str) -> int:
    return seed << 32 | zlib.crc32(name.encode())


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


def _require_same(plans: Sequence[Plan]) -> None:
    """Refuse models of other shapes. Positions and rotary settings may differ: a long-context step changes them."""
    first, problems = plans[0], []
    for plan in plans[1:]:
        shapes = zip(first.rules, plan.rules, strict=False)
        if plan.model.family != first.model.family:
            problems.append(Problem(str(plan.root), plan.model.family, f"{first.model.family}, as {first.root}"))
        elif other := [name for name in SAME if getattr(plan.model, name) != getattr(first.model, name)]:
            problems += [
                Problem(
                    f"{plan.root}: {name}", f"{getattr(plan.model, name)}", f"{getattr(first.model, name)}, as {first.root}", SAME[name]
                )
                for name in other
            ]
        elif differing := next((b for a, b in shapes if [s for _, s in a.hf] != [s for _, s in b.hf]), None):
            problems.append(Problem(f"{plan.root}: {differing.hf[0][0]}", str(list(differing.hf[0][1])), f"the shape in {first.root}"))
        elif len(plan.rules) != len(first.rules):
            problems.append(Problem(str(plan.root), f"{len(plan.rules)} tensors", f"{len(first.rules)}, as {first.root}"))
    raise_problems(problems)


@contextmanager
def _matched(plans: Sequence[Plan]) -> Iterator[list[Matched]]:
    """Open the folders, and match their tensors by the family's rules: each folder has its own spelling, and a tied head counts once."""
    with ExitStack() as stack:
        files = [stack.enter_context(safetensors.open_files(plan.root, plan.shards)) for plan in plans]
        of_rules = zip(*(plan.rules for plan in plans), strict=True)
        pairs = [zip(*([name for name, _ in rule.hf] for rule in rules), strict=True) for rules in of_rules]
        tensors = []
        for names in dict.fromkeys(names for of_rule in pairs for names in of_rule):  # several rules may share a tensor
            places = tuple(plan.places[name] for plan, name in zip(plans, names, strict=True))
            tensors.append(Matched(names[0], places, tuple(opened[place.file] for opened, place in zip(files, places, strict=True))))
        yield tensors
