"""What a merge will do, before it does anything: its parents, who gives the files, and every tensor that will be written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import at_rest, folder, start
from megatron_prism.checkpoint.at_rest import AtRest
from megatron_prism.core.check.merge import check_merge, places
from megatron_prism.core.config import MergeConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.hf import dtypes, layout, safetensors
from megatron_prism.merge import alike
from megatron_prism.merge.parent import PROVENANCE, provenance

# a mixer's decay, step bias and skip: transformers and Megatron-Core compute them in fp32, and a rounding to bf16 moves every step
KEEPS_DTYPE = re.compile(r"(?:^|\.)(?:A_log|dt_bias|D)$")


@dataclass(frozen=True)
class Plan:
    """A merge. parents: the base first where there is one, then the models. origin: the parent that gives config, tokenizer, files, layout.

    shards: the files to be written. targets: by the rules' names, the places of each tensor in them; a tied head stored twice has two.
    """

    config: MergeConfig
    parents: tuple[AtRest, ...]
    origin: AtRest
    shards: tuple[safetensors.Shard, ...]
    targets: Mapping[str, tuple[safetensors.TensorPlace, ...]]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Return the plan's figures for the user."""
        written = [place for places in self.targets.values() for place in places]
        return {
            "method": self.config.method,
            "parents": {str(path): weight for path, weight in weights(self.config)},
            "config_from": str(self.origin.path),
            "family": self.origin.model.family,
            "parameters": sum(prod(self.origin.shapes[name]) for name in self.targets),
            "tensors": len(written),
            "files": [shard.file for shard in self.shards],
            "bytes": sum(place.end - place.start for place in written),
            "dtypes": sorted({place.dtype.name for place in written}),
        }


def weights(config: MergeConfig) -> list[tuple[Path, str | float | None]]:
    """Return each parent's path with its part in the merge."""
    by_t = {} if config.t is None else {0: 1 - config.t, 1: config.t}
    models = [(model.path, by_t.get(index) if config.method == "slerp" else model.weight) for index, model in enumerate(config.models)]
    return [*([] if config.base_model is None else [(config.base_model, "base")]), *models]


def plan(config: MergeConfig) -> Plan:
    """Open and compare a merge's models.

    Raises: InputError with the problems of the config, of the output and of all models, or else of the comparison.
    """
    problems = check_merge(config)
    _, out_problems = start.attempt(lambda: folder.refuse_existing(config.out), "out")
    problems += out_problems
    opened: list[tuple[str, AtRest]] = []
    for place, path in places(config):
        parent, wrong = start.attempt(lambda path=path: at_rest.read(path), place)  # type: ignore[misc]
        problems += wrong
        opened += [] if parent is None else [(place, parent)]
    problems += [
        Problem("out", f"{config.out}, inside {parent.path}", "a folder of its own", "choose another")
        for _, parent in opened
        if parent.root.resolve() in config.out.resolve().parents
    ]
    problems += _twice(opened)
    raise_problems(problems)
    wanted = (config.config_from or opened[0][1].path).resolve()
    origin = next(parent for _, parent in opened if parent.path.resolve() == wanted)
    others = [(place, parent) for place, parent in opened if parent is not origin]
    is_named = config.config_from is not None
    raise_problems([problem for place, parent in others for problem in alike.problems(origin, parent, place, is_named)])
    shards = _laid_out(origin, config)
    named = {own: name for name, own in origin.own.items()}
    targets: dict[str, tuple[safetensors.TensorPlace, ...]] = {}
    for shard in shards:
        for each in shard.tensors:
            name = named[origin.plan.copies.get(each.name, each.name)]
            targets[name] = (*targets.get(name, ()), each)
    notes = [f"{parent.path}: {note}" for _, parent in opened for note in parent.plan.notes]
    notes += [f"{origin.path}: {note}" for _, parent in others for note in alike.notes(origin, parent)]
    notes += [
        f"{parent.path}: its {PROVENANCE} is of no merge by prism, and is left out"
        for _, parent in opened
        if (parent.assets / PROVENANCE).is_file() and provenance(parent) is None
    ]
    notes += _heads(origin, [parent for _, parent in opened])
    return Plan(config, tuple(parent for _, parent in opened), origin, shards, targets, tuple(notes))


def _twice(opened: list[tuple[str, AtRest]]) -> Iterator[Problem]:
    """Yield a problem for a model that two paths name: a run, and its latest checkpoint. check_merge sees one path given twice."""
    first: dict[Path, tuple[str, AtRest]] = {}
    for place, parent in opened:
        other_place, other = first.setdefault(parent.root.resolve(), (place, parent))
        if other.path.resolve() != parent.path.resolve():
            yield Problem(f"{place} ({parent.path})", f"the model that {other_place} ({other.path}) is too", "each model once")


def _laid_out(origin: AtRest, config: MergeConfig) -> tuple[safetensors.Shard, ...]:
    if config.dtype is None:
        return origin.plan.kept
    dtype = dtypes.BY_NAME[config.dtype]
    return tuple(
        layout.recast(shard, {place.name: place.dtype if KEEPS_DTYPE.search(place.name) else dtype for place in shard.tensors})
        for shard in origin.plan.kept
    )


def _heads(origin: AtRest, parents: list[AtRest]) -> list[str]:
    """Return, in words, where a tied head is stored and where not, if the parents differ in it."""
    if len({(parent.model.tie_word_embeddings, bool(parent.plan.copies)) for parent in parents}) == 1:
        return []
    kinds = []
    for parent in parents:
        kind = ("tied, stored twice" if parent.plan.copies else "tied") if parent.model.tie_word_embeddings else "a head of its own"
        kinds.append(f"{parent.path}: {kind}")
    return [f"the output layer, stored as in {origin.path}: {'; '.join(kinds)}"]
