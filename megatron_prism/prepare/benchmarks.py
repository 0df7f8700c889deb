"""Read evaluation sets in their published form, as texts: each question, and its answer or solution apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.prepare import arrow, records, sources
from megatron_prism.prepare.lines import TooLong
from megatron_prism.prepare.records import BadRecord
from megatron_prism.prepare.sources import Input, Record

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


def files(against: Sequence[Against]) -> dict[str, tuple[Input, ...]]:
    """Return the files of each set, by its name.

    Raises: InputError with every path that matches no file, and every match that is not read.
    """
    problems: list[Problem] = []
    by_name = {}
    for one in against:
        key = f"--against {one.name}"
        part = PartConfig(path=(one.path,), text="".join(f"{{{name}}}" for name in (*QUESTION, *ANSWER, *ID)))
        by_name[one.name] = sources.files(part, key, problems)
        problems += [
            Problem(key, str(file.path), "records with fields: a .txt file has none") for file in by_name[one.name] if file.is_plain
        ]
    raise_problems(problems)
    return by_name


def read(against: Sequence[Against], question_fields: Sequence[str] = ()) -> tuple[Text, ...]:
    """Return all texts of the sets, in order. question_fields: looked for before those of published sets.

    Raises: InputError with every record without a question, and every file that cannot be read.
    """
    problems: list[Problem] = []
    texts: list[Text] = []
    wanted = (*question_fields, *QUESTION)
    for name, of_set in files(against).items():
        before = len(texts)
        for file in of_set:
            for number, record in sources.read_records(_with_columns(file, wanted)):
                try:
                    texts += _texts(name, str(number), record, wanted)
                except BadRecord as error:
                    fix = "correct it, or name the field: --question FIELD"
                    problems.append(Problem(file.place(number + error.line), error.found, error.required, fix))
        if len(texts) == before and not problems:
            problems.append(Problem(f"--against {name}", "no question", "at least one"))
    raise_problems(problems)
    return tuple(texts)


def _with_columns(file: Input, wanted: Sequence[str]) -> Input:
    """Return a columnar file with those of the fields that it has: a reader refuses others."""
    if file.path.suffix not in arrow.FORMATS:
        return file
    columns = arrow.column_names(file.path)
    named = [name for name in dict.fromkeys((*wanted, *ANSWER, *ID)) if name in columns]
    if not set(named) & set(wanted):
        found = f"columns {', '.join(map(repr, columns)) or 'none'}"
        raise_problems([Problem(str(file.path), found, f"a question: one of {', '.join(wanted)}", "name the column: --question FIELD")])
    return replace(file, part=replace(file.part, text="".join(f"{{{name}}}" for name in named)))


def _texts(name: str, number: str, record: Record, wanted: Sequence[str]) -> list[Text]:
    if isinstance(record, TooLong):
        raise BadRecord(f"{record.num_bytes} bytes", "a question")
    try:
        row = records.row_of(record)
        question = _first(row, wanted)
        if question is None:
            raise BadRecord(f"the fields {', '.join(map(repr, row)) or '(none)'}", f"a question: text in one of {', '.join(wanted)}")
        answer, id = _first(row, ANSWER), _first(row, ID) or number
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 ({error.reason})", "UTF-8 text") from None
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
    value = value.decode() if isinstance(value, bytes) else value
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def paths(against: Sequence[Against]) -> tuple[Path, ...]:
    """Return the paths of all files of the sets."""
    return tuple(file.path for of_set in files(against).values() for file in of_set)
