"""Which parameters train: patterns over checkpoint names (decoder.layers.12.self_attention.linear_qkv.weight)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from megatron_prism.core.config import ModelConfig, ParallelConfig
from megatron_prism.core.errors import Problem
from megatron_prism.models.build import stages, unwrap


def is_trainable(name: str, patterns: Sequence[str]) -> bool:
    """Say whether a pattern (fnmatch: * stands for any text) matches a parameter's name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check(patterns: Sequence[str], names: Iterable[str], model: ModelConfig, parallel: ParallelConfig) -> list[Problem]:
    """Return a problem for each pattern that matches no parameter, and one where a pipeline stage has no trainable parameter."""
    names = list(names)
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))  # one name for all layers
    problems = []
    for pattern in patterns:
        if not any(is_trainable(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.0)
            problems.append(
                Problem(f"trainable: {pattern}", "no parameter of that name", "a pattern that matches one", f"near: {', '.join(near)}")
            )
    trained = {stage for name in names if is_trainable(name, patterns) for stage in stages_of(name, model, parallel)}
    if not problems and (idle := sorted(set(range(parallel.pp)) - trained)):
        found, fix = f"nothing to train on pipeline stages {idle} of {parallel.pp}", "more patterns, or less parallel.pp"
        problems.append(Problem("trainable", found, "something on each: Megatron-Core's optimizer cannot be saved otherwise", fix))
    return problems


def stages_of(name: str, model: ModelConfig, parallel: ParallelConfig) -> set[int]:
    """Return the pipeline stages that hold a parameter: one stage, or the first and the last for a tied embedding."""
    if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
        return {stage for stage, layers in enumerate(stages(model, parallel)) if int(layer[1]) in layers}
    if name.startswith("embedding."):
        return {0, parallel.pp - 1} if model.tie_word_embeddings else {0}
    return {parallel.pp - 1}


def freeze(chunks: Sequence[Any], states: Mapping[str, Mapping[str, Any]], patterns: Sequence[str]) -> None:
    """Freeze the parameters that no pattern matches. Call this before gradient buffers and optimizer exist.

    states: the chunks' sharded state, in order. Only it has a layer's number in the whole model; a chunk's own names count from 0 on each
    pipeline stage.
    """
    for chunk, state in zip(map(unwrap, chunks), states.values(), strict=True):
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_trainable(state[name].key, patterns))
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            chunk.embedding.register_forward_hook(_with_gradient)


def _with_gradient(module: Any, args: Any, output: Any) -> Any:
    """Require the gradient of a frozen embedding's output. A recomputed layer silently has no gradient where its input requires none."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
