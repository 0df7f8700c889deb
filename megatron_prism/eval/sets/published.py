"""The published sets of the paper's protocol: a table from a set's name to how its file is read, sampled and graded.

docs/EVALUATE.md says where each prompt and default comes from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.eval.question import Protocol, Question
from megatron_prism.eval.sets import answers, gpqa, programs, rows
from megatron_prism.eval.sets.rows import Row

MAX_PROBLEMS = 50  # shown of one file


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published set.

    num_questions: that the paper's protocol has. fields: all that its reader may ask for. read: a record as a question, or in words why it is
    left out. lay_out: what makes the prompts once all questions are known.
    """

    protocol: Protocol
    num_questions: int
    fields: tuple[str, ...]
    read: Callable[[Row, bool], Question | str]
    lay_out: Callable[[Sequence[Question], bool], tuple[Question, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A set's questions, in the file's order. notes: what a reader of the scores must know, as records that are left out."""

    questions: tuple[Question, ...]
    notes: tuple[str, ...] = ()


_MATH = Protocol(
    num_samples=64,
    temperature=0.6,
    top_p=0.95,
    max_tokens=32_768,
    think="free",
    answer="boxed_or_last",
    source="PRISM appendix 13: Qwen-eval, 64 samples, T 0.6, top-p 0.95, 32k tokens; which of its prompts is ours",
    takes_cut=True,
)
_CODE = Protocol(
    num_samples=3,
    temperature=0.7,
    top_p=1.0,
    max_tokens=32_768,
    think="free",
    answer="boxed_or_plain",
    source="PRISM appendix 13: Evalchemy, 3 samples, T 0.7, 32k tokens; top-p is not given: 1 is ours",
    takes_cut=True,
)
_GPQA = replace(
    _CODE,
    answer="boxed_or_last",
    source="derived from the paper's figures, multiples of 1/594: Evalchemy's GPQADiamond, 3 samples, T 0.7, 32k tokens; top-p is ours",
)
_GREEDY = replace(
    _MATH,
    num_samples=1,
    temperature=0.0,
    top_p=1.0,
    source="ours: one greedy response; the paper has GSM8K only in the leaderboard's form (lm-eval)",
)
_AIME = Published(protocol=_MATH, num_questions=30, fields=answers.AIME_FIELDS, read=answers.aime)
_CODEFORCES = Published(protocol=_CODE, num_questions=453, fields=programs.CODEFORCES_FIELDS, read=programs.codeforces)
_DIAMOND = Published(protocol=_GPQA, num_questions=198, fields=gpqa.FIELDS, read=gpqa.gpqa, lay_out=gpqa.harness)

SETS: Mapping[str, Published] = MappingProxyType(
    {
        "aime24": _AIME,
        "aime25": _AIME,
        "math500": replace(_AIME, num_questions=500, fields=answers.MATH_FIELDS, read=answers.math500),
        "gsm8k": Published(protocol=_GREEDY, num_questions=1319, fields=answers.GSM8K_FIELDS, read=answers.gsm8k),
        "gpqa_diamond": _DIAMOND,
        "gpqa_diamond_balanced": replace(
            _DIAMOND,
            lay_out=gpqa.balanced,
            protocol=replace(_GPQA, source=f"{_GPQA.source}; the balanced layout of the options is ours"),
        ),
        "livecodebench": Published(protocol=_CODE, num_questions=279, fields=programs.LIVECODEBENCH_FIELDS, read=programs.livecodebench),
        "codeforces": _CODEFORCES,
        "codeforces_checked": replace(
            _CODEFORCES,
            read=programs.codeforces_checked,
            protocol=replace(_CODE, source=f"{_CODE.source}; without editorials, with checkers, whole tests only: ours"),
        ),
        "humaneval": Published(
            protocol=replace(_GREEDY, answer="boxed_or_plain", source="ours: one greedy response; the paper has no HumanEval"),
            num_questions=164,
            fields=programs.HUMANEVAL_FIELDS,
            read=programs.humaneval,
        ),
    }
)


def read(name: str, path: Path, chat: bool = False) -> Loaded:
    """Read a set from a file in its published form. chat: the prompts are a user's turn, for a chat template, and no plain text.

    Raises: InputError for a set of another name; for a file with no question; with all records that lack something, or share an id.
    """
    published = SETS.get(name)
    if published is None:
        raise InputError(Problem(f"the set {name!r}", "no published set", f"one of {', '.join(SETS)}"))
    questions: list[Question] = []
    problems: list[Problem] = []
    left_out: Counter[str] = Counter()
    places: dict[str, str] = {}
    for row in rows.read(path, published.fields):
        question = published.read(row, chat) if not row.problems else ""
        if not row.problems and isinstance(question, str):
            left_out[question] += 1
            continue
        if isinstance(question, Question) and not row.problems:
            if (first := places.setdefault(question.id, row.place)) != row.place:
                row.wrong(f"the id {question.id!r} of {first}", "an id of its own, or one copy of each problem")
            questions.append(question)
        problems += row.problems
    if len(problems) > MAX_PROBLEMS:
        more = Problem(str(path), f"{len(problems)} problems in all", f"a file of {name} in its published form")
        problems = [*problems[:MAX_PROBLEMS], more]
    if not questions and not problems:
        problems.append(Problem(str(path), f"no question{_and_left_out(left_out)}", f"the questions of {name}"))
    if problems:
        raise InputError(problems)
    made = tuple(questions) if published.lay_out is None else published.lay_out(questions, chat)
    return Loaded(questions=made, notes=tuple(_notes(published, made, left_out)))


def _notes(published: Published, questions: Sequence[Question], left_out: Counter[str]) -> Iterator[str]:
    yield from (f"{count} {reason} are left out" for reason, count in left_out.items())
    if len(questions) != published.num_questions:
        yield f"{len(questions)} questions, where the published set has {published.num_questions}"
    if twice := [one.id for one in questions if len(set(one.choices)) < len(one.choices)]:
        yield f"{len(twice)} questions have an option twice, of which one letter is right: {', '.join(twice[:5])}"


def _and_left_out(left_out: Counter[str]) -> str:
    return "".join(f", {count} {reason} left out" for reason, count in left_out.items())
