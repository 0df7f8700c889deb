"""From a response to what the grader takes, and from an outcome to the tags of a result."""

from __future__ import annotations

from dataclasses import fields

from megatron_prism.core.config.grade import GradeConfig, GradeLimits
from megatron_prism.eval.question import Protocol, Question
from megatron_prism.grade import outcome
from megatron_prism.grade.code import STOPS, code_of
from megatron_prism.grade.format import CLOSE, OPEN
from megatron_prism.grade.math import last_boxed
from megatron_prism.grade.outcome import Graded, Item

NEXT_TURN = "\nUser:"


def item_of(question: Question, response: str, id: str, is_truncated: bool, takes_cut: bool = False) -> Item:
    """Return a response as the grader takes it. id: of the response, by which its outcome is joined to it. takes_cut: the protocol's.

    A response to a plain text may go on with what nobody asked for, a turn or another function: it is cut before that, and is then whole
    although its generation ended for want of room.
    """
    text = response
    if isinstance(question.prompt, str) and question.kind != "strings":  # of which RULER counts those anywhere in the response
        text = first_turn(text)
        if question.tests is not None and {"prompt", "entry_point"} <= question.tests.keys():
            text = first_function(text, question.tests["entry_point"])
    is_whole = len(text) < len(response) or (takes_cut and has_answer(question, text))
    return outcome.item_of(question, id, text, is_truncated and not is_whole)


def has_answer(question: Question, response: str) -> bool:
    """Say whether a response that was cut holds a closed answer, which what is missing does not complete: a box, or a block of code."""
    answer = response[response.rfind(CLOSE) + len(CLOSE) :] if CLOSE in response else response
    if OPEN in answer:
        return False
    return (code_of(answer) if question.kind == "code" else last_boxed(answer)) is not None


def first_function(response: str, entry_point: str) -> str:
    """Return a bare continuation of a function up to what follows it. One that has a fence, a thought, or the function again is left as it is."""
    if any(mark in response for mark in ("```", OPEN, f"def {entry_point}")):
        return response
    return STOPS.split(response.lstrip("\n"), maxsplit=1)[0] if STOPS.search(response.lstrip("\n")) else response


def first_turn(response: str) -> str:
    """Return a plain response without the turns that follow its own. What stands in an open or closed <think> is no turn."""
    begin = response.rfind(CLOSE) + len(CLOSE) if CLOSE in response else 0
    if OPEN in response[begin:]:
        return response
    end = response.find(NEXT_TURN, begin)
    return response if end < 0 else response[:end]


def grade_config(protocol: Protocol, limits: GradeLimits) -> GradeConfig:
    """Return how a task is graded: the protocol says where the answer stands, `limits` what grading may cost."""
    costs = {one.name: getattr(limits, one.name) for one in fields(GradeLimits)}
    return GradeConfig(**costs, think=protocol.think, answer=protocol.answer)


def tags_of(question: Question, graded: Graded) -> dict[str, str]:
    """Return the tags of a result: the question's, and the letter that was chosen."""
    return {**question.tags, **({"letter": graded.chosen or "none"} if question.kind == "choice" else {})}
