"""Checks between the values of a prepare config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from megatron_prism.core.check.bounds import check_bounds, check_value
from megatron_prism.core.config import DecontaminateConfig, PartConfig, PrepareConfig, SourceConfig
from megatron_prism.core.config.train import Weight
from megatron_prism.core.errors import Problem

WEIGHT_TOLERANCE = 1e-6  # in percentage points, of the sum of a mixture's weights around 100
RESERVED = ("manifest.json", "report")  # names in a prepared folder that no source may have


def check_weights(weights: Mapping[str, float], where: str) -> list[Problem]:
    """Return what is wrong with a mixture's weights, in percent."""
    return [*check_value(dict(weights), dict[str, Weight], (), where), *_check_sum(weights, where)]


def _check_sum(weights: Mapping[str, float], where: str) -> list[Problem]:
    total = sum(weights.values())
    if abs(total - 100) <= WEIGHT_TOLERANCE:
        return []
    fix = f"found {', '.join(f'{n} {w:g}' for n, w in weights.items())}"
    return [Problem(where, f"weights that sum to {total:g}", "100 (percent)", fix)]


def check_prepare(config: PrepareConfig) -> list[Problem]:
    """Return the problems of a prepare config's values, and between them."""
    if not config.sources:
        return [Problem("sources", "an empty list", "at least one source")]
    names = [source.name for source in config.sources]
    problems = [*check_bounds(config)]
    problems += [
        Problem(f"sources.{index}.name", repr(name), "a name used once") for index, name in enumerate(names) if name in names[:index]
    ]
    for index, source in enumerate(config.sources):
        problems += _check_source(source, f"sources.{index}")
    problems += [*check_decontaminate(config.decontaminate), *_check_packing(config)]
    if len(set(names)) == len(names):
        problems += _check_sum({source.name: source.weight for source in config.sources}, "sources.weight")
    return problems


def check_decontaminate(settings: DecontaminateConfig | None) -> Iterator[Problem]:
    """Yield what is wrong with the evaluation sets that a mixture or a prompt set is searched for."""
    if settings is None:
        return
    if not settings.against:
        yield Problem("decontaminate.against", "an empty list", "at least one evaluation set")
    for index, part in enumerate(settings.against):
        if not part.path:
            yield Problem(f"decontaminate.against.{index}.path", "an empty list", "at least one file or glob")
        if part.sample:
            yield Problem(f"decontaminate.against.{index}.sample", "a sample of an evaluation set", "all of it", "remove it")
    if settings.shortest > settings.ngram:
        yield Problem("decontaminate.shortest", str(settings.shortest), f"1 to ngram {settings.ngram}")


def _check_packing(config: PrepareConfig) -> Iterator[Problem]:
    packing = config.packing
    if packing is not None and 1 <= packing.seq_length <= packing.overlap:
        yield Problem("packing.overlap", str(packing.overlap), f"0 to {packing.seq_length - 1}: less than seq_length")


def _check_parts(source: SourceConfig, where: str) -> Iterator[Problem]:
    if not source.parts:
        if not source.path:
            yield Problem(f"{where}.path", "an empty list", "at least one file or glob")
        return
    for number, part in enumerate(source.parts):
        if not part.path:
            yield Problem(f"{where}.parts.{number}.path", "an empty list", "at least one file or glob")
    for item in dataclasses.fields(PartConfig):
        if item.name not in ("hf_id", "hf_files") and getattr(source, item.name) != item.default:
            yield Problem(f"{where}.{item.name}", "a value beside parts", "a value in each of the parts", "move it there")
    if source.valid_path:
        yield Problem(f"{where}.valid_path", "files beside parts", "valid_percent", "the parts do not say how these would be read")


def _check_source(source: SourceConfig, where: str) -> Iterator[Problem]:
    if source.name in RESERVED:
        yield Problem(f"{where}.name", repr(source.name), f"another name: prepare writes {', '.join(RESERVED)} beside the sources")
    yield from _check_parts(source, where)
    if source.valid_percent and source.valid_path:
        yield Problem(f"{where}.valid_percent", "both valid_percent and valid_path", "one of them")
