"""`prism analyze cka`: how alike the layers of models represent the same prompts, beside what chance gives. Started again, it goes on.

Input: checkpoints or Hugging Face folders, and files of prompts. Output: cka.json, and each model's pooled states.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_prism.analysis import cka, null_update
from megatron_prism.analysis.cka import Side
from megatron_prism.analysis.states import Kept, key_of
from megatron_prism.checkpoint import start
from megatron_prism.core import log, resumable
from megatron_prism.core.check.cka import check_cka, pairs
from megatron_prism.core.check.gang import check_model_on_gang, data_parallel_size
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.config import CkaConfig, ComparedConfig, DistributionConfig, EvaluatedConfig, ModelConfig, PartConfig, TaskConfig
from megatron_prism.core.errors import CheckpointError, InputError, Problem, Stopped, raise_problems
from megatron_prism.core.manifest import describe, sha256_json, write_json
from megatron_prism.data import tokenizer
from megatron_prism.eval import model as models_at_rest
from megatron_prism.eval import tasks
from megatron_prism.eval.model import Evaluated
from megatron_prism.families import registry
from megatron_prism.generate import handover
from megatron_prism.hf import as_torch
from megatron_prism.jobs import train
from megatron_prism.models import build, hidden
from megatron_prism.parallel import environment
from megatron_prism.parallel.groups import Groups, agree, from_first, on_first
from megatron_prism.prepare import drawn
from megatron_prism.train import stop
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog

KIND, COMMAND, RESULT = "cka", "prism analyze cka", "cka.json"
CONSTANT = 1e-6  # of the norm of states: what varies less is rounding
SAYS = {
    "biased": "linear CKA (paper, Equation 4, with centred columns): near 1 for anything wide",
    "debiased": "CKA of the unbiased HSIC (Song et al. 2012): near 0 for independent representations",
    "permutation_null": "the prompts of one side in another order",
    "gaussian_null": "two independent Gaussian matrices of the same shapes",
    "subsampled": "subsamples of the prompts without replacement; the paper's bootstrap, with it, would lift the debiased form",
    "ablated": "without so many directions of the largest variance of each side",
    "null_update": "the first model beside itself after a Gaussian update that has, in each of Megatron-Core's tensors, the other's norm",
}


@dataclass(frozen=True)
class Resolved:
    """An analysis before a process starts. texts: the prompts by distribution, on rank 0 alone. available: the texts they were drawn from."""

    config: CkaConfig
    models: Mapping[str, Evaluated]
    texts: Mapping[str, Sequence[str]]
    available: Mapping[str, int]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model that is computed: one of the config's, or (null of) the first of a pair after a Gaussian update of the other's norm."""

    model: str
    null_of: str | None
    weights: Mapping[str, Any]


def resolve(config: CkaConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts. Nothing is written.

    Raises: InputError with every problem found.
    """
    raise_problems(check_cka(config, world_size))
    _, problems = start.attempt(partial(resumable.begun, config.out, KIND, COMMAND))
    models: dict[str, Evaluated] = {}
    for index, one in enumerate(config.models):
        model, wrong = start.attempt(partial(_read, one, config), f"models.{index}")
        models |= {} if model is None else {one.name: model}
        problems += wrong
    prompts: dict[str, tuple[list[str], int]] = {}
    for name, distribution in config.distributions.items() if log.is_first() else ():
        read, wrong = start.attempt(partial(_prompts, name, distribution, config))
        prompts |= {} if read is None else {name: read}
        problems += wrong
    raise_problems(problems)
    raise_problems([problem for pair in pairs(config) for problem in _unlike(*pair, models, config.null_update)])
    texts, available = {name: read[0] for name, read in prompts.items()}, {name: read[1] for name, read in prompts.items()}
    figures = {
        "models": {name: str(model.root) for name, model in models.items()},
        "pairs": [f"{first}|{other}" for first, other in pairs(config)],
        "distributions": {name: {"prompts": config.num_prompts, "available": count} for name, count in available.items()},
        "world_size": world_size,
        "data_parallel": data_parallel_size(config, world_size),
        "environment": environment.variables(config),
        "out": str(config.out),
    }
    resolved = Resolved(config, models, texts, available, figures)
    raise_problems(list(_alike(resolved)))
    return resolved


def _read(one: ComparedConfig, config: CkaConfig) -> Evaluated:
    """Return a model at rest. Raises: InputError with every reason why the gang cannot build it, or it cannot read text."""
    model = models_at_rest.read(EvaluatedConfig(checkpoint=one.checkpoint, hf=one.hf))
    tokenizer.load(model.assets)
    wrong = [*check_model_on_gang(model.model, config), *check_architecture(model.model)]
    raise_problems([*wrong, *tokenizer.check_vocabulary(model.assets / tokenizer.FILE, model.model.vocab_size)])
    return model


def _prompts(name: str, distribution: DistributionConfig, config: CkaConfig) -> tuple[list[str], int]:
    """Return a distribution's prompts, and the number of those that they are drawn from. Raises: InputError where there are too few."""
    where = f"distributions.{name}.path"
    if distribution.set is None:
        part = PartConfig(path=distribution.path, text=distribution.text, split=distribution.split)
        return drawn.draw(part, config.num_prompts, config.seed, name, distribution.min_characters, where)
    asked = tasks.read(name, TaskConfig(set=distribution.set, path=Path(distribution.path[0]))).questions
    prompts = [one.prompt if isinstance(one.prompt, str) else "\n".join(turn.get("content", "") for turn in one.prompt) for one in asked]
    long_enough = [text for text in dict.fromkeys(prompts) if len(text.strip()) >= distribution.min_characters]
    if len(long_enough) < config.num_prompts:
        raise InputError(Problem(where, f"{len(long_enough)} prompts", f"num_prompts, {config.num_prompts}", "a smaller num_prompts"))
    return random.Random(f"{config.seed} {name}").sample(long_enough, config.num_prompts), len(long_enough)


def _unlike(first: str, other: str, models: Mapping[str, Evaluated], same_shapes: bool) -> Iterator[Problem]:
    """Yield why the layers of two models are not each other's. Widths may differ, but not where one is to get an update of the other's norm."""
    one, two = models[first].model, models[other].model
    layers = [len(hidden.layer_ends(model)) for model in (one, two)]
    if layers[0] != layers[1]:
        yield Problem(f"{first}|{other}", f"{layers[0]} and {layers[1]} layers", "as many layers in both")
    elif same_shapes and _shapes(one) != _shapes(two):
        yield Problem("null_update", f"{first} and {other}, whose tensors differ in shape", "models of one shape", "null_update: false")


def _alike(resolved: Resolved) -> Iterator[Problem]:
    """Yield the prompts that a model reads as the same tokens. Only rank 0 has prompts."""
    for name, of_model in _tokens(resolved).items():
        for distribution, texts in of_model.items():
            if (num := len(set(map(tuple, texts)))) < len(texts):
                found = f"{num} of {len(texts)} differ in what {name} reads of them, at most {max(map(len, texts))} tokens"
                yield Problem(f"distributions.{distribution}", found, "prompts that differ", "a larger max_tokens, or other prompts")


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {rule.mcore: tuple(rule.shape) for rule in registry.rules(model)}


def run(resolved: Resolved) -> dict[str, Any]:
    """Compare; every rank of the gang calls this and returns the result.

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    return train.on_gang(resolved, compare_in_gang)


def compare_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Compare on an existing rank grid: hold the folder, compute the states that it lacks, a model at a time, align them.

    Raises: Stopped where the analysis was asked to stop. CheckpointError.
    """
    config = resolved.config
    with ExitStack() as stack:
        stop_request = stack.enter_context(StopRequest(config.limits.wall_clock_s))
        watchdog = stack.enter_context(Watchdog(config.limits.hang_timeout_s, groups.rank))
        watchdog.doing("reading the models' sums")
        models = from_first(resolved.models)  # a run that goes on may have written another checkpoint meanwhile
        sums = from_first(on_first(lambda: {name: model.identity() for name, model in models.items()}))
        assert sums is not None
        held = resumable.held(config.out, KIND, COMMAND, lambda: describe(KIND, {}))
        on_first(partial(stack.enter_context, held))
        tokens = from_first(on_first(partial(_tokens, resolved)))
        assert tokens is not None
        subjects, kept = _subjects(config, sums), Kept(config.out)
        for subject in subjects:
            _heed(stop_request, watchdog, f"computing the states of {_named(subject)}")
            keys = {name: key_of(subject.weights, texts, config.precision) for name, texts in tokens[subject.model].items()}
            missing = from_first([name for name, key in keys.items() if kept.path(key) is None])
            if missing:
                log.get().info("computing the states of %s on %s", _named(subject), ", ".join(missing))
                chunks = _chunks(subject, models, config, groups)
                for name in missing:
                    states_PNC = hidden.pooled(chunks, models[subject.model].model, tokens[subject.model][name], groups, config.micro_size)
                    on_first(partial(_keep, kept, keys[name], states_PNC, subject, name))
                del chunks
                gc.collect()  # what refers to itself: the next model needs its memory
        watchdog.doing("aligning layers")
        return from_first(on_first(partial(_result, resolved, sums, tokens, subjects))) or {}


def _tokens(resolved: Resolved) -> dict[str, dict[str, list[list[int]]]]:
    """Return each distribution's prompts as each model reads them, cut to max_tokens and the model's context."""
    tokens: dict[str, dict[str, list[list[int]]]] = {}
    for name, model in resolved.models.items():
        spec = tokenizer.load(model.assets)
        longest = min(resolved.config.max_tokens, model.model.max_position_embeddings)
        tokens[name] = {
            distribution: [tokenizer.encode_prompt(text, spec)[:longest] for text in texts]
            for distribution, texts in resolved.texts.items()
        }
    return tokens


def _subjects(config: CkaConfig, sums: Mapping[str, Mapping[str, Any]]) -> list[Subject]:
    """Return what is computed: each model of a pair once, then the null update of each pair."""
    wanted = pairs(config)
    names = [model.name for model in config.models if any(model.name in pair for pair in wanted)]
    subjects = [Subject(name, None, {"sha256": sums[name]["sha256"]}) for name in names]
    for first, other in wanted if config.null_update else ():
        weights = {"sha256": sums[first]["sha256"], "update_of": sums[other]["sha256"], "seed": config.seed}
        subjects.append(Subject(first, other, weights))
    return subjects


def _named(subject: Subject) -> str:
    return subject.model if subject.null_of is None else f"{subject.model} after a random update of the norm of {subject.null_of}'s"


def _heed(stop_request: StopRequest, watchdog: Watchdog, doing: str) -> None:
    """Tell the watchdog what begins, and heed a signal. Every rank calls this. Raises: Stopped."""
    watchdog.doing(doing)
    if reason := agree([stop_request.reason(0.0)])[0]:
        raise Stopped(f"stopped by {stop.name(reason)} before {doing}; start {COMMAND} again: it goes on")


def _chunks(subject: Subject, models: Mapping[str, Evaluated], config: CkaConfig, groups: Groups) -> list[Any]:
    """Build a subject's model, and load its weights."""
    evaluated = models[subject.model]
    chunks = build.build(evaluated.model, groups, config)
    models_at_rest.load(evaluated, chunks)
    if subject.null_of is not None:
        shards = handover.shards_of(chunks)
        before = null_update.copied(shards)
        models_at_rest.load(models[subject.null_of], chunks)
        null_update.apply(shards, before, _shapes(evaluated.model), config.seed, groups)
    return chunks


def _keep(kept: Kept, key: str, states_PNC: torch.Tensor, subject: Subject, distribution: str) -> None:
    if not bool(torch.isfinite(states_PNC).all()):
        layer = int((~torch.isfinite(states_PNC)).any(-1).any(-1).nonzero()[0])
        raise CheckpointError(Problem(_named(subject), f"NaN or inf after layer {layer} on {distribution}", "finite hidden states"))
    spread_P = (states_PNC.double() - states_PNC.double().mean(1, keepdim=True)).norm(dim=(1, 2))
    if bool((is_constant_P := spread_P <= CONSTANT * states_PNC.double().norm(dim=(1, 2))).any()):
        found = f"the same state of every prompt after layer {int(is_constant_P.nonzero()[0])} on {distribution}"
        raise CheckpointError(
            Problem(_named(subject), found, "hidden states that vary", "a constant is aligned with nothing: other prompts")
        )
    kept.write(key, states_PNC, {"model": _named(subject), "distribution": distribution})


def _result(
    resolved: Resolved,
    sums: Mapping[str, Mapping[str, Any]],
    tokens: Mapping[str, Mapping[str, Sequence[Sequence[int]]]],
    subjects: Sequence[Subject],
) -> dict[str, Any]:
    """Align all pairs on all distributions, from the states on the disk, and write the result."""
    config = resolved.config
    of_pairs: dict[str, dict[str, Any]] = {f"{first}|{other}": {} for first, other in pairs(config)}
    distributions = {}
    with as_torch.one_thread():
        for name, texts in resolved.texts.items():
            sides = {(one.model, one.null_of): _sides(config, one, tokens[one.model][name]) for one in subjects}
            for first, other in pairs(config):
                of_pairs[f"{first}|{other}"][name] = _aligned(config, resolved, first, other, sides)
            num_tokens = [len(text) for text in tokens[config.models[0].name][name]]
            distributions[name] = {
                "num_prompts": len(texts),
                "num_available": resolved.available[name],
                "mean_tokens": sum(num_tokens) / len(num_tokens),
                "sha256": sha256_json(list(texts)),
            }
    result = {
        "kind": "analysis",
        "analysis": "cka",
        "models": {name: {"path": str(resolved.models[name].root), "sha256": sums[name]["sha256"]} for name in resolved.models},
        "distributions": distributions,
        "final_norm": config.final_norm,
        "precision": config.precision,
        "says": {key: words for key, words in SAYS.items() if key != "null_update" or config.null_update},
        "pairs": of_pairs,
    }
    write_json(config.out / RESULT, result)
    return result


def _sides(config: CkaConfig, subject: Subject, texts: Sequence[Sequence[int]]) -> list[Side]:
    """Return a subject's layers, 0 to L."""
    states_PNC = Kept(config.out).read(key_of(subject.weights, texts, config.precision))
    layers = [*states_PNC[:-2], states_PNC[-1] if config.final_norm else states_PNC[-2]]
    return [cka.side(x_NC, config.num_directions_removed) for x_NC in layers]


def _aligned(
    config: CkaConfig, resolved: Resolved, first: str, other: str, sides: Mapping[tuple[str, str | None], Sequence[Side]]
) -> dict[str, Any]:
    """Return a pair's figures on one distribution."""
    draws = cka.draws(config.seed, config.num_prompts, config.num_permutations, config.num_subsamples, config.subsample)
    layers = [cka.align(one, two, draws) for one, two in zip(sides[first, None], sides[other, None], strict=True)]
    widths = [resolved.models[name].model.hidden_size for name in (first, other)]
    figures = {
        **cka.together(layers),
        "gaussian_null": cka.gaussian_null(config.seed, config.num_prompts, *widths),
        "layers": [{"layer": number, **layer.figures()} for number, layer in enumerate(layers)],
    }
    if config.null_update:
        values = [cka.value(one, two) for one, two in zip(sides[first, None], sides[first, other], strict=True)]
        figures["null_update"] = {
            **{f"min_{form}": min(value[form] for value in values) for form in cka.FORMS},
            "layers": [{"layer": number, **value} for number, value in enumerate(values)],
        }
    return figures
