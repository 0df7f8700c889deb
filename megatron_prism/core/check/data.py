"""What must hold between the values of a prepare config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from megatron_prism.core.config import PartConfig, PrepareConfig, SourceConfig
from megatron_prism.core.errors import Problem

WEIGHT_TOLERANCE = 1e-6  # percent points a mixture's weights may miss 100 by
RESERVED = ("manifest.json", "report")  # names in a prepared folder that are no source's
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."


def check_weights(weights: Mapping[str, float], where: str) -> list[Problem]:
    """Return what is wrong with a mixture's weights, in percent."""
    problems = [Problem(f"{where}.{name}", str(weight), "a weight above 0") for name, weight in weights.items() if not weight > 0]
    total = sum(weights.values())
    if not abs(total - 100) <= WEIGHT_TOLERANCE:
        problems.append(
            Problem(
                where, f"weights that sum to {total:g}", "100 (percent)", f"found {', '.join(f'{n} {w:g}' for n, w in weights.items())}"
            )
        )
    return problems


def check_prepare(config: PrepareConfig) -> list[Problem]:
    """Return what is wrong between the keys of a prepare config."""
    if not config.sources:
        return [Problem("sources", "an empty list", "at least one source")]
    names = [source.name for source in config.sources]
    problems = [
        Problem(f"sources.{index}.name", repr(name), "a name used once") for index, name in enumerate(names) if name in names[:index]
    ]
    for index, source in enumerate(config.sources):
        problems += _check_source(source, f"sources.{index}")
    for key, value in (("tokens", config.tokens), ("num_workers", config.num_workers)):
        if value is not None and value < 1:
            problems.append(Problem(key, str(value), "at least 1, or null"))
    if config.max_epochs is not None and not config.max_epochs > 0:
        problems.append(Problem("max_epochs", str(config.max_epochs), "more than 0, or null"))
    problems += [*_check_decontaminate(config), *_check_packing(config)]
    if len(set(names)) == len(names):
        problems += check_weights({source.name: source.weight for source in config.sources}, "sources.weight")
    return problems


def _check_decontaminate(config: PrepareConfig) -> Iterator[Problem]:
    found = config.decontaminate
    if found is None:
        return
    if not found.against:
        yield Problem("decontaminate.against", "an empty list", "at least one evaluation set")
    for index, part in enumerate(found.against):
        if not part.path:
            yield Problem(f"decontaminate.against.{index}.path", "an empty list", "at least one file or glob")
        if part.sample:
            yield Problem(f"decontaminate.against.{index}.sample", "a sample of an evaluation set", "all of it", "remove it")
    if not 1 <= found.shortest <= found.ngram:
        yield Problem("decontaminate.shortest", str(found.shortest), f"1 to ngram {found.ngram}")


def _check_packing(config: PrepareConfig) -> Iterator[Problem]:
    packing = config.packing
    if packing is not None and packing.seq_length < 1:
        yield Problem("packing.seq_length", str(packing.seq_length), "at least 1")
    elif packing is not None and not 0 <= packing.overlap < packing.seq_length:
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
        if item.name != "hf_id" and getattr(source, item.name) != item.default:
            yield Problem(f"{where}.{item.name}", "a value beside parts", "a value in each of the parts", "move it there")
    if source.valid_path:
        yield Problem(f"{where}.valid_path", "files beside parts", "valid_percent", "the parts do not say how these would be read")


def _check_source(source: SourceConfig, where: str) -> Sequence[Problem]:
    problems = []
    if not source.name or set(source.name) - set(LETTERS) or source.name.startswith("."):
        problems.append(
            Problem(f"{where}.name", repr(source.name), "letters, digits, '_', '-' and '.', the first no '.': it names a folder")
        )
    if source.name in RESERVED:
        problems.append(
            Problem(f"{where}.name", repr(source.name), f"another name: prepare writes {', '.join(RESERVED)} beside the sources")
        )
    problems += _check_parts(source, where)
    if source.min_tokens < 1:
        problems.append(Problem(f"{where}.min_tokens", str(source.min_tokens), "at least 1"))
    if not 0 <= source.valid_percent < 100:
        problems.append(Problem(f"{where}.valid_percent", str(source.valid_percent), "at least 0 and below 100"))
    if source.available_tokens is not None and source.available_tokens < 1:
        problems.append(Problem(f"{where}.available_tokens", str(source.available_tokens), "at least 1, or null"))
    if source.valid_percent and source.valid_path:
        problems.append(Problem(f"{where}.valid_percent", "both valid_percent and valid_path", "one of them"))
    return problems
