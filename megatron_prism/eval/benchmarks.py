"""Read evaluation sets in their published form, as texts: each question, and its answer or solution apart."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.eval.sets import rows
from megatron_prism.eval.sets.rows import Row

Side = Literal["question", "answer"]
# fields of published sets; a record's first that has text is read
QUESTION = ("problem", "question", "Question", "question_content", "description", "prompt")
ANSWER = (
    "reference_solution",
    "solution",
    "canonical_solution",
    "editorial",
    "Explanation",
    "answer",
    "expected_answer",
    "Correct Answer",
    "gold",
)
ID = ("id", "unique_id", "task_id", "question_id", "problem_id", "Record ID")


@dataclass(frozen=True)
class Against:
    """An evaluation set: its name in the result, and its files or glob."""

    name: str
    path: str


@dataclass(frozen=True)
class Text:
    """One side of a question of an evaluation set."""

    benchmark: str
    question: str
    side: Side
    text: str


def paths(one: Against) -> tuple[Path, ...]:
    """Return the files of a set. Raises: InputError where there is none."""
    matches = [one.path] if Path(one.path).exists() else sorted(glob.glob(one.path, recursive=True))
    if not matches:
        raise InputError(Problem(f"--against {one.name}", f"no file at {one.path!r}", "a file, or a glob that matches files"))
    return tuple(map(Path, matches))


def read(against: Sequence[Against], question_fields: Sequence[str] = ()) -> tuple[Text, ...]:
    """Return all texts of the sets, in order. question_fields: looked for before those of published sets.

    Raises: InputError with every record without a question, and every file that cannot be read.
    """
    problems: list[Problem] = []
    texts: list[Text] = []
    wanted = (*question_fields, *QUESTION)
    for one in against:
        number, before = 0, len(problems)
        try:
            for path in paths(one):
                for row in rows.read(path, (*wanted, *ANSWER, *ID)):
                    number += 1
                    texts += _texts(one.name, str(number), row, wanted)
                    problems += row.problems
        except InputError as error:
            problems += error.problems
        if not number and len(problems) == before:
            problems.append(Problem(f"--against {one.name}", "no question", "at least one"))
    raise_problems(problems)
    return tuple(texts)


def _texts(name: str, number: str, row: Row, wanted: Sequence[str]) -> list[Text]:
    """Return a record's texts. number: what it is called where it has no id."""
    if row.problems:
        return []
    question, answer = _first(row.record, wanted), _first(row.record, ANSWER)
    if question is None:
        required = f"a question: text in one of {', '.join(wanted)} (or name the field: --question FIELD)"
        row.wrong(f"the fields {', '.join(map(repr, row.record)) or '(none)'}", required)
        return []
    id = _first(row.record, ID) or number
    return [Text(name, id, "question", question), *([Text(name, id, "answer", answer)] if answer else [])]


def _first(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """Return the text of the first field that has any. A list of turns is the texts of its turns."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
            value = "\n".join(_text(turn["content"]) for turn in value)
        if text := _text(value).strip():
            return text
    return None


def _text(value: object) -> str:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
