"""What grading takes and gives: a response with what is known of its problem, and an outcome. A fault is an outcome of its own, never a 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

Kind = Literal["math", "choice", "code", "strings"]
Outcome = Literal["right", "wrong", "no_format", "truncated", "fault"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A response to grade.

    id: the response's own; outcomes are joined by it, never by position. gold: the right answer (math), the right choice's letter (choice), or
    which of the strings are expected, `all` or `any` (strings). choices: the texts of a choice's options, in the order of their letters, or the
    expected strings. tests: how code is tested, {kind: stdin, cases: [{input, output}]}, {kind: asserts, code} or {kind: call, function, cases}
    (grade/code.py). is_truncated: the response ended for want of room, and not by an end token.
    """

    id: str
    kind: Kind
    response: str
    gold: str = ""
    choices: tuple[str, ...] = ()
    tests: Mapping[str, Any] | None = None
    is_truncated: bool = False


class Gradable(Protocol):
    """A problem as a prompt set or an evaluation's question holds it: what grades a response to it, as in Item."""

    @property
    def kind(self) -> Kind: ...
    @property
    def gold(self) -> str: ...
    @property
    def choices(self) -> tuple[str, ...]: ...
    @property
    def tests(self) -> Mapping[str, Any] | None: ...


def item_of(problem: Gradable, id: str, response: str, is_truncated: bool) -> Item:
    """Return a response to a problem as what is graded. id: the response's own."""
    return Item(
        id=id,
        kind=problem.kind,
        response=response,
        gold=problem.gold,
        choices=problem.choices,
        tests=problem.tests,
        is_truncated=is_truncated,
    )


@dataclass(frozen=True, kw_only=True)
class Graded:
    """An item's outcome, and why in a few words.

    right and wrong are verdicts on an answer. no_format: no `<think> ... </think> answer`, or no answer in the form that the kind asks for.
    truncated: the response ended before its answer. fault: the grader, the sandbox or the machine failed, which says nothing of the response.
    chosen: the letter of kind choice, empty where none was chosen.
    score: the share of the expected strings (strings; right is 1, less is wrong); None: the outcome says all.
    """

    id: str
    outcome: Outcome
    why: str = ""
    chosen: str = ""
    score: float | None = None
