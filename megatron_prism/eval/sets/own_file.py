"""A set of one's own: lines of {id, kind, prompt, gold or choices or tests}, as questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import InputError, Problem, first_of, raise_problems
from megatron_prism.core.load import build
from megatron_prism.eval.question import Protocol, Question
from megatron_prism.grade import choice, code, strings
from megatron_prism.grade.number import without_exponent
from megatron_prism.prepare import arrow, sources

PROTOCOL = Protocol(num_samples=1, temperature=0.0, top_p=1.0, max_tokens=2048, think="free", answer="boxed_or_plain", source="ours")
KEYS = {one.name for one in fields(Question)}


def load(path: Path) -> tuple[Question, ...]:
    """Return a file's questions. Raises: InputError with the lines that are none, or whose id another line has."""
    questions: dict[str, Question] = {}
    problems: list[Problem] = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
            if isinstance(values, dict) and (unknown := sorted(set(values) - KEYS)):
                problems.append(Problem(f"{where}:{unknown[0]}", "an unknown key", f"one of {', '.join(sorted(KEYS))}"))
            question = build(_as_texts(values), Question, lambda key, where=where: f"{where}:{'.'.join(map(str, key))}")  # type: ignore[misc]
        except InputError as error:
            problems += error.problems
            continue
        except (ValueError, RecursionError) as error:
            problems.append(Problem(where, str(error), "a question as JSON"))
            continue
        problems += [replace(problem, where=f"{where}:{problem.where}") for problem in _problems(question)]
        if question.id in questions:
            problems.append(Problem(f"{where}:id", f"{question.id!r} again", "an id of its own for each question"))
        questions[question.id] = question
    if not problems and not questions:
        problems.append(Problem(str(path), "no lines", "at least one question"))
    raise_problems(first_of(problems, str(path)))
    return tuple(questions.values())


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the lines that are not blank, and their numbers. Raises: InputError for a file that cannot be read, or is one JSON document."""
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", "a file of questions, a JSON object a line"))
    if path.suffix in arrow.FORMATS:
        raise InputError(Problem(str(path), f"a {path.suffix} file", "JSON lines (plain, .gz or .zst)"))
    part = PartConfig(path=(str(path),), split="line")  # type: ignore[arg-type]  # of a .txt, too
    yield from sources.read_records(sources.Input(path, part))


def _as_texts(values: Any) -> Any:
    """Return a line with an integer id and a number as a math gold as texts, as prism grade reads them. Raises: ValueError: no finite number."""
    if not isinstance(values, dict):
        return values
    if type(values.get("id")) is int:
        values = {**values, "id": str(values["id"])}
    if values.get("kind") == "math" and type(values.get("gold")) in (int, float):
        values = {**values, "gold": without_exponent(values["gold"])}
    return values


def _problems(question: Question) -> list[Problem]:
    max_tokens = question.max_tokens
    if max_tokens is not None and max_tokens < 1:
        return [Problem("max_tokens", str(max_tokens), "at least 1, or none: the task's")]
    if not isinstance(question.prompt, str) and not (
        question.prompt and all({"role", "content"} <= turn.keys() for turn in question.prompt)
    ):
        return [Problem("prompt", "turns without role or content, or none", "a text, or turns {role, content}")]
    if question.kind == "code":
        wrong = code.tests_problem(question.tests)
        return [Problem("tests", wrong, "how the code is tested: docs/GRADE.md")] if wrong else []
    if question.kind == "choice":
        letters = choice.letters(question.choices)
        is_right = 2 <= len(question.choices) <= 26 and len(question.gold) == 1 and question.gold in letters
        return (
            []
            if is_right
            else [Problem("gold", f"{question.gold!r} of {len(question.choices)} choices", "the letter of one of 2 to 26 choices")]
        )
    if question.kind == "strings":
        is_right = question.gold in strings.WANTED and bool(question.choices) and all(question.choices)
        return (
            []
            if is_right
            else [Problem("gold", f"{question.gold!r} of {len(question.choices)} choices", "all or any, of expected strings")]
        )
    return [] if question.gold.strip() else [Problem("gold", repr(question.gold), "the right answer")]
