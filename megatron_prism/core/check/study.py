"""Checks of a study: pure functions that return every problem, before anything runs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.cluster import VARIABLE, check_pipeline, is_argument
from megatron_prism.core.config import CheckConfig, PipelineConfig, StudyConfig
from megatron_prism.core.errors import Problem
from megatron_prism.core.layers import Layer, origin

FIGURE = re.compile(r'([A-Za-z0-9][A-Za-z0-9._-]*):((?:"[^"]*"|[^".:\s]+)(?:\.(?:"[^"]*"|[^".:\s]+))*)')
RELATIONS = ("above", "below", "near")


def check_study(study: StudyConfig) -> list[Problem]:
    """Return the problems of a study: of its graph, of its stages' keys, and of its claims' figures."""
    pipeline = PipelineConfig(name=study.name, run_dir=study.run_dir, stages=study.stages)
    problems = [replace(problem, required=_in_words(problem)) for problem in check_pipeline(pipeline)]
    return list(dict.fromkeys([*check_bounds(study), *problems, *_check_stages(study), *_check_claims(study)]))


def check_variables(layers: Sequence[Layer]) -> list[Problem]:
    """Return a problem for each variable of a study's layers that no text uses: a misspelt one would leave the right one as it was.

    None where one variable's value names another, as `${variables.${variables.kind}}` does: what is used, no text says.
    """
    texts = json.dumps([values for _, values in layers], default=repr)
    if re.search(r"\$\{[^}]*\$\{", texts):
        return []
    interpolations = re.findall(r"\$\{([^}]*)", texts)
    used = {word for text in interpolations for word in re.split(r"[^\w-]+", text)}
    given = dict.fromkeys(
        name for _, values in layers if isinstance(values.get("variables"), dict) for name in map(str, values["variables"])
    )
    known = [name for name in given if name in used]
    problems = []
    for name in given:
        if name not in used:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"write ${{variables.{name}}} where it is meant, or leave it out"
            required = f"one that the study uses: {', '.join(known) or '(none)'}"
            problems.append(Problem(f"{origin(layers, ('variables', name))}:variables.{name}", "an unknown variable", required, fix))
    return problems


def _in_words(problem: Problem) -> str:
    return f"{problem.required}; or a script where kind is python" if problem.required.startswith("a job of prism") else problem.required


def _check_stages(study: StudyConfig) -> Iterator[Problem]:
    for index, stage in enumerate(study.stages):
        if stage.kind == "prism" and "--json" in stage.command:
            yield Problem(f"stages.{index}.command", "--json", "no --json", "the study keeps each result: RUN_DIR/study/NAME/result.json")
        if stage.output is not None and stage.array:
            yield Problem(f"stages.{index}.output", f"{stage.output}, of an array", "no output", "each element's follows from its words")
    for name, value in study.environment.items():
        if not VARIABLE.fullmatch(name) or not is_argument(value):
            yield Problem(f"environment.{name}", repr(value), "an environment variable")


def _check_claims(study: StudyConfig) -> Iterator[Problem]:
    arrays = {stage.name: len(stage.array) for stage in study.stages}
    for index, claim in enumerate(study.claims):
        where = f"claims.{index}"
        if claim.name in [other.name for other in study.claims[:index]]:
            yield Problem(f"{where}.name", repr(claim.name), "a name that no other claim has")
        if not claim.shows:
            yield Problem(f"{where}.shows", "no check", "at least one")
        for part in ("requires", "shows", "null"):
            for number, check in enumerate(getattr(claim, part)):
                yield from _check_check(f"{where}.{part}.{number}", check, arrays)


def _check_check(where: str, check: CheckConfig, arrays: dict[str, int]) -> Iterator[Problem]:
    given = [name for name in RELATIONS if getattr(check, name) is not None]
    if len(given) != 1:
        yield Problem(where, " and ".join(given) or "no bound", f"one of {', '.join(RELATIONS)}")
    if given == ["near"] and check.by <= 0:
        yield Problem(f"{where}.by", f"{check.by:g}", "more than 0: how near")
    for key in ("value", *given):
        if isinstance(value := getattr(check, key), str):
            match = FIGURE.fullmatch(value)
            if match is None:
                yield Problem(
                    f"{where}.{key}",
                    repr(value),
                    'a number, or STAGE:KEY.KEY; a key with a dot, a colon or a space in quotes: weights:total.changed."0.01"',
                )
            elif match[1] not in arrays:
                yield Problem(f"{where}.{key}", repr(match[1]), f"one of the stages: {', '.join(arrays)}")
            elif (size := arrays[match[1]]) and not (parts_of(value)[1][0].isdecimal() and int(parts_of(value)[1][0]) < size):
                yield Problem(f"{where}.{key}", repr(value), f"an element's number first, 0 to {size - 1}: {match[1]}:0.KEY")


def parts_of(figure: str) -> tuple[str, list[str]]:
    """Return the stage of a figure, and the keys of its place in the stage's result. Raises: ValueError where it is no figure."""
    match = FIGURE.fullmatch(figure)
    if match is None:
        raise ValueError(f"{figure!r} is no STAGE:KEY.KEY")
    return match[1], [part.strip('"') for part in re.findall(r'"[^"]*"|[^".]+', match[2])]
